"""Measures which block of columns is the fastest per density, and prints the table for src/imgopt_fast/_mask_blocks.py.

    python benchmarks/tune_masked_matmul.py          # the active instruction set; IMGOPT_ISA=avx2 for another

Every density runs the packed forward of a 1024 × 1024 layer at batch 256 on one thread; the times of the candidates
are taken in turn, and the least of each counts, so that a busy machine changes little.
"""

import argparse
import time
from itertools import groupby

import torch

from imgopt_fast import _native
from imgopt_fast.ops.masked_matmul import PackedMaskedWeight, layout, masked_matmul, pack_masked_weight

CANDIDATES = (64, 128, 192, 256, 0)  # 0 stands for one block
DENSITIES = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 0.85, 1.0)


def packed(weight: torch.Tensor, mask: torch.Tensor, block: int) -> PackedMaskedWeight:
    choose = layout.block_columns
    layout.block_columns = lambda rows, columns, count, isa: block or columns
    try:
        return pack_masked_weight(weight, mask)
    finally:
        layout.block_columns = choose


def fastest(density: float, rounds: int) -> int:
    weight, x = torch.randn(1024, 1024), torch.randn(256, 1024)
    mask = torch.rand(1024, 1024) < density
    forms = {block: packed(weight, mask, block) for block in CANDIDATES}
    best = dict.fromkeys(CANDIDATES, float("inf"))
    for _ in range(rounds):
        for block, form in forms.items():
            start = time.perf_counter()
            masked_matmul(x, form)
            best[block] = min(best[block], time.perf_counter() - start)
    report = "  ".join(f"{block or 'one'}: {seconds * 1e6:.0f}" for block, seconds in best.items())
    print(f"# density {density:.2f}, microseconds by block: {report}")
    return min(best, key=lambda block: best[block])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="runs of every candidate (default 40)")
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with torch.inference_mode():
        choices = [(density, fastest(density, rounds)) for density in DENSITIES]
    runs = [list(group)[-1] for _, group in groupby(choices, key=lambda choice: choice[1])]
    print(f'    "{_native.active_isa()}": {tuple(runs)},')


if __name__ == "__main__":
    main()
