"""Linear and convolution layers whose pruned weights cost nothing, forward or backward.

The Parameter `weight` stays dense and the bool buffer `weight_mask` says which of it exists; both are what a
state_dict holds. What the kernels walk is derived, the layout of the mask for training and the packed weight for
inference: made on first use, again when the mask or the weight changes, and left out of state_dict, pickle and
deepcopy. In training the values are gathered from the weight in every product, unless an optimizer writes them in order
besides (MaskedSGD does), which saves a fifth of a forward at 90 % sparsity.
"""

import math
import weakref
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imgopt_fast import _native
from imgopt_fast._mask_blocks import trains_sparse
from imgopt_fast.nn.replace import take_hooks
from imgopt_fast.ops.masked_matmul import (
    MaskLayout,
    PackedMaskedWeight,
    mask_layout,
    masked_conv2d,
    masked_matmul,
    pack_masked_weight,
)


class Seen:
    """Which tensors something was made from, and which version of each. Keeps none of them alive.

    What `id` gives is no name for a tensor: `torch.func.functional_call` puts one after the other in the same memory.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._seen = [(weakref.ref(tensor), tensor._version, tensor.data_ptr()) for tensor in tensors]

    def are(self, *tensors: Tensor) -> bool:
        """Whether these are the same tensors, unchanged."""
        return all(
            seen() is tensor and version == tensor._version and place == tensor.data_ptr()
            for (seen, version, place), tensor in zip(self._seen, tensors, strict=True)
        )


class _Masked(nn.Module):
    """What both layers share: the mask, and the layout and the packed weight that follow it."""

    weight: nn.Parameter
    weight_mask: Tensor
    groups: int = 1
    # Set: the gradient of `weight` is that of all its entries, from a dense product, which is what regrowing needs.
    dense_gradient: bool = False

    def _init_mask(self) -> None:
        self.register_buffer("weight_mask", torch.ones_like(self.weight, dtype=torch.bool))
        self._forget()

    def _forget(self) -> None:
        self._layout: MaskLayout | None = None
        self._layout_of: Seen | None = None
        self._packed: PackedMaskedWeight | None = None
        self._packed_of: Seen | None = None
        self._ordered: MaskLayout | None = None
        self._ordered_of: Seen | None = None
        # Whether a gradient of the input was ever asked for; None before the first forward that could use `_ordered`.
        self._input_learns: bool | None = None

    def set_mask(self, mask: Tensor) -> None:
        """Keep the weights where `mask`, bool of the weight's shape, is set; the others become exactly zero."""
        if mask.dtype != torch.bool or mask.shape != self.weight.shape:
            raise ValueError(
                f"mask: expected bool of shape {tuple(self.weight.shape)}, got {mask.dtype} of {tuple(mask.shape)}"
            )
        with torch.no_grad():
            self.weight_mask.copy_(mask)
            self.weight.masked_fill_(~self.weight_mask, 0)
        self._follow()

    def mask_or_layout(self) -> Tensor | MaskLayout:
        """What the operation takes for a mask: the layout, brought up to date.

        A graph being traced takes the layout that is there: from an eager call, `layout()`, `set_mask` or a loaded
        state_dict. Where there is none it takes the mask itself, which costs dense arithmetic.
        """
        if torch.compiler.is_compiling():
            return self.weight_mask if self._layout is None else self._layout
        # Changes of a mask that was made in inference mode are not counted; one on the meta device has no positions.
        return self.weight_mask if self.weight_mask.is_inference() or self.weight_mask.is_meta else self.layout()

    def layout(self) -> MaskLayout:
        """The layout of the present mask, analysed again if the mask has changed."""
        mask = self.weight_mask
        if self._layout is None or self._layout_of is None or not self._layout_of.are(mask):
            self._layout, self._layout_of = mask_layout(mask, groups=self.groups), Seen(mask)
        return self._layout

    def ordered(self) -> MaskLayout | None:
        """The layout in training with the values of the present weight, for an optimizer that then writes both.

        None where nothing would read them: before the first forward, where dense arithmetic trains, and with more than
        three fifths of the weights kept, which take 16 bytes each with the optimizer's indices and gain a fiftieth of a
        training step (a twelfth at 90 % sparsity). After each change the optimizer calls `keep_ordered`; without it, or
        after a change by anyone else, the values are gathered again. A change through `weight.data`, which torch does
        not count, is not seen.
        """
        if self._input_learns is None or self.weight.is_cuda or self.weight.dtype != torch.float32:
            return None
        used = self.mask_or_layout()
        if not isinstance(used, MaskLayout) or 5 * used.kept > 3 * self.weight.numel():
            return None
        if not self._has_ordered():
            self._ordered = used.with_values(self.weight, transposed=self._input_learns)
            self.keep_ordered()
        return self._ordered

    def keep_ordered(self) -> None:
        """Take note that `ordered` has the values of the weight as it is now."""
        self._ordered_of = Seen(self.weight, self.weight_mask)

    def _has_ordered(self) -> bool:
        if self._ordered is None or self._ordered_of is None or not self._ordered_of.are(self.weight, self.weight_mask):
            return False
        return self._ordered.transposed_values is not None or not self._input_learns

    def packed(self) -> PackedMaskedWeight:
        """The present weight and mask packed for inference, again if either has changed.

        A change through `weight.data`, which torch does not count, is seen after the next call of `train` or `eval`.
        """
        weight, mask = self.weight, self.weight_mask
        if self._packed is None or self._packed_of is None or not self._packed_of.are(weight, mask):
            self._packed = pack_masked_weight(weight.detach(), mask, groups=self.groups)
            self._packed_of = Seen(weight, mask)
        return self._packed

    def _weight_and_mask(self, input: Tensor) -> tuple[Tensor | PackedMaskedWeight, Tensor | MaskLayout | None]:
        """What the operation takes: packed for inference in evaluation mode, otherwise the weight and its layout."""
        if self.training and self.dense_gradient and torch.is_grad_enabled():
            # Zero off the mask, and with the gradient 1 there.
            return torch.where(self.weight_mask, self.weight, self.weight - self.weight.detach()), None
        inference = not self.training and not torch.is_grad_enabled()
        compiling = torch.compiler.is_compiling()
        if inference and not compiling and not (self.weight.is_inference() or self.weight.is_meta):
            return self.packed(), None
        found = self.mask_or_layout()
        if isinstance(found, Tensor) or compiling:
            return self.weight, found
        self._input_learns = bool(self._input_learns) or input.requires_grad
        return self.weight, self._ordered if self._has_ordered() else found

    def train(self, mode: bool = True) -> Self:
        self._packed = None
        return super().train(mode)

    def _follow(self) -> None:
        """Analyse a new mask at once where there was a layout: a compiled forward would go on with the old one."""
        if self._layout is not None:
            self.layout()

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._follow()

    def density(self) -> float:
        """Share of the weights that exist; NaN on the meta device, where nobody knows."""
        if self.weight_mask.is_meta:
            return math.nan
        return float(self.weight_mask.float().mean()) if self.weight_mask.numel() else 1.0

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._forget()  # the device may change
        return cast(Self, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        derived = ("_layout", "_layout_of", "_packed", "_packed_of", "_ordered", "_ordered_of")
        return {**self.__dict__, **dict.fromkeys(derived)}


class MaskedLinear(_Masked):
    """`torch.nn.Linear` with a mask: input (..., in_features), output (..., out_features).

    `weight` (out_features, in_features), `weight_mask` bool of its shape, all set at first, `bias` (out_features,) or
    None; initialised as torch does.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._adopt(nn.Linear(in_features, out_features, bias, device, dtype))

    @classmethod
    def from_dense(cls, module: nn.Linear) -> Self:
        """The masked layer in the place of `module`, sharing its Parameters."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._adopt(module)
        take_hooks(layer, module)
        return layer.train(module.training)

    def _adopt(self, module: nn.Linear) -> None:
        self.in_features, self.out_features = module.in_features, module.out_features
        self.weight = cast(nn.Parameter, module.weight)
        self.bias = cast(nn.Parameter | None, module.bias)
        self._init_mask()

    def forward(self, input: Tensor) -> Tensor:
        weight, mask = self._weight_and_mask(input)
        if isinstance(weight, Tensor) and mask is None:
            return F.linear(input, weight, self.bias)
        return masked_matmul(input, weight, mask, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, density={self.density():.3f}"


class MaskedConv2d(_Masked):
    """`torch.nn.Conv2d` with a mask and zero padding: input (N, C, H, W), channels_last preferred.

    `weight` (out_channels, in_channels / groups, kH, kW), `weight_mask` bool of its shape, all set at first, `bias`
    (out_channels,) or None; initialised as torch does.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._adopt(
            nn.Conv2d(
                in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
                device=device, dtype=dtype,
            )
        )  # fmt: skip

    @classmethod
    def from_dense(cls, module: nn.Conv2d) -> Self:
        """The masked layer in the place of `module`, sharing its Parameters; ValueError if its padding is not zeros."""
        if module.padding_mode != "zeros":
            raise ValueError(f"module: expected padding_mode 'zeros', got {module.padding_mode!r}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._adopt(module)
        take_hooks(layer, module)
        return layer.train(module.training)

    def _adopt(self, module: nn.Conv2d) -> None:
        self.in_channels, self.out_channels = module.in_channels, module.out_channels
        self.kernel_size = cast(tuple[int, int], module.kernel_size)
        self.stride = cast(tuple[int, int], module.stride)
        self.dilation = cast(tuple[int, int], module.dilation)
        self.groups = module.groups
        self.padding = _explicit_padding(module)
        self.weight = cast(nn.Parameter, module.weight)
        self.bias = cast(nn.Parameter | None, module.bias)
        self._init_mask()

    def mask_or_layout(self) -> Tensor | MaskLayout:
        """What the operation takes for a mask: the layout, or the mask itself where dense arithmetic trains faster."""
        found = super().mask_or_layout()
        if isinstance(found, Tensor) or torch.compiler.is_compiling() or self.trains_sparse(found.kept):
            return found
        return self.weight_mask

    def trains_sparse(self, kept: int) -> bool:
        """Whether the sparse kernels train the layer with so many weights kept, in the present dtype; by a table."""
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else self.weight.dtype
        if self.weight.is_cuda or (dtype == torch.bfloat16 and not torch.cpu._is_avx512_bf16_supported()):
            return True  # the operation chooses itself; without instructions dense bfloat16 is slow
        channels = min(self.in_channels, self.out_channels) // self.groups
        return trains_sparse(channels, kept / max(1, self.weight.numel()), _native.active_isa(), str(dtype)[6:])

    def forward(self, input: Tensor) -> Tensor:
        weight, mask = self._weight_and_mask(input)
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        if isinstance(weight, Tensor) and mask is None:
            return F.conv2d(input, weight, self.bias, *geometry)
        return masked_conv2d(input, weight, mask, self.bias, *geometry)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}, "
            f"density={self.density():.3f}"
        )


def pads_alike(module: nn.Conv2d) -> bool:
    """Whether it pads with zeros, and as many on both sides, so that a masked layer can take its place."""
    uneven = module.padding == "same" and any(p % 2 for p in _whole_padding(module))
    return module.padding_mode == "zeros" and not uneven


def _explicit_padding(module: nn.Conv2d) -> tuple[int, int]:
    if module.padding == "valid":
        return (0, 0)
    if module.padding == "same":
        if not pads_alike(module):
            raise ValueError(f"module: expected padding that is the same on both sides, got 'same' for {module}")
        return cast(tuple[int, int], tuple(p // 2 for p in _whole_padding(module)))
    return cast(tuple[int, int], module.padding)


def _whole_padding(module: nn.Conv2d) -> list[int]:
    """Along each axis on both sides together, of padding 'same'."""
    return [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
