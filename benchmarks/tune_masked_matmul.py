"""Measures which block of columns is fastest per density, and prints the tables of src/imgopt_fast/_mask_blocks.py.

    python benchmarks/tune_masked_matmul.py          # the active instruction set; IMGOPT_ISA=avx2 for another

Every density runs the packed forward of a 1024 × 1024 layer at batch 256 on one thread, with a uniform mask and with
one of blocks of four rows; the times of the candidates are taken in turn, and the least of each counts, so that a busy
machine changes little. A candidate that gains less than 2 % over that of the density before is not worth a line.
"""

import argparse
import time
from itertools import groupby
from unittest import mock

import torch

from imgopt_fast import _native
from imgopt_fast.ops.masked_matmul import PackedMaskedWeight, layout, masked_matmul, pack_masked_weight

CANDIDATES = (64, 128, 192, 256, 1024)
DENSITIES = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 0.85, 1.0)
WORTH_A_LINE = 0.98


def packed(weight: torch.Tensor, mask: torch.Tensor, block: int) -> PackedMaskedWeight:
    with mock.patch.object(layout, "block_columns", return_value=block):
        return pack_masked_weight(weight, mask)


def times(mask: torch.Tensor, rounds: int) -> dict[int, float]:
    weight, x = torch.randn(1024, 1024), torch.randn(256, 1024)
    forms = {block: packed(weight, mask, block) for block in CANDIDATES}
    best = dict.fromkeys(CANDIDATES, float("inf"))
    for _ in range(rounds):
        for block, form in forms.items():
            start = time.perf_counter()
            masked_matmul(x, form)
            best[block] = min(best[block], time.perf_counter() - start)
    return best


def table(rows_alike: int, rounds: int) -> tuple[tuple[float, int], ...]:
    choices: list[tuple[float, int]] = []
    for density in DENSITIES:
        mask = (torch.rand(1024 // rows_alike, 1024) < density).repeat_interleave(rows_alike, dim=0)
        best = times(mask, rounds)
        report = "  ".join(f"{block}: {seconds * 1e6:.0f}" for block, seconds in best.items())
        print(f"# density {density:.2f}, microseconds by block: {report}")
        block = min(best, key=lambda block: best[block])
        if choices and best[block] > WORTH_A_LINE * best[choices[-1][1]]:
            block = choices[-1][1]
        choices.append((density, block))
    return tuple(list(group)[-1] for _, group in groupby(choices, key=lambda choice: choice[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="runs of every candidate (default 40)")
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with torch.inference_mode():
        for name, rows_alike in (("BLOCKS", 1), ("BLOCKS_OF_FOUR", 4)):
            print(f'{name}: "{_native.active_isa()}": {table(rows_alike, rounds)},')


if __name__ == "__main__":
    main()
