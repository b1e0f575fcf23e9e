"""The three operations on NumPy arrays, images as (N, H, W, C) or (H, W, C), without torch where the kernels are there.

What torch's dispatcher does for tensors, pybind11's `_core` does here; the GIL is released while a kernel runs.
"""

from imgopt_fast import _native
from imgopt_fast.numpy.affine_warp import affine_warp
from imgopt_fast.numpy.int8_conv2d import PackedInt8Weight, int8_conv2d, pack_int8_weight
from imgopt_fast.numpy.masked_matmul import PackedMaskedWeight, masked_matmul, pack_masked_weight

__all__ = [
    "PackedInt8Weight",
    "PackedMaskedWeight",
    "affine_warp",
    "int8_conv2d",
    "masked_matmul",
    "pack_int8_weight",
    "pack_masked_weight",
]

_native.backend()  # a wrong IMGOPT_ISA or IMGOPT_BACKEND is an error at import, not in the first call
