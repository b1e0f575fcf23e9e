"""
Kernels of imgopt_fast on NumPy arrays, and control of the instruction set that serves them.
"""
from __future__ import annotations
import collections.abc
import numpy
import numpy.typing
import typing
__all__: list[str] = ['active_isa', 'affine_warp', 'int8_conv2d', 'int8_conv2d_pack', 'int8_conv2d_packed_bytes', 'int8_conv2d_prepare', 'int8_products', 'mask_structure', 'masked_matmul', 'measure_rates', 'philox_uniforms', 'set_isa', 'supported_isas']
def active_isa() -> str:
    """
    Name of the instruction set in use.
    """
def affine_warp(images: numpy.ndarray, output: numpy.ndarray, matrix: numpy.typing.NDArray[numpy.float64], interpolation: str, padding_mode: str, fill: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex], antialias: bool, table: numpy.typing.NDArray[numpy.uint8] | None, color_matrix: numpy.typing.NDArray[numpy.float64] | None, mean: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex], std: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex]) -> None:
    """
    Warp (N, C, H, W) views into `output`; imgopt_fast.numpy.affine_warp has the checks.
    """
def int8_conv2d(input: numpy.ndarray, packed: numpy.typing.NDArray[numpy.uint8], prepared: numpy.typing.NDArray[numpy.uint8], residual: numpy.ndarray | None) -> numpy.ndarray:
    """
    Quantized convolution of a (N, H, W, C) array; see imgopt_fast.numpy.int8_conv2d.
    """
def int8_conv2d_pack(weight: numpy.typing.NDArray[numpy.int8], groups: typing.SupportsInt | typing.SupportsIndex, packed: numpy.typing.NDArray[numpy.uint8]) -> None:
    """
    Write the packed weight into `packed`.
    """
def int8_conv2d_packed_bytes(shape: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], groups: typing.SupportsInt | typing.SupportsIndex) -> int:
    """
    Bytes of a packed weight of this shape for the active instruction set, header included.
    """
def int8_conv2d_prepare(shape: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], groups: typing.SupportsInt | typing.SupportsIndex, packed: numpy.typing.NDArray[numpy.uint8], bias: numpy.typing.NDArray[numpy.int32], weight_scale: numpy.typing.NDArray[numpy.float32], input_signed: bool, residual_signed: bool | None, output_signed: bool, input_scale: typing.SupportsFloat | typing.SupportsIndex, input_zero_point: typing.SupportsInt | typing.SupportsIndex, output_scale: typing.SupportsFloat | typing.SupportsIndex | None, output_zero_point: typing.SupportsInt | typing.SupportsIndex, stride: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], padding: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], dilation: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], output_min: typing.SupportsFloat | typing.SupportsIndex | None, output_max: typing.SupportsFloat | typing.SupportsIndex | None, residual_scale: typing.SupportsFloat | typing.SupportsIndex, residual_zero_point: typing.SupportsInt | typing.SupportsIndex, shift: bool) -> numpy.ndarray | None:
    """
    All of a call but its images, as bytes; None where `packed` is not for the active instruction set.
    """
def int8_products(rounds: typing.SupportsInt | typing.SupportsIndex) -> int:
    """
    The loop behind `int8_dot` of measure_rates, to be timed in turns with what its rate is compared with; returns how many multiply-adds it did.
    """
def mask_structure(mask: typing.Annotated[numpy.typing.ArrayLike, numpy.bool], block: typing.SupportsInt | typing.SupportsIndex) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """
    Row quads of a mask (rows, columns): (quads, columns, position).
    """
def masked_matmul(input: numpy.ndarray, values: numpy.ndarray, bias: numpy.ndarray | None, quads: numpy.typing.NDArray[numpy.int32], columns: numpy.ndarray, block: typing.SupportsInt | typing.SupportsIndex, output: numpy.ndarray) -> None:
    """
    Product into `output`; imgopt_fast.numpy.masked_matmul has the checks.
    """
def measure_rates(l2_bytes: typing.SupportsInt | typing.SupportsIndex, l3_bytes: typing.SupportsInt | typing.SupportsIndex) -> dict[str, float]:
    """
    Rates of one core under the active instruction set, measured now: `fma` (flop/s) and `int8_dot` (op/s), a multiply-add being two; `read_*` and `copy_*` (bytes/s; a copy counts what it reads and what it writes) in buffers that fit L2, L3 or neither, for caches of the given sizes.
    """
def philox_uniforms(seed: typing.SupportsInt | typing.SupportsIndex, epoch: typing.SupportsInt | typing.SupportsIndex, index: numpy.typing.NDArray[numpy.uint64], blocks: numpy.typing.NDArray[numpy.uint64]) -> numpy.typing.NDArray[numpy.float64]:
    """
    Numbers in [0, 1), (4 * blocks, samples); see imgopt_fast.augment.philox.
    """
def set_isa(name: str) -> None:
    """
    Use the named instruction set from now on, in this module and in the torch operations.
    """
def supported_isas() -> list[str]:
    """
    Instruction sets of this build that the processor has, the best one last.
    """
