"""How a mask is served: what structure it has, and the committed tables, so that results never depend on timing.

The tables are measured by `benchmarks/tune_masked_matmul.py`, which prints them: 1024 × 1024, batch 256, one Zen 5
core, for AVX-512 and for AVX2 forced. No aarch64 machine was at hand: NEON, whose panels are those of AVX2, has its
rows. What the block of columns weighs is cache against overhead: a block of activations that stays in the first-level
cache while all rows pass over it (128 columns of 64 samples), or fewer, longer runs. Blocks of rows read an activation
for four multiply-adds, which the second-level cache can feed, so they prefer the runs. A block of 1024 columns is the
largest: its activations are a quarter of a common second-level cache. The plain-C kernel does not depend on the table.
"""

import math

import numpy as np
from numpy.typing import NDArray

Table = tuple[tuple[float, int], ...]

AVX2_BLOCKS: Table = ((0.05, 1024), (0.1, 512), (0.85, 256), (1.0, 128))
AVX2_BLOCKS_OF_FOUR: Table = ((0.85, 1024), (1.0, 128))

# Density of the mask up to which a block size is the fastest, per instruction set (None: no compiled kernels).
BLOCKS: dict[str | None, Table] = {
    None: ((1.0, 256),),
    "scalar": ((1.0, 256),),
    "avx2": AVX2_BLOCKS,
    "avxvnni": AVX2_BLOCKS,
    "avx512": ((0.02, 1024), (0.07, 256), (0.2, 192), (1.0, 128)),
    "neon": AVX2_BLOCKS,
    "cuda": ((1.0, 128),),  # what shared memory holds beside the sums, see ops/masked_matmul/cuda.py
}
# The same where the rows come in blocks of four that are set alike.
BLOCKS_OF_FOUR: dict[str | None, Table] = BLOCKS | {
    "avx2": AVX2_BLOCKS_OF_FOUR,
    "avxvnni": AVX2_BLOCKS_OF_FOUR,
    "avx512": ((0.2, 1024), (0.5, 256), (0.85, 192), (1.0, 1024)),
    "neon": AVX2_BLOCKS_OF_FOUR,
}


# Density from which a linear keeps a dense copy beside the packed values, for up to four samples: with so few, finding
# the activation of a weight costs more than multiplying by the zeros between. inf: nowhere.
DENSE_COPY: dict[str | None, float] = {
    None: math.inf,
    "scalar": math.inf,
    "avx2": 0.3,
    "avxvnni": 0.3,
    "avx512": 0.55,
    "neon": 0.3,
    "cuda": math.inf,
}
# Density from which a bfloat16 linear is the dense product of torch instead, where the processor has instructions for
# it: they add the products of two neighbouring columns at a time, which a sparse product has no use for. There is no
# such limit for float16, whose dense product is slower everywhere.
DENSE_BFLOAT16: dict[str | None, float] = {
    None: math.inf,
    "scalar": math.inf,
    "avx2": 0.2,
    "avxvnni": 0.2,
    "avx512": 0.4,
    "neon": math.inf,
    "cuda": math.inf,
}

# Density up to which a 3 × 3 convolution trains faster on the sparse kernels than on torch's dense ones, forward and
# both gradients, by the fewer of its input and output channels per group: the row of the largest number that is not
# above it. Few channels do not pay for finding the windows. In bfloat16 where the processor has instructions for it.
SPARSE_TRAINING: dict[tuple[str | None, str], tuple[tuple[int, float], ...]] = {
    ("avx512", "float32"): ((0, 0.0), (16, 0.4), (32, 0.5), (128, 0.6)),
    ("avx512", "bfloat16"): ((0, 0.0), (64, 0.1), (128, 0.3), (512, 0.4)),
}

# The same for the packed weight of a convolution at inference, in float32.
AVX2_SPARSE_CONVOLUTIONS = ((0, 0.0), (32, 0.1), (64, 0.2), (128, 0.3))
SPARSE_CONVOLUTIONS: dict[str | None, tuple[tuple[int, float], ...]] = {
    "avx2": AVX2_SPARSE_CONVOLUTIONS,
    "avxvnni": AVX2_SPARSE_CONVOLUTIONS,
    "avx512": ((0, 0.0), (32, 0.4), (64, 0.6), (128, 0.7)),
}

ALWAYS = ((0, 1.0),)

# What a mask is recognised to consist of, by the number that a layout holds: blocks of rows x columns that are set as a
# whole or not at all, the largest first, and so many of four neighbours. 0 is none of them.
STRUCTURES = ("free", "dense", "16x16", "4x4", "16x1", "8x1", "4x1", "1:4", "2:4")


def structure_of(mask: NDArray[np.bool_]) -> int:
    """What a mask (rows, columns) consists of: the place of its name in STRUCTURES.

    Every kernel of row quads serves all of them: a step with one column is four rows of a block, and where N of M
    neighbours are kept all rows of a quad are equally long, so that none is padded. The structure decides about the
    block of columns and about what a report says.
    """
    if not mask.any():
        return 0
    return next((i for i, name in enumerate(STRUCTURES) if i > 0 and _is(mask, name)), 0)


def _is(mask: NDArray[np.bool_], name: str) -> bool:
    if name == "dense":
        return bool(mask.all())
    if "x" in name:
        rows, columns = map(int, name.split("x"))
        return consists_of(mask, rows, columns)
    kept, of = map(int, name.split(":"))
    if mask.shape[1] < of:
        return False
    full = _counts_alike(mask[:, : mask.shape[1] // of * of], kept, of)
    rest = mask.shape[1] % of
    return full and (rest == 0 or _counts_alike(mask[:, -rest:], min(kept, rest), rest))


def _counts_alike(mask: NDArray[np.bool_], kept: int, of: int) -> bool:
    """Whether `kept` of every `of` neighbours are set."""
    groups = mask.reshape(len(mask), -1, of)
    return all(bool((part.sum(2) == kept).all()) for part in (groups[:1], groups))  # most masks fail in their first row


def consists_of(mask: NDArray[np.bool_], rows: int, columns: int) -> bool:
    """Whether a mask is made of aligned blocks, the last ones cut off, that are set as a whole or not at all."""
    out, inputs = mask.shape
    if out < rows or inputs < columns:
        return False
    if out % rows or inputs % columns:
        mask = np.pad(mask, ((0, -out % rows), (0, -inputs % columns)), mode="edge")
    blocks = mask.reshape(mask.shape[0] // rows, rows, mask.shape[1] // columns, columns)
    return all(bool((part == part[:, :1, :, :1]).all()) for part in (blocks[:1], blocks))  # most fail in the first row


def block_columns(mask: NDArray[np.bool_], isa: str | None) -> int:
    """Columns per block of the structure of `mask` (rows, columns); `isa` None without kernels."""
    table = (BLOCKS_OF_FOUR if consists_of(mask, 4, 1) else BLOCKS)[isa]
    density = np.count_nonzero(mask) / max(1, mask.size)
    columns = int(mask.shape[1])
    return max(1, min(columns, next(size for limit, size in table if density <= limit)))


def keeps_dense_copy(density: float, isa: str | None) -> bool:
    """Whether a packed linear of this density holds its dense weight too."""
    return density >= DENSE_COPY[isa]


def dense_in_bfloat16(density: float, isa: str | None) -> bool:
    """Whether torch's dense product serves a bfloat16 linear of this density, on a processor with bfloat16 products."""
    return density >= DENSE_BFLOAT16[isa]


def trains_sparse(channels: int, density: float, isa: str | None, dtype: str) -> bool:
    """Whether a convolution of so many channels and this density trains faster on the sparse kernels than dense.

    Without a table for the instruction set and the dtype the sparse kernels serve everything.
    """
    return _up_to(SPARSE_TRAINING.get((isa, dtype), ALWAYS), channels, density)


def infers_sparse(channels: int, density: float, isa: str | None) -> bool:
    """The same for the packed weight of a convolution at inference, in float32."""
    return _up_to(SPARSE_CONVOLUTIONS.get(isa, ALWAYS), channels, density)


def _up_to(table: tuple[tuple[int, float], ...], channels: int, density: float) -> bool:
    return density <= next(limit for least, limit in reversed(table) if channels >= least)
