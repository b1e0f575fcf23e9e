"""Sparse masked matmul and convolution: `input @ where(mask, weight, 0).T + bias` at the cost of the kept weights.

    masked_matmul, masked_conv2d   with a bool mask (dense arithmetic), a MaskLayout (training: forward and both
                                   gradients are sparse) or a PackedMaskedWeight (inference)

One operation serves the linear and the convolution: a convolution's rows are the windows that its output positions
see, gathered by the kernel itself, and its input gradient is a convolution of the same kind with the transposed
structure. Double backward is defined through the same two operations, which are each other's derivatives.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from imgopt_fast._arguments import as_pair, check_clamp
from imgopt_fast.ops import registration
from imgopt_fast.ops.masked_matmul import cuda, reference
from imgopt_fast.ops.masked_matmul.arguments import check_product, is_lowered
from imgopt_fast.ops.masked_matmul.int8 import (
    PackedInt8MaskedWeight,
    int8_masked_matmul,
    pack_int8_masked_weight,
)
from imgopt_fast.ops.masked_matmul.layout import MaskLayout, PackedMaskedWeight, mask_layout, pack_masked_weight

__all__ = [
    "MaskLayout",
    "PackedInt8MaskedWeight",
    "PackedMaskedWeight",
    "int8_masked_matmul",
    "mask_layout",
    "masked_conv2d",
    "masked_matmul",
    "pack_int8_masked_weight",
    "pack_masked_weight",
]


def masked_matmul(
    input: Tensor,
    weight: Tensor | PackedMaskedWeight,
    mask: Tensor | MaskLayout | None = None,
    bias: Tensor | None = None,
    *,
    output_min: float | None = None,
    output_max: float | None = None,
) -> Tensor:
    """`input @ where(mask, weight, 0).T + bias`, computed for the kept weights only.

    `input` (..., K) and `weight` (O, K) share a dtype of float32, bfloat16, float16 (both summed in float32) or
    float64; `bias` (O,). `mask` is a `MaskLayout` of `mask_layout` (training), or bool (O, K), which costs a dense
    matmul; it is left out with a `PackedMaskedWeight` (inference: no gradient). Returns (..., O) in the input's dtype.

    `output_min` and `output_max` clamp the result on its way out, as in `int8_conv2d`: 0 and None are ReLU, 0 and 6
    ReLU6; where it was clamped, no gradient passes.

    Masked means absent: off the mask, weights have no effect whatever they hold, and their gradient is zero. The
    result for non-finite `input` is unspecified. Raises TypeError and ValueError for anything else.
    """
    weight_shape = check_product(input, weight, mask, bias, groups=1, dims=2)
    check_clamp(output_min, output_max)
    if input.dim() == 0 or input.shape[-1] != weight_shape[1]:
        raise ValueError(
            f"input: expected (..., {weight_shape[1]}) for weight {weight_shape}, got {tuple(input.shape)}"
        )
    if isinstance(weight, PackedMaskedWeight) and weight.values.dim() in (2, 3):
        output = cuda.linear_of_packed(input, weight.values, bias, weight.quads, weight.columns, weight.shape[0])
        return _clamped(output, output_min, output_max)
    if isinstance(mask, MaskLayout) and input.is_cuda:
        assert isinstance(weight, Tensor)
        has_blocks = mask.blocks is not None
        form = cuda.form_in_training(input, mask.mask.numel(), mask.kept, blocks=has_blocks)
        if form == "blocks":
            assert mask.blocks is not None
            assert mask.transposed_blocks is not None
            output = cuda.block_matmul(input, weight, bias, mask.blocks, mask.transposed_blocks)
            return _clamped(output, output_min, output_max)
        mask = mask if form == "quads" else mask.mask
    elif isinstance(mask, MaskLayout) and mask.dense_in_bfloat16 and _multiplied_dtype(input) == torch.bfloat16:
        mask = mask.mask
    if isinstance(mask, Tensor):
        assert isinstance(weight, Tensor)
        output = torch.nn.functional.linear(input, torch.where(mask, weight, 0), bias)
        return _clamped(output, output_min, output_max)
    return _apply(input, weight, mask, bias, weight_shape[1], [], output_min, output_max)


def masked_conv2d(
    input: Tensor,
    weight: Tensor | PackedMaskedWeight,
    mask: Tensor | MaskLayout | None = None,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    output_min: float | None = None,
    output_max: float | None = None,
) -> Tensor:
    """`torch.nn.functional.conv2d` with `where(mask, weight, 0)`, computed for the kept weights only.

    `input` (N, C, H, W), channels_last preferred; `weight` (O, C / groups, kH, kW); `mask` as in `masked_matmul`, and
    a MaskLayout or PackedMaskedWeight made with the same `groups`. Zero padding. Returns (N, O, outH, outW) in
    channels_last memory. Clamping, dtypes, gradients and errors as in `masked_matmul`. On CUDA torch's own convolution
    serves most masks, in float32 with TF32 unless `torch.backends.cudnn.allow_tf32` is off.
    """
    weight_shape = check_product(input, weight, mask, bias, groups=groups, dims=4)
    check_clamp(output_min, output_max)
    step, offset = as_pair("stride", stride, 1), as_pair("padding", padding, 0)
    per_tap = as_pair("dilation", dilation, 1)
    channels = weight_shape[1] * groups
    if input.dim() != 4 or input.shape[1] != channels:
        raise ValueError(f"input: expected (N, {channels}, H, W) for weight {weight_shape}, got {tuple(input.shape)}")
    size = [
        (input.shape[2 + i] + 2 * offset[i] - per_tap[i] * (weight_shape[2 + i] - 1) - 1) // step[i] + 1
        for i in range(2)
    ]
    if size[0] < 1 or size[1] < 1:
        raise ValueError(f"input: the kernel does not fit into the padded image, got {tuple(input.shape)}")
    if isinstance(weight, PackedMaskedWeight) and weight.values.dim() == 4:
        output = torch.nn.functional.conv2d(input, weight.values, bias, step, offset, per_tap, groups)
        return _clamped(output, output_min, output_max)
    if isinstance(mask, MaskLayout) and input.is_cuda:
        form = cuda.form_in_training(input, mask.mask.numel(), mask.kept, blocks=False)
        mask = mask if form == "quads" else mask.mask
    if isinstance(mask, Tensor):
        assert isinstance(weight, Tensor)
        kept = torch.where(mask, weight, 0)
        output = torch.nn.functional.conv2d(input, kept, bias, step, offset, per_tap, groups)
        return _clamped(output, output_min, output_max)
    window = [*size, *weight_shape[2:], *step, -offset[0], -offset[1], *per_tap, 1, 1]
    return _apply(input, weight, mask, bias, channels, window, output_min, output_max)


def _apply(
    input: Tensor,
    weight: Tensor | PackedMaskedWeight,
    layout: MaskLayout | None,
    bias: Tensor | None,
    in_features: int,
    window: list[int],
    output_min: float | None,
    output_max: float | None,
) -> Tensor:
    limits = (None, None) if input.is_cuda else (output_min, output_max)  # the GPU's kernels do not clamp
    if isinstance(weight, PackedMaskedWeight):
        shape = [weight.shape[0], in_features, weight.block]
        output = MATMUL_PACKED(
            input, weight.values, bias, weight.quads, weight.columns, weight.dense, shape, window, *limits
        )
    else:
        assert layout is not None
        shape = [weight.shape[0], in_features, layout.block, layout.transposed_block, 0]
        output = _matmul(
            input, weight, bias, layout.values, layout.transposed_values, *layout[1:7], shape, window, *limits
        )
    return cast(Tensor, _clamped(output, output_min, output_max) if input.is_cuda else output)


def _matmul(
    input: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor | None, transposed: Tensor | None, *rest: Any
) -> Tensor:
    """The operation for a weight whose values are in order, or still to be gathered."""
    if values is None:
        return cast(Tensor, MATMUL(input, weight, bias, *rest))
    return cast(Tensor, MATMUL_ORDERED(input, weight, bias, values, transposed, *rest))


def _multiplied_dtype(input: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(input.device.type) if is_lowered(input) else input.dtype


def _clamped(output: Tensor, output_min: float | None, output_max: float | None) -> Tensor:
    return output if output_min is None and output_max is None else output.clamp(output_min, output_max)


# --- the operations -------------------------------------------------------------------------------------------------
# shape: (outputs, input features or channels, block, block of the transposed structure, whether the structure is itself
# the transposed one, so that its rows do not lie side by side in the weight); window: see
# reference.windows, empty for a linear.


def _matmul_fake(input: Tensor, weight: Tensor, bias: Tensor | None, *structure: Any) -> Tensor:
    shape, window = structure[-4:-2]
    if not window:
        return input.new_empty((*input.shape[:-1], shape[0]))
    size = (input.shape[0], shape[0], window[0], window[1])
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=torch.channels_last)


def _weight_grad_fake(input: Tensor, grad: Tensor, *structure: Any) -> Tensor:
    return input.new_empty(structure[-1])


_STRUCTURE = (
    "Tensor quads, Tensor columns, Tensor source, "
    "Tensor transposed_quads, Tensor transposed_columns, Tensor transposed_source, int[] shape, SymInt[] window"
)
_LIMITS = "float? output_min, float? output_max"
MATMUL = registration.register(
    f"masked_matmul(Tensor input, Tensor weight, Tensor? bias, {_STRUCTURE}, {_LIMITS}) -> Tensor",
    reference=reference.masked_matmul,
    fallback="masked_matmul:masked_matmul",
    fake=_matmul_fake,
)
MATMUL_ORDERED = registration.register(
    "masked_matmul_ordered(Tensor input, Tensor weight, Tensor? bias, Tensor values, Tensor? transposed_values, "
    f"{_STRUCTURE}, {_LIMITS}) -> Tensor",
    reference=reference.masked_matmul_ordered,
    fallback="masked_matmul:masked_matmul_ordered",
    fake=_matmul_fake,
)
MATMUL_PACKED = registration.register(
    "masked_matmul_packed(Tensor input, Tensor values, Tensor? bias, Tensor quads, Tensor columns, Tensor? dense, "
    f"int[] shape, SymInt[] window, {_LIMITS}) -> Tensor",
    reference=reference.masked_matmul_packed,
    fallback="masked_matmul:masked_matmul_packed",
    fake=_matmul_fake,
)
WEIGHT_GRAD = registration.register(
    f"masked_matmul_weight_grad(Tensor input, Tensor grad, {_STRUCTURE}, int[] weight_shape) -> Tensor",
    reference=reference.masked_matmul_weight_grad,
    fallback="masked_matmul:masked_matmul_weight_grad",
    fake=_weight_grad_fake,
)


def _transpose(
    input: Tensor, structure: tuple[Tensor, ...], shape: list[int], window: list[Any]
) -> tuple[tuple[Tensor, ...], list[int], list[Any]]:
    """Structure, shape and window of the input gradient, whose output is of the size of `input`."""
    out, features, block, transposed_block, transposed = shape
    if window:
        taps, (step_y, step_x, offset_y, offset_x, tap_y, tap_x, divide_y, divide_x) = window[2:4], window[4:]
        window = [
            *input.shape[2:], *taps, divide_y, divide_x, -offset_y, -offset_x, -tap_y, -tap_x, step_y, step_x
        ]  # fmt: skip
    return (*structure[3:], *structure[:3]), [features, out, transposed_block, block, 1 - transposed], window


def _sum_rows(grad: Tensor, window: list[Any]) -> Tensor:
    return grad.sum((0, 2, 3) if window else tuple(range(grad.dim() - 1)))


def _matmul_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, *rest = inputs
    _ordered_setup(ctx, (input, weight, bias, None, None, *rest), output)


def _ordered_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, values, transposed, *structure, shape, window, output_min, output_max = inputs
    ctx.limits = (output_min, output_max)
    clamped = None if ctx.limits == (None, None) else output
    ctx.save_for_backward(input, weight, values, transposed, clamped, *structure)
    ctx.shape, ctx.window, ctx.has_bias = shape, window, bias is not None


def _inside(output: Tensor, output_min: float | None, output_max: float | None) -> Tensor:
    """Where the result was not clamped."""
    if output_min is None:
        return output < cast(float, output_max)
    above = output > output_min
    return above if output_max is None else above & (output < output_max)


def _matmul_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_gradients(ctx, grad), *(None,) * 10)


def _ordered_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_gradients(ctx, grad), *(None,) * 12)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of the input, the weight and the bias. The values are no variables: they are those of the weight."""
    input, weight, values, transposed_values, clamped, *structure = ctx.saved_tensors
    if clamped is not None:
        grad = torch.where(_inside(clamped, *ctx.limits), grad, 0)
    needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_input = grad_weight = grad_bias = None
    if needs_input:
        transposed, shape, window = _transpose(input, tuple(structure), ctx.shape, ctx.window)
        orders = (transposed_values, values)
        grad_input = _matmul(grad, weight, None, *orders, *transposed, shape, window, None, None)
    if needs_weight:
        grad_weight = WEIGHT_GRAD(input, grad, *structure, ctx.shape, ctx.window, list(weight.shape))
    if needs_bias and ctx.has_bias:
        grad_bias = _sum_rows(grad, ctx.window)
    return grad_input, grad_weight, grad_bias


def _weight_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, grad, *structure, shape, window, _ = inputs
    ctx.save_for_backward(input, grad, *structure)
    ctx.shape, ctx.window = shape, window


def _weight_grad_backward(ctx: Any, grad_weight: Tensor) -> tuple[Tensor | None, ...]:
    input, grad, *structure = ctx.saved_tensors
    grad_input = grad_grad = None
    if ctx.needs_input_grad[0]:
        transposed, shape, window = _transpose(input, tuple(structure), ctx.shape, ctx.window)
        grad_input = MATMUL(grad, grad_weight, None, *transposed, shape, window, None, None)
    if ctx.needs_input_grad[1]:
        grad_grad = MATMUL(input, grad_weight, None, *structure, ctx.shape, ctx.window, None, None)
    return (grad_input, grad_grad) + (None,) * 9


registration.register_autograd(MATMUL, _matmul_backward, _matmul_setup)
registration.register_autograd(MATMUL_ORDERED, _ordered_backward, _ordered_setup)
registration.register_autograd(WEIGHT_GRAD, _weight_grad_backward, _weight_grad_setup)


def _cast(dtype: torch.dtype, input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    if input.dtype == torch.float64:  # autocast leaves float64 alone, as it does in torch's own operations
        return (input, weight, bias, *rest)
    return (input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), *rest)


def _cast_ordered(
    dtype: torch.dtype, input: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, transposed: Tensor | None,
    *rest: Any,
) -> tuple[Any, ...]:  # fmt: skip
    input, weight, bias = _cast(dtype, input, weight, bias)
    transposed = None if transposed is None else transposed.to(weight.dtype)
    return (input, weight, bias, values.to(weight.dtype), transposed, *rest)


def _cast_packed(
    dtype: torch.dtype, input: Tensor, values: Tensor, bias: Tensor | None, quads: Tensor, columns: Tensor,
    dense: Tensor | None, *rest: Any,
) -> tuple[Any, ...]:  # fmt: skip
    input, values, bias = _cast(dtype, input, values, bias)
    return (input, values, bias, quads, columns, None if dense is None else dense.to(values.dtype), *rest)


registration.register_autocast(MATMUL, _cast)
registration.register_autocast(MATMUL_ORDERED, _cast_ordered)
registration.register_autocast(MATMUL_PACKED, _cast_packed)
