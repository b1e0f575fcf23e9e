"""Which block of columns a structure is cut into: a committed table, so that results never depend on timing.

The table is measured by `benchmarks/tune_masked_matmul.py`, which prints it.
"""

# Density of the mask up to which a block size is the fastest, per instruction set; 0 stands for one block.
BLOCKS: dict[str, tuple[tuple[float, int], ...]] = {
    "scalar": ((0.04, 0), (1.0, 256)),
    "avx2": ((0.04, 0), (1.0, 256)),
    "avx512": ((0.04, 0), (0.7, 128), (1.0, 256)),
    "neon": ((0.04, 0), (1.0, 256)),
}


def block_columns(rows: int, columns: int, count: int, isa: str | None) -> int:
    """Columns per block of a structure with `count` entries in `rows` × `columns`; `isa` None without kernels."""
    density = count / max(1, rows * columns)
    known = {None: "scalar", "avxvnni": "avx2"}.get(isa, isa)
    assert known is not None
    block = next(size for limit, size in BLOCKS[known] if density <= limit)
    return max(1, min(block or columns, columns))
