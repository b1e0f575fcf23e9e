"""Pruned layers for inference only: the kept weights in the order of the kernel, and nothing dense.

At 90 % sparsity such a layer takes less than a fifth of the bytes of its dense float32 weight: the packed values and
their columns, and a bit per weight that says which exist. Its state_dict is that of the masked layer it was made from,
`weight` and `weight_mask`, so packed bytes, which belong to one kind of processor, never travel. A ReLU or clamp that
follows is folded into the layer (packed_clamp.py).
"""

import math
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from imgopt_fast.nn.masked import MaskedConv2d, MaskedLinear
from imgopt_fast.nn.packed_clamp import ClampedLayer, fold_clamps
from imgopt_fast.nn.replace import replace_module, take_hooks
from imgopt_fast.ops.masked_matmul import PackedMaskedWeight, masked_conv2d, masked_matmul, pack_masked_weight


class _Packed(ClampedLayer):
    """What both layers share: the packed weight, and the way to the dense one and back."""

    bias: nn.Parameter | None
    groups: int = 1

    def __init__(self, layer: MaskedLinear | MaskedConv2d) -> None:
        super().__init__()
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)
        self.groups = layer.groups
        self._pack(layer.weight.detach(), layer.weight_mask)
        take_hooks(self, layer)
        self.eval()

    def _limits(self) -> Any:
        """Keyword arguments of both operations."""
        return {"output_min": self.output_min, "output_max": self.output_max}

    def _pack(self, weight: Tensor, mask: Tensor) -> None:
        self.packed: PackedMaskedWeight = pack_masked_weight(weight, mask, groups=self.groups)
        self._bits = torch.from_numpy(np.packbits(mask.cpu().contiguous().numpy()))

    @torch.no_grad()
    def dense(self) -> tuple[Tensor, Tensor]:
        """(weight, weight_mask) as the masked layer had them, in the weight's shape; zero where nothing is kept."""
        shape = self.packed.shape
        bits = np.unpackbits(self._bits.numpy(), count=math.prod(shape))
        values = self.packed.values
        mask = torch.from_numpy(bits).bool().view(shape).to(values.device)
        with torch.autocast(values.device.type, enabled=False):
            return self._dense_weight(), mask

    def _dense_weight(self) -> Tensor:
        """Each input by itself shows its column of the weight: products with one and sums with zeros are exact."""
        shape, values = self.packed.shape, self.packed.values
        if type(values) is Tensor and values.shape == shape:  # held dense
            return values.contiguous()
        if len(shape) == 2:
            return masked_matmul(torch.eye(shape[1], dtype=values.dtype, device=values.device), self.packed).t()
        out, per_group, *taps = shape
        channels = per_group * self.groups
        each = torch.eye(channels, dtype=values.dtype, device=values.device)[:, :, None, None]
        seen = masked_conv2d(each, self.packed, padding=(taps[0] - 1, taps[1] - 1), groups=self.groups)
        columns = seen.flip(2, 3).unflatten(0, (self.groups, per_group)).unflatten(2, (self.groups, -1))
        own = torch.stack([columns[g, :, g] for g in range(self.groups)])  # (groups, per_group, out / groups, kH, kW)
        return own.transpose(1, 2).reshape(out, per_group, *taps).contiguous()

    def nbytes(self) -> int:
        """Bytes that the weight takes in memory."""
        tensors = [value for value in self.packed if isinstance(value, Tensor)]
        return sum(tensor.nbytes for tensor in tensors) + self._bits.nbytes

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"], destination[f"{prefix}weight_mask"] = self.dense()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        weight, mask = (state_dict.pop(f"{prefix}{name}", None) for name in ("weight", "weight_mask"))
        super()._load_from_state_dict(state_dict, prefix, *args)
        if weight is None or mask is None:
            args[2].extend(f"{prefix}{n}" for n, v in (("weight", weight), ("weight_mask", mask)) if v is None)
        elif tuple(weight.shape) != self.packed.shape:
            args[4].append(f"{prefix}weight: expected shape {self.packed.shape}, got {tuple(weight.shape)}")
        else:
            values = self.packed.values
            self._pack(weight.to(values.device, values.dtype), mask.to(values.device))

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        weight, mask = self.dense()
        self._pack(fn(weight), fn(mask))
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("packed", "_bits")} | {"_dense": self.dense()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        weight, mask = state.pop("_dense")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._pack(weight, mask)


class PackedMaskedLinear(_Packed):
    """A `MaskedLinear` for inference: input (..., K), output (..., O); no gradient passes."""

    def forward(self, input: Tensor) -> Tensor:
        return masked_matmul(input, self.packed, None, self.bias, **self._limits())

    def extra_repr(self) -> str:
        out, inputs = self.packed.shape
        return f"{inputs}, {out}, bias={self.bias is not None}, {_described(self)}"


class PackedMaskedConv2d(_Packed):
    """A `MaskedConv2d` for inference: input (N, C, H, W), channels_last preferred; no gradient passes."""

    def __init__(self, layer: MaskedConv2d) -> None:
        super().__init__(layer)
        self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation

    def forward(self, input: Tensor) -> Tensor:
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return masked_conv2d(input, self.packed, None, self.bias, *geometry, **self._limits())

    def extra_repr(self) -> str:
        return f"weight {self.packed.shape}, stride={self.stride}, padding={self.padding}, {_described(self)}"


def pack(model: nn.Module) -> nn.Module:
    """Replace the masked layers of `model`, in place, by packed ones; returns it, or its replacement if it is one.

    For inference: the dense weights are released, and no parameter of the model asks for a gradient any more, which
    packed layers do not pass. The state_dict stays what it was. A clamp that alone uses the result
    of such a layer is folded into it, see `packed_clamp`: `nn.ReLU`, `nn.ReLU6` and `nn.Hardtanh` in any model that
    torch.fx can trace, and `relu`, `relu6` and `clamp` as functions and methods too where `model` is a graph of it.
    """
    for name, layer in list(model.named_modules()):
        if isinstance(layer, MaskedLinear):
            packed: nn.Module = PackedMaskedLinear(layer)
        elif isinstance(layer, MaskedConv2d):
            packed = PackedMaskedConv2d(layer)
        else:
            continue
        if not name:
            return packed
        replace_module(model, layer, packed)
    fold_clamps(model)
    return model.requires_grad_(False)


def _described(layer: _Packed) -> str:
    clamped = "" if layer.output_min is layer.output_max is None else f"in [{layer.output_min}, {layer.output_max}], "
    share = layer.nbytes() / max(1, math.prod(layer.packed.shape) * layer.packed.values.element_size())
    return f"{clamped}{share:.0%} of the dense bytes"
