"""Which block of columns a structure is cut into: a committed table, so that results never depend on timing.

The table is measured by `benchmarks/tune_masked_matmul.py`, which prints it. AVX-512: 1024 × 1024, batch 256, one
Zen 5 core. AVX2's differences above 10 % density are within the noise. The plain-C kernel does not depend on it.
"""

# Density of the mask up to which a block size is the fastest, per instruction set (None: no compiled kernels); 0
# stands for one block.
BLOCKS: dict[str | None, tuple[tuple[float, int], ...]] = {
    None: ((1.0, 256),),
    "scalar": ((1.0, 256),),
    "avx2": ((0.1, 0), (1.0, 256)),
    "avxvnni": ((0.1, 0), (1.0, 256)),
    "avx512": ((0.02, 0), (0.05, 256), (0.07, 192), (0.1, 128), (0.2, 192), (0.85, 128), (1.0, 256)),
    "neon": ((0.1, 0), (1.0, 256)),
    "cuda": ((1.0, 128),),  # what shared memory holds beside the sums, see ops/masked_matmul/cuda.py
}


def block_columns(rows: int, columns: int, count: int, isa: str | None) -> int:
    """Columns per block of a structure with `count` entries in `rows` × `columns`; `isa` None without kernels."""
    density = count / max(1, rows * columns)
    block = next(size for limit, size in BLOCKS[isa] if density <= limit)
    return max(1, min(block or columns, columns))
