"""The int8 form of masked_matmul: exact int32 sums over the kept weights, requantized as `int8_conv2d` does it.

On the CPU the structure is that of groups of four adjacent columns, of which one instruction adds the four products to
an int32; a group exists where one of its weights does. At 95 % sparsity, at random, 19 % of the groups do, and each
costs what a single float32 weight would.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from imgopt_fast._arguments import check_clamp, check_scale, check_zero_point, described
from imgopt_fast.ops import registration
from imgopt_fast.ops.int8_conv2d import pack_int8_weight
from imgopt_fast.ops.int8_conv2d.reference import INTEGER_RANGE, clamp_range, clamp_real
from imgopt_fast.ops.masked_matmul import reference
from imgopt_fast.ops.masked_matmul.layout import pack_values

LARGEST_BLOCK = 256  # groups, whose numbers are bytes; on CUDA columns
GROUP = 4  # Int8MaskedMatmul::kGroup of csrc/masked_matmul/contract.h


class PackedInt8MaskedWeight(NamedTuple):
    """A pruned int8 linear, ready for `int8_masked_matmul`. Made by `pack_int8_masked_weight`."""

    values: Tensor  # int8, 4 times `group` per step of the structure that layout.py describes
    quads: Tensor
    columns: Tensor
    bias: Tensor  # int32 (O,), at scale input_scale * weight_scale[o]
    weight_scale: Tensor  # float32 (O,)
    weight_sum: Tensor  # int32 (O,), of the kept weights
    input_scale: float
    input_zero_point: int
    shape: tuple[int, ...]
    block: int
    group: int  # columns that a value of the structure stands for: 4, on CUDA 1


def pack_int8_masked_weight(
    weight: Tensor,
    mask: Tensor,
    weight_scale: float | Tensor,
    bias: Tensor | None = None,
    *,
    input_scale: float,
    input_zero_point: int = 0,
) -> PackedInt8MaskedWeight:
    """Check a pruned linear layer and bring its kept weights into the order of the kernel. Eager only.

    Args:
        weight: int8 (O, K), symmetric: real weight = weight * weight_scale[o].
        mask: bool (O, K): the weights that exist.
        weight_scale, bias, input_scale, input_zero_point: as for `pack_int8_weight`, whose errors are raised.
    """
    if not isinstance(weight, Tensor) or weight.dtype != torch.int8 or weight.dim() != 2:
        raise TypeError(f"weight: expected int8 (O, K), got {described(weight, Tensor)}")
    group = 1 if weight.is_cuda else GROUP
    if mask.shape != weight.shape:
        raise ValueError(f"mask: expected the weight's shape {tuple(weight.shape)}, got {tuple(mask.shape)}")
    kept = torch.where(mask, weight, 0)
    values, quads, columns, block = _pack_groups(kept, mask, group)
    layer = pack_int8_weight(
        kept[:, :, None, None], weight_scale, bias, input_scale=input_scale, input_zero_point=input_zero_point
    )
    return PackedInt8MaskedWeight(
        values, quads, columns, layer.bias, layer.weight_scale, kept.sum(1, dtype=torch.int32), layer.input_scale,
        layer.input_zero_point, tuple(weight.shape), block, group,
    )  # fmt: skip


def _pack_groups(weight: Tensor, mask: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """(values, quads, columns, block), a value of the structure being `group` adjacent weights."""
    if group == 1:
        return pack_values(weight, mask, groups=1, largest_block=LARGEST_BLOCK)
    padding = (0, -weight.shape[1] % group)
    words = torch.nn.functional.pad(weight, padding).view(torch.int32)
    exists = torch.nn.functional.pad(mask, padding).unflatten(1, (-1, group)).any(2)
    values, quads, at, block = pack_values(words, exists, groups=1, largest_block=LARGEST_BLOCK)
    return values.view(torch.int8), quads, at, block


def int8_masked_matmul(
    input: Tensor,
    weight: PackedInt8MaskedWeight,
    *,
    output_scale: float | None = None,
    output_zero_point: int = 0,
    output_dtype: torch.dtype | None = None,
    output_min: float | None = None,
    output_max: float | None = None,
) -> Tensor:
    """Pruned quantized linear layer (..., K) -> (..., O): exact sums over the kept weights.

    `input` is uint8 or int8, real value = (input - input_zero_point) * input_scale. The other arguments, the
    arithmetic after the sum and the errors are those of `int8_conv2d` with `requantize="float"`; the result is the
    same, bit for bit, as that of `int8_conv2d` on the dense weight with zeros.
    """
    if not isinstance(weight, PackedInt8MaskedWeight):
        raise TypeError(f"weight: expected a PackedInt8MaskedWeight, got {type(weight).__name__}")
    if not isinstance(input, Tensor) or input.dtype not in INTEGER_RANGE:
        raise TypeError(f"input: expected uint8 or int8, got {described(input, Tensor)}")
    if input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        raise ValueError(f"input: expected (..., {weight.shape[1]}), got {tuple(input.shape)}")
    if input.device != weight.values.device:
        raise ValueError(f"input: expected the weight's device {weight.values.device}, got {input.device}")
    low, high = INTEGER_RANGE[input.dtype]
    if not low <= weight.input_zero_point <= high:
        raise ValueError(f"input: its dtype {input.dtype} cannot have the zero point {weight.input_zero_point}")
    if output_scale is None:
        if output_zero_point:
            raise ValueError(f"output_zero_point: expected 0 without output_scale, got {output_zero_point}")
        dtype = output_dtype or torch.float32
        if dtype != torch.float32:
            raise TypeError(f"output_dtype: expected float32 without output_scale, got {dtype}")
    else:
        dtype = output_dtype or input.dtype
        if dtype not in INTEGER_RANGE:
            raise TypeError(f"output_dtype: expected uint8 or int8 with output_scale, got {dtype}")
        check_scale("output_scale", output_scale)
        output_zero_point = check_zero_point("output_zero_point", output_zero_point, *INTEGER_RANGE[dtype])
    check_clamp(output_min, output_max)
    output = _op(
        input, weight.values, weight.bias, weight.weight_scale, weight.weight_sum, weight.quads, weight.columns,
        [*weight.shape, weight.block, weight.group], weight.input_scale, weight.input_zero_point, output_scale,
        output_zero_point, dtype, output_min, output_max,
    )  # fmt: skip
    return cast(Tensor, output)


def _reference(
    input: Tensor, values: Tensor, bias: Tensor, weight_scale: Tensor, weight_sum: Tensor, quads: Tensor,
    columns: Tensor, shape: list[int], input_scale: float, input_zero_point: int, output_scale: float | None,
    output_zero_point: int, output_dtype: torch.dtype, output_min: float | None, output_max: float | None,
) -> Tensor:  # fmt: skip
    """The sums in float64, where all of them are exact; the rest as int8_conv2d/reference.py has it."""
    rows, inputs, block, group = shape
    words = values if group == 1 else values.view(torch.int32)
    dense = reference.dense_weight(words, quads, columns, rows, -(-inputs // group), block).contiguous()
    dense = dense.view(torch.int8)[:, :inputs].double()
    sums = torch.matmul(input.double() - input_zero_point, dense.t()) + bias.double()
    scale = input_scale * weight_scale.double()
    return requantize(sums, scale, output_scale, output_zero_point, output_dtype, output_min, output_max)


def requantize(
    sums: Tensor,
    scale: Tensor,
    output_scale: float | None,
    output_zero_point: int,
    output_dtype: torch.dtype,
    output_min: float | None,
    output_max: float | None,
) -> Tensor:
    """Exact sums with bias (..., O), float64, at `scale` (O,), as the output."""
    sums = sums.to(torch.float32)
    if output_scale is None:
        return clamp_real(sums * scale.to(torch.float32), output_min, output_max)
    low, high = clamp_range(output_dtype, output_scale, output_zero_point, output_min, output_max)
    steps = torch.round((sums * (scale / output_scale).to(torch.float32)).clamp(low, high))
    return (steps + output_zero_point).to(output_dtype)


def _fake(input: Tensor, values: Tensor, bias: Tensor, *rest: Any) -> Tensor:
    return input.new_empty((*input.shape[:-1], bias.shape[0]), dtype=rest[9])


_op = registration.register(
    "int8_masked_matmul(Tensor input, Tensor values, Tensor bias, Tensor weight_scale, Tensor weight_sum, "
    "Tensor quads, Tensor columns, int[] shape, float input_scale, int input_zero_point, float? output_scale, "
    "int output_zero_point, ScalarType output_dtype, float? output_min, float? output_max) -> Tensor",
    reference=_reference,
    fallback="masked_matmul:int8_masked_matmul",
    fake=_fake,
)
