"""`masked_matmul` on NumPy arrays, and the packed weight that it takes."""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from imgopt_fast import _native
from imgopt_fast._arguments import described
from imgopt_fast._mask_blocks import block_columns

_REALS = ("float16", "float32", "float64")


class PackedMaskedWeight(NamedTuple):
    """`imgopt_fast.PackedMaskedWeight` of a linear, as arrays. Made by `pack_masked_weight`."""

    values: NDArray[Any]
    quads: NDArray[np.int32]
    columns: NDArray[Any]
    shape: tuple[int, int]
    block: int


def pack_masked_weight(weight: NDArray[Any], mask: NDArray[np.bool_]) -> PackedMaskedWeight:
    """`imgopt_fast.pack_masked_weight` for arrays: the kept values of `weight`, ready for `masked_matmul`.

    `weight` (O, K) is float16, float32 or float64, `mask` bool of its shape. Raises TypeError and ValueError for
    anything else.
    """
    _real("weight", weight)
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
        raise TypeError(f"mask: expected a bool array, got {described(mask, np.ndarray)}")
    if weight.ndim != 2:
        raise ValueError(f"weight: expected (O, K), got shape {weight.shape}")
    if mask.shape != weight.shape:
        raise ValueError(f"mask: expected the weight's shape {weight.shape}, got {mask.shape}")
    rows, width = weight.shape
    block = block_columns(mask, _native.active_isa())
    if _native.backend() == "native":
        core = _native.core()
        assert core is not None
        quads, columns, position = core.mask_structure(mask, block)
    else:
        from imgopt_fast.ops.masked_matmul.reference import structure

        quads, columns, position = structure(mask, block)
    values = np.zeros(len(position), weight.dtype)
    real = position >= 0
    values[real] = weight.reshape(-1)[position[real]]
    return PackedMaskedWeight(values, quads, columns, (rows, width), block)


def masked_matmul(
    input: NDArray[Any],
    weight: NDArray[Any] | PackedMaskedWeight,
    mask: NDArray[np.bool_] | None = None,
    bias: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """`input @ where(mask, weight, 0).T + bias` for the kept weights only: `imgopt_fast.masked_matmul` for arrays.

    `input` (..., K), `weight` (O, K) and `bias` (O,) share a dtype of float16 (summed in float32), float32 or
    float64. A weight that is used again is better packed once, by `pack_masked_weight`; `mask` is then left out.
    Raises TypeError and ValueError for anything else.
    """
    _real("input", input)
    if isinstance(weight, PackedMaskedWeight):
        if mask is not None:
            raise ValueError("mask: expected None with a packed weight, which holds its own")
        packed = weight
    elif mask is None:
        raise TypeError("mask: expected a bool array, got None")
    else:
        packed = pack_masked_weight(weight, mask)
    rows, width = packed.shape
    if input.ndim == 0 or input.shape[-1] != width:
        raise ValueError(f"input: expected (..., {width}) for weight {packed.shape}, got {input.shape}")
    if packed.values.dtype != input.dtype:
        raise TypeError(f"weight: expected the input's dtype {input.dtype}, got {packed.values.dtype}")
    if bias is not None:
        _real("bias", bias)
        if bias.dtype != input.dtype:
            raise TypeError(f"bias: expected the input's dtype {input.dtype}, got {bias.dtype}")
        if bias.shape != (rows,):
            raise ValueError(f"bias: expected shape ({rows},), got {bias.shape}")
    if _native.backend() != "native":
        return _masked_matmul_by_torch(input, packed, bias)
    core = _native.core()
    assert core is not None
    output = np.empty((*input.shape[:-1], rows), input.dtype)
    samples = math.prod(input.shape[:-1])
    values = packed.values.astype(np.float64 if input.dtype == np.float64 else np.float32, copy=False)
    offsets = None if bias is None else np.ascontiguousarray(bias)
    core.masked_matmul(
        np.ascontiguousarray(input).reshape(samples, width), values, offsets,
        packed.quads, packed.columns, packed.block, output.reshape(samples, rows),
    )  # fmt: skip
    return output


def _real(name: str, array: NDArray[Any]) -> None:
    if not isinstance(array, np.ndarray) or array.dtype.name not in _REALS or not array.dtype.isnative:
        raise TypeError(f"{name}: expected a float16, float32 or float64 array, got {described(array, np.ndarray)}")


def _masked_matmul_by_torch(input: NDArray[Any], weight: PackedMaskedWeight, bias: NDArray[Any] | None) -> NDArray[Any]:
    import torch

    from imgopt_fast.ops import masked_matmul as op

    packed = op.PackedMaskedWeight(
        torch.from_numpy(weight.values), torch.from_numpy(weight.quads), torch.from_numpy(weight.columns), weight.shape,
        weight.block, 0, 1,
    )  # fmt: skip
    result = op.masked_matmul(
        torch.from_numpy(np.ascontiguousarray(input)), packed, None,
        None if bias is None else torch.from_numpy(np.ascontiguousarray(bias)),
    )  # fmt: skip
    found: NDArray[Any] = result.numpy()
    return found
