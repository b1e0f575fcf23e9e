"""int8_conv2d and int8_graph on CUDA: no bit differs from the integer oracle."""

from typing import Any

import conv_problems
import numpy as np
import pytest
import test_int8_graph as graph_tests
import torch
from cuda_device import EMULATED, moved

import imgopt_fast
from imgopt_fast.ops import int8_conv2d as conv_module
from imgopt_fast.ops.int8_graph import int8_graph, repack

GEOMETRIES: dict[str, dict[str, Any]] = {
    "3x3": {"c": 16, "o": 24, "padding": ((1, 1), (1, 1))},
    "3x3 deep": {"c": 64, "o": 160, "n": 3, "padding": ((1, 1), (1, 1))},
    "1x1": {"c": 48, "o": 33, "k": (1, 1)},
    "stem": {"c": 3, "o": 32, "k": (7, 7), "h": 23, "w": 21, "stride": (2, 2), "padding": ((3, 2), (2, 3))},
    "stem of one step": {"c": 3, "o": 16, "h": 11, "w": 13, "padding": ((1, 0), (0, 1))},
    "stem of many channels": {"c": 13, "o": 16, "k": (2, 5), "padding": ((1, 1), (2, 2))},
    "stem of four": {"c": 4, "o": 48, "k": (3, 2), "h": 10, "w": 9, "stride": (2, 2), "padding": ((1, 1), (1, 1))},
    "odd": {"c": 5, "o": 7, "k": (2, 3), "dilation": (2, 1), "padding": ((0, 2), (1, 0))},
    "dilated": {"c": 32, "o": 16, "h": 11, "dilation": (2, 2), "padding": ((2, 2), (2, 2))},
    "grouped": {"c": 64, "o": 96, "groups": 2, "padding": ((1, 1), (1, 1))},
    "narrow groups": {"c": 24, "o": 18, "groups": 6, "padding": ((1, 1), (1, 1))},
    "odd groups": {"c": 15, "o": 10, "groups": 5},
    "depthwise": {"c": 19, "o": 19, "groups": 19, "padding": ((1, 1), (1, 1))},
    "depthwise 5x5": {"c": 32, "o": 32, "groups": 32, "k": (5, 5), "stride": (2, 2), "padding": ((2, 2), (2, 2))},
    "multiplier": {"c": 6, "o": 12, "groups": 6, "padding": ((1, 1), (1, 1))},
    "depthwise wide": {"c": 20, "o": 20, "groups": 20, "w": 17, "padding": ((1, 0), (0, 1))},
    "depthwise halved": {"c": 8, "o": 8, "groups": 8, "h": 9, "w": 31, "stride": (2, 2), "padding": ((1, 1), (1, 1))},
    "groups of 4": {"c": 16, "o": 32, "groups": 4, "w": 16, "padding": ((1, 1), (1, 1))},
    "groups of 8": {"c": 24, "o": 12, "groups": 3, "w": 9, "stride": (2, 2), "padding": ((1, 1), (1, 1))},
    "groups of 8, merged": {"c": 64, "o": 128, "groups": 8, "padding": ((1, 1), (1, 1)), "input_zero_point": 0},
    "groups of 16, merged": {"c": 128, "o": 128, "groups": 8, "w": 6, "padding": ((1, 1), (1, 1))},
    "many pixels": {"c": 16, "o": 130, "k": (1, 1), "n": 1, "h": 31, "w": 33},
    # Borders of zero: Hopper's kernel reads them.
    "zeros": {"c": 64, "o": 160, "n": 3, "padding": ((1, 1), (1, 1)), "input_zero_point": 0},
    "zeros of one tile": {
        "c": 64, "o": 48, "n": 1, "h": 20, "w": 30, "padding": ((1, 1), (1, 1)), "input_zero_point": 0,
    },
    "zeros in bands": {
        "c": 48, "o": 64, "n": 3, "h": 19, "w": 38, "padding": ((1, 1), (1, 1)), "input_zero_point": 0,
    },
    "zeros to one side": {
        "c": 64, "o": 32, "n": 2, "h": 27, "w": 60, "padding": ((2, 0), (0, 2)), "input_zero_point": 0,
    },
    "zeros deep": {
        "c": 128, "o": 128, "n": 1, "h": 16, "w": 16, "padding": ((1, 1), (1, 1)), "input_zero_point": 0,
    },
    "zeros halved": {
        "c": 64, "o": 64, "n": 3, "h": 12, "w": 15, "stride": (2, 2), "padding": ((1, 1), (1, 1)),
        "input_zero_point": 0,
    },
    "zeros wide": {"c": 80, "o": 144, "k": (1, 3), "h": 6, "padding": ((0, 0), (0, 2)), "input_zero_point": 0},
    "zeros in groups": {"c": 192, "o": 256, "groups": 2, "padding": ((1, 1), (1, 1)), "input_zero_point": 0},
    "zeros dilated": {
        "c": 32, "o": 48, "h": 11, "k": (3, 2), "dilation": (2, 3), "padding": ((2, 1), (3, 0)), "input_zero_point": 0,
    },
    "deep": {"c": 320, "o": 272, "k": (1, 1), "h": 9, "w": 15},
}  # fmt: skip


@pytest.mark.parametrize("requantize", ["float", "shift"])
@pytest.mark.parametrize("dtype", conv_problems.DTYPES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_conv_is_exact(device: torch.device, geometry: str, dtype: torch.dtype, requantize: str) -> None:
    rng = np.random.default_rng(len(geometry))
    for with_residual in (False, True):
        output_dtype = torch.int8 if with_residual else torch.uint8
        x, weight, bias, settings = conv_problems.layer(
            rng, input_dtype=dtype, output_dtype=output_dtype, with_residual=with_residual,
            power_of_two=requantize == "shift", **GEOMETRIES[geometry],
        )  # fmt: skip
        if with_residual:
            settings["output_min"] = 0.0
        expected = conv_problems.oracle(x, weight, bias, requantize=requantize, **settings)
        on_device = {name: moved(value, device) for name, value in settings.items()}
        found = imgopt_fast.int8_conv2d(
            x.to(device), weight.to(device), bias.to(device), requantize=requantize, **on_device
        )
        assert found.is_contiguous(memory_format=torch.channels_last)
        np.testing.assert_array_equal(found.cpu().numpy(), expected)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("zero_point", [0, 113])
@pytest.mark.parametrize(
    ("channels", "side", "outputs", "kernel", "stride", "groups"),
    [(64, 56, 64, 3, 1, 1), (128, 28, 128, 3, 1, 1), (64, 56, 256, 1, 1, 1), (256, 28, 128, 1, 2, 1),
     (192, 28, 192, 3, 1, 1), (3, 112, 64, 7, 2, 1), (96, 56, 96, 3, 1, 96), (256, 28, 256, 3, 2, 32)],
)  # fmt: skip
def test_conv_of_whole_layers(
    device: torch.device, channels: int, side: int, outputs: int, kernel: int, stride: int, groups: int,
    zero_point: int, with_residual: bool,
) -> None:  # fmt: skip
    """Enough pixels for the kernels' largest tiles, which a device with many processors takes for no less."""
    if EMULATED:
        pytest.skip("hours on the emulator")
    rng, pad = np.random.default_rng(side), kernel // 2
    x, weight, bias, settings = conv_problems.layer(
        rng, n=24, c=channels, h=side, w=side, o=outputs, k=(kernel, kernel), groups=groups, stride=(stride, stride),
        padding=((pad, pad), (pad, pad)), input_zero_point=zero_point, with_residual=with_residual,
    )  # fmt: skip
    expected = imgopt_fast.int8_conv2d(x, weight, bias, **settings)
    on_device = {name: moved(value, device) for name, value in settings.items()}
    found = imgopt_fast.int8_conv2d(x.to(device), weight.to(device), bias.to(device), **on_device)
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("geometry", ["3x3", "stem", "depthwise", "narrow groups", "zeros deep"])
def test_conv_float_output_and_packed_weight(device: torch.device, geometry: str) -> None:
    rng = np.random.default_rng(5)
    x, weight, bias, settings = conv_problems.layer(rng, **GEOMETRIES[geometry])
    settings |= {"output_scale": None, "output_zero_point": 0, "output_dtype": None}
    expected = conv_problems.oracle(x, weight, bias, **settings)
    scale = settings.pop("weight_scale").to(device)
    names = ("input_scale", "input_zero_point", "groups")
    packed = imgopt_fast.pack_int8_weight(
        weight.to(device), scale, bias.to(device), **{name: settings.pop(name) for name in names}
    )
    rows = conv_module.cuda_rows(weight.to(device))
    if not EMULATED:
        assert torch.equal(packed.packed, rows)
    found = imgopt_fast.int8_conv2d(x.to(device), packed._replace(packed=rows), **settings)
    np.testing.assert_array_equal(found.cpu().numpy(), expected)


@pytest.mark.parametrize("dtype", conv_problems.DTYPES)
def test_conv_of_extreme_values(device: torch.device, dtype: torch.dtype) -> None:
    """Sums that 16 bits cannot hold, and float32 can no longer hold exactly."""
    low, high = (0, 255) if dtype == torch.uint8 else (-128, 127)
    for value, zero_point in ((high, low), (low, high)):
        x = torch.full((1, 512, 5, 6), value, dtype=dtype)
        weight = torch.full((32, 512, 3, 3), -128, dtype=torch.int8)
        weight[::2] = 127
        found = imgopt_fast.int8_conv2d(
            x.to(device), weight.to(device), input_scale=1.0, input_zero_point=zero_point, weight_scale=1.0,
            padding=1,
        )  # fmt: skip
        sums = torch.nn.functional.conv2d(x.double() - zero_point, weight.double(), padding=1)
        assert torch.equal(found.cpu(), sums.float())


@pytest.mark.parametrize("mode", graph_tests.MODES)
def test_graph_is_exact(device: torch.device, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if EMULATED:  # the weights in the kernels' order, as on a device
        monkeypatch.setattr(conv_module, "pack_bytes", lambda weight, groups: conv_module.cuda_rows(weight))
    program = graph_tests.network(mode)
    there = program._replace(constants=program.constants.to(device), packed=program.packed.to(device))
    for batch, height, width in ((2, 17, 19), (1, 6, 40), (0, 9, 9)):
        inputs = graph_tests.operands(batch, height, width)
        expected = graph_tests.expect(program, inputs)
        repacked = repack(there)
        assert repacked.packed.dim() == 2
        for on_device in (there, repacked):
            found = int8_graph([x.to(device) for x in inputs], on_device)
            graph_tests.assert_same([y.cpu() for y in found], expected)
