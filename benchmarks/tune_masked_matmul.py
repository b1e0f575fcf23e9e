"""Measures the tables of src/imgopt_fast/_mask_blocks.py and nn/int8_sparse.py on one core, and prints them.

    python benchmarks/tune_masked_matmul.py                  # every table for the active instruction set
    IMGOPT_ISA=avx2 python benchmarks/tune_masked_matmul.py  # another that the processor has
    python benchmarks/tune_masked_matmul.py blocks           # one of: blocks, copy, form, conv, packed_conv, int8

blocks  the block of columns per density: packed forward of 1024 × 1024 at batch 256, a uniform mask and one of blocks
        of four rows
copy    the density from which a dense copy is faster for one sample by what its memory is worth, 1024 × 1024
form    the density from which torch's dense product is faster in bfloat16, 1024 × 1024 at batch 256
conv    the density up to which a 3 × 3 convolution trains faster on the sparse kernels, by its channels
packed_conv  the same for its packed weight at inference, in float32
int8    the share of groups of four up to which the sparse product is faster than the dense one, by the number of
        inputs, at the least and at a large number of images

The times of what is compared are taken in turn, and the least of each counts, so that a busy machine changes little. A
block that gains less than 2 % over that of the density before is not worth a line.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import groupby
from unittest import mock

import torch

from imgopt_fast import _native
from imgopt_fast.nn.int8_sparse import FEWEST_IMAGES
from imgopt_fast.ops.int8_conv2d import int8_conv2d, pack_int8_weight
from imgopt_fast.ops.masked_matmul import (
    MaskLayout,
    PackedMaskedWeight,
    int8_masked_matmul,
    layout,
    mask_layout,
    masked_conv2d,
    masked_matmul,
    pack_int8_masked_weight,
    pack_masked_weight,
)

CANDIDATES = (64, 96, 128, 192, 256, 512, 1024)
DENSITIES = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 0.85, 1.0)
LIKELY_DENSE = (0.2, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.8, 1.0)
INT8_DENSITIES = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2)
CONV_CHANNELS = (16, 32, 64, 128, 256, 512)
CONV_DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
CONV_VALUES = 1 << 20  # of the input: a batch whose activations fill a second-level cache
INT8_INPUTS = (256, 512, 1024, 2048, 4096)
MANY_IMAGES = 256
WORTH_A_LINE = 0.98
WORTH_ITS_MEMORY = 1.2


def fastest(contestants: Mapping[object, Callable[[], object]], rounds: int) -> dict[object, float]:
    """The least seconds of each, in turns."""
    best = dict.fromkeys(contestants, float("inf"))
    for _ in range(rounds):
        for name, call in contestants.items():
            call()
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def report(text: str, best: Mapping[object, float]) -> None:
    print(f"# {text}, microseconds: " + "  ".join(f"{name}: {s * 1e6:.0f}" for name, s in best.items()), flush=True)


def with_block(weight: torch.Tensor, mask: torch.Tensor, block: int) -> PackedMaskedWeight:
    with mock.patch.object(layout, "block_columns", return_value=block):
        return pack_masked_weight(weight, mask)


def random_mask(density: float, rows_alike: int = 1) -> torch.Tensor:
    return (torch.rand(1024 // rows_alike, 1024) < density).repeat_interleave(rows_alike, dim=0)


def blocks(rounds: int) -> None:
    weight, x = torch.randn(1024, 1024), torch.randn(256, 1024)
    for name, rows_alike in (("BLOCKS", 1), ("BLOCKS_OF_FOUR", 4)):
        choices: list[tuple[float, int]] = []
        for density in DENSITIES:
            mask = random_mask(density, rows_alike)
            forms = {block: with_block(weight, mask, block) for block in CANDIDATES}
            best = fastest({b: lambda form=form: masked_matmul(x, form) for b, form in forms.items()}, rounds)
            report(f"density {density:.2f}", best)
            block = min(CANDIDATES, key=lambda block: best[block])
            if choices and best[block] > WORTH_A_LINE * best[choices[-1][1]]:
                block = choices[-1][1]
            choices.append((density, block))
        table = tuple(list(group)[-1] for _, group in groupby(choices, key=lambda choice: choice[1]))
        print(f'{name}: "{_native.active_isa()}": {table},', flush=True)


def copy(rounds: int) -> None:
    weight, x = torch.randn(1024, 1024), torch.randn(1, 1024)
    faster = []
    for density in LIKELY_DENSE:
        with mock.patch.object(layout, "keeps_dense_copy", return_value=True):
            packed = pack_masked_weight(weight, random_mask(density))
        sparse = packed._replace(dense=None)
        best = fastest(
            {
                "copy": lambda packed=packed: masked_matmul(x, packed),
                "packed": lambda sparse=sparse: masked_matmul(x, sparse),
            },
            5 * rounds,
        )
        report(f"density {density:.2f}", best)
        faster.append((density, best["copy"] * WORTH_ITS_MEMORY < best["packed"]))
    print(f'DENSE_COPY: "{_native.active_isa()}": {_limit(faster)},')


def form(rounds: int) -> None:
    weight, x = torch.randn(1024, 1024).bfloat16(), torch.randn(256, 1024).bfloat16()
    faster = []
    for density in LIKELY_DENSE:
        mask = random_mask(density)
        with mock.patch.object(layout, "_dense_in_bfloat16", return_value=False):
            packed = pack_masked_weight(weight, mask)
        dense = torch.where(mask, weight, 0)
        best = fastest(
            {
                "dense": lambda dense=dense: torch.nn.functional.linear(x, dense),
                "packed": lambda packed=packed: masked_matmul(x, packed),
            },
            rounds,
        )
        report(f"density {density:.2f}", best)
        faster.append((density, best["dense"] < best["packed"]))
    print(f'DENSE_BFLOAT16: "{_native.active_isa()}": {_limit(faster)},')


Ways = Mapping[str, Callable[[], object]]


def conv_limits(
    text: str, densities: tuple[float, ...], rounds: int, ways: Callable[[int, float], Ways]
) -> tuple[tuple[int, float], ...]:
    """Per number of channels, the density up to which the "sparse" one of `ways(channels, density)` is the faster.

    A row is worth a line where its limit is above those of fewer channels.
    """
    limits: list[tuple[int, float]] = [(0, 0.0)]
    for channels in CONV_CHANNELS:
        limit = 0.0
        for density in densities:
            best = fastest(ways(channels, density), rounds)
            report(f"{text}{channels} channels, density {density:.2f}", best)
            if best["sparse"] >= best["dense"]:
                break
            limit = density
        if limit > limits[-1][1]:
            limits.append((channels, limit))
    return tuple(limits)


def conv_problem(channels: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and weight of a 3 x 3 convolution."""
    images = max(4, CONV_VALUES // (channels * 16 * 16))
    x = torch.randn(images, channels, 16, 16, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return x, torch.randn(channels, channels, 3, 3, dtype=dtype)


def packed_conv(rounds: int) -> None:
    def ways(channels: int, density: float) -> Ways:
        x, weight = conv_problem(channels)
        mask = torch.rand(weight.shape) < density
        with mock.patch.object(layout, "infers_sparse", return_value=True):
            packed = pack_masked_weight(weight, mask)
        dense = torch.where(mask, weight, 0).contiguous(memory_format=torch.channels_last)
        return {
            "sparse": partial(masked_conv2d, x, packed, padding=1),
            "dense": partial(torch.nn.functional.conv2d, x, dense, padding=1),
        }

    limits = conv_limits("", (*CONV_DENSITIES, 0.7, 0.85, 1.0), max(5, rounds // 4), ways)
    print(f'SPARSE_CONVOLUTIONS: "{_native.active_isa()}": {limits},')


def conv(rounds: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):

        def ways(channels: int, density: float, dtype: torch.dtype = dtype) -> Ways:
            x, weight = conv_problem(channels, dtype)
            mask = torch.rand(weight.shape) < density
            return {"sparse": partial(step, x, weight, mask_layout(mask)), "dense": partial(step, x, weight, mask)}

        name = str(dtype)[6:]
        limits = conv_limits(f"{name}, ", CONV_DENSITIES, max(3, rounds // 8), ways)
        print(f'SPARSE_TRAINING: ("{_native.active_isa()}", "{name}"): {limits},')


@torch.enable_grad()
def step(x: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor | MaskLayout) -> None:
    """Forward and both gradients of a convolution."""
    given, learned = x.clone().requires_grad_(), weight.clone().requires_grad_()
    result = masked_conv2d(given, learned, mask, padding=1)
    result.backward(torch.ones_like(result))


def _limit(faster: list[tuple[float, bool]]) -> float:
    """The density from which the dense one is faster throughout."""
    limit = float("inf")
    for density, dense in reversed(faster):
        if not dense:
            break
        limit = density
    return limit


def int8(rounds: int) -> None:
    limits: list[tuple[int, float]] = []
    for inputs in INT8_INPUTS:
        limit = 0.0
        for density in INT8_DENSITIES:
            mask = torch.rand(1024, inputs) < density
            weight = torch.where(mask, torch.randint(-127, 128, mask.shape, dtype=torch.int8), 0)
            share = float(mask.view(1024, -1, 4).any(2).float().mean())
            packed = pack_int8_masked_weight(weight, mask, 0.01, input_scale=0.02, input_zero_point=3)
            dense = pack_int8_weight(weight[:, :, None, None], 0.01, input_scale=0.02, input_zero_point=3)
            wins = True
            for images in (FEWEST_IMAGES, MANY_IMAGES):
                x = torch.randint(0, 256, (images, inputs), dtype=torch.uint8)
                best = fastest(
                    {
                        "sparse": lambda x=x, packed=packed: int8_masked_matmul(x, packed, output_scale=1.0),
                        "dense": lambda x=x, dense=dense: int8_conv2d(x[:, :, None, None], dense, output_scale=1.0),
                    },
                    rounds,
                )
                report(f"{inputs} inputs, {share:.0%} of the groups, {images} images", best)
                wins = wins and best["sparse"] < best["dense"]
            if not wins:
                break
            limit = share
        limits.append((inputs, round(limit, 2)))
    table = tuple(reversed([entry for entry in limits if entry[1] > 0]))
    print(f'LARGEST_SHARE: "{_native.active_isa()}": {table},')


TABLES = {"blocks": blocks, "copy": copy, "form": form, "conv": conv, "packed_conv": packed_conv, "int8": int8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="*", help="which tables (default: all)")
    parser.add_argument("--rounds", type=int, default=40, help="runs of every candidate (default 40)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with torch.no_grad():
        for name in arguments.table or TABLES:
            TABLES[name](arguments.rounds)


if __name__ == "__main__":
    main()
