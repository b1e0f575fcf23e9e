"""Which block of columns a structure is cut into: a committed table, so that results never depend on timing.

The table is measured by `benchmarks/tune_masked_matmul.py`, which prints it: 1024 × 1024, batch 256, one Zen 5 core.
What it weighs is cache against overhead: a block of activations that stays in the first-level cache while all rows
pass over it (128 columns of 64 samples), or fewer, longer runs. Blocks of four rows read an activation for four
multiply-adds, which the second-level cache can feed, so they prefer the runs. A block of 1024 columns is the largest:
its activations are a quarter of a common second-level cache. The plain-C kernel does not depend on the table.
"""

import numpy as np
from numpy.typing import NDArray

Table = tuple[tuple[float, int], ...]

# Density of the mask up to which a block size is the fastest, per instruction set (None: no compiled kernels).
BLOCKS: dict[str | None, Table] = {
    None: ((1.0, 256),),
    "scalar": ((1.0, 256),),
    "avx2": ((0.1, 1024), (1.0, 256)),
    "avxvnni": ((0.1, 1024), (1.0, 256)),
    "avx512": ((0.02, 1024), (0.07, 256), (1.0, 128)),
    "neon": ((0.1, 1024), (1.0, 256)),
    "cuda": ((1.0, 128),),  # what shared memory holds beside the sums, see ops/masked_matmul/cuda.py
}
# The same where the rows come in blocks of four that are set alike.
BLOCKS_OF_FOUR: dict[str | None, Table] = BLOCKS | {"avx512": ((0.3, 1024), (0.6, 256), (1.0, 128))}


def block_columns(mask: NDArray[np.bool_], isa: str | None) -> int:
    """Columns per block of the structure of `mask` (rows, columns); `isa` None without kernels."""
    table = (BLOCKS_OF_FOUR if rows_in_fours(mask) else BLOCKS)[isa]
    density = np.count_nonzero(mask) / max(1, mask.size)
    columns = int(mask.shape[1])
    return max(1, min(columns, next(size for limit, size in table if density <= limit)))


def rows_in_fours(mask: NDArray[np.bool_]) -> bool:
    """Whether rows 4i to 4i + 3 are set alike, for every i."""
    if len(mask) % 4:
        return False
    first = mask[::4]
    return all(np.array_equal(first, mask[i::4]) for i in range(1, 4))
