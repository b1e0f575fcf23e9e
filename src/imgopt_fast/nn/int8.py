"""Layers with int8 weights: what a quantized network is made of, and usable alone.

The state is plain buffers in canonical order (`weight_int8`, scales, zero points, float bias), so state_dict,
safetensors, deepcopy and pickle need nothing special. The packed weight belongs to one processor: it is made anew
after whatever changes the buffers (construction, load_state_dict, a move, unpickling) and is never part of the state.
After writing into a buffer by hand call `repack()`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from imgopt_fast._arguments import Padding
from imgopt_fast.ops.int8_conv2d import PackedInt8Weight, int8_conv2d, pack_int8_weight

Requantize = Literal["float", "shift"]


class Float32Buffers(nn.Module):
    """Keeps its buffers, and those of its children, in their dtype when a model is cast to another: scales and biases
    are in real units."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return super()._apply(partial(_in_its_dtype, fn), recurse)  # type: ignore[no-untyped-call]


def _in_its_dtype(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    moved = fn(tensor)
    return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)


class _Int8Layer(Float32Buffers):
    """Buffers and packing, shared by the layers. The buffers hold the scales; the call needs them as numbers."""

    weight_int8: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    input_scale: Tensor
    input_zero_point: Tensor
    output_scale: Tensor | None
    output_zero_point: Tensor

    def __init__(
        self,
        weight_int8: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        input_scale: float,
        input_zero_point: int,
        output_scale: float | None,
        output_zero_point: int,
        output_min: float | None,
        output_max: float | None,
        requantize: Requantize,
    ) -> None:
        super().__init__()
        self.register_buffer("weight_int8", weight_int8.detach().clone())
        self.register_buffer("weight_scale", weight_scale.detach().to(torch.float32).clone())
        self.register_buffer("bias", None if bias is None else bias.detach().to(torch.float32).clone())
        self.register_buffer("input_scale", torch.tensor(input_scale, dtype=torch.float32))
        self.register_buffer("input_zero_point", torch.tensor(input_zero_point, dtype=torch.int32))
        scale = None if output_scale is None else torch.tensor(output_scale, dtype=torch.float32)
        self.register_buffer("output_scale", scale)
        self.register_buffer("output_zero_point", torch.tensor(output_zero_point, dtype=torch.int32))
        self.output_min = output_min
        self.output_max = output_max
        self.requantize: Requantize = requantize
        self.groups = 1
        self.training = False
        self._packed: PackedInt8Weight | None = None
        self._output: tuple[float | None, int, torch.dtype] = (None, 0, torch.float32)

    def repack(self) -> None:
        """Check the buffers and bring the weight into the active kernel's order.

        Raises ValueError when a scale, zero point or sum is out of range.
        """
        if self.weight_int8.is_meta:
            return
        weight = self.weight_int8
        self._packed = pack_int8_weight(
            weight.reshape(*weight.shape, *[1] * (4 - weight.ndim)),
            self.weight_scale,
            self.bias,
            input_scale=self.input_scale.item(),
            input_zero_point=int(self.input_zero_point),
            groups=self.groups,
        )
        scale = None if self.output_scale is None else self.output_scale.item()
        self._output = (scale, int(self.output_zero_point), self.output_dtype)

    def packed(self) -> PackedInt8Weight:
        """The layer as `int8_conv2d` takes it: int8 weight (4-D), int32 bias, scales."""
        if self._packed is None:
            self.repack()
        assert self._packed is not None
        return self._packed

    def extra_repr(self) -> str:
        shape = tuple(self.weight_int8.shape)
        return f"weight {shape}, input scale {self.input_scale.item():.4g}, output {self.output_dtype}"

    @property
    def output_dtype(self) -> torch.dtype:
        return torch.float32 if self.output_scale is None else torch.uint8

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.repack()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.repack()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        try:
            self.repack()
        except ValueError as refusal:
            raise ValueError(f"{prefix.removesuffix('.') or 'layer'}: {refusal}") from refusal

    def _run(
        self,
        input: Tensor,
        stride: int | Sequence[int] = 1,
        padding: Padding = 0,
        dilation: int | Sequence[int] = 1,
    ) -> Tensor:
        packed = self._packed or self.packed()
        scale, zero_point, dtype = self._output
        return int8_conv2d(
            input,
            packed,
            output_scale=scale,
            output_zero_point=zero_point,
            output_dtype=dtype,
            stride=stride,
            padding=padding,
            dilation=dilation,
            output_min=self.output_min,
            output_max=self.output_max,
            requantize=self.requantize,
        )


class Int8Conv2d(_Int8Layer):
    """A convolution on quantized activations, uint8 or int8 (N, C, H, W); uint8 out, or float32 without output_scale.

    Arguments and errors are those of `imgopt_fast.int8_conv2d` and `pack_int8_weight`; the bias is in real units.
    """

    def __init__(
        self,
        weight_int8: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None = None,
        *,
        input_scale: float,
        input_zero_point: int = 0,
        output_scale: float | None = None,
        output_zero_point: int = 0,
        stride: int | Sequence[int] = 1,
        padding: Padding = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        output_min: float | None = None,
        output_max: float | None = None,
        requantize: Requantize = "float",
    ) -> None:
        super().__init__(
            weight_int8,
            weight_scale,
            bias,
            input_scale,
            input_zero_point,
            output_scale,
            output_zero_point,
            output_min,
            output_max,
            requantize,
        )
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.repack()

    def forward(self, input: Tensor) -> Tensor:
        return self._run(input, self.stride, self.padding, self.dilation)


class Int8Linear(_Int8Layer):
    """A linear layer on quantized activations: uint8 or int8 (..., K) in, (..., O) out; weight_int8 is (O, K).

    Arguments and errors as for `Int8Conv2d`.
    """

    def __init__(
        self,
        weight_int8: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None = None,
        *,
        input_scale: float,
        input_zero_point: int = 0,
        output_scale: float | None = None,
        output_zero_point: int = 0,
        output_min: float | None = None,
        output_max: float | None = None,
        requantize: Requantize = "float",
    ) -> None:
        super().__init__(
            weight_int8,
            weight_scale,
            bias,
            input_scale,
            input_zero_point,
            output_scale,
            output_zero_point,
            output_min,
            output_max,
            requantize,
        )
        self.repack()

    def forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, input.shape[-1], 1, 1)
        return self._run(rows).reshape(*input.shape[:-1], self.weight_int8.shape[0])
