"""Plain C99 for the power-of-two network: integers and shifts, no allocation, no floating point, one static arena.

A folder that needs nothing but a compiler: `model.h` and `model.c` (the same for every network but for the list of
layers), `weights.c`, `golden.h` with images and their outputs, and `main.c`, which checks them. Activations are uint8
in HWC order. A convolution gathers the taps of a pixel once and then takes one product per output channel: over all
taps, or over those that pruning left, stored as gaps and values where that is smaller.

Sums fit into int32 for every input (checked here, channel by channel), and a right shift rounds half up without
overflow as (a >> s) + ((a >> (s - 1)) & 1). Negative numbers are shifted right arithmetically; a compiler that does
otherwise stops at a typedef in model.c.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from imgopt_fast._arguments import as_pair, as_sides
from imgopt_fast.augment import Compose, Normalize
from imgopt_fast.ops.int8_graph.constants import offsets, shifts
from imgopt_fast.targets import c_source as source
from imgopt_fast.targets.c_compile import engines
from imgopt_fast.targets.c_layout import place
from imgopt_fast.targets.errors import refuse
from imgopt_fast.targets.network import Layer, Network
from imgopt_fast.targets.verification import Array

__all__ = ["EXTRA", "PACKAGES", "VERIFIERS", "engines", "write"]

PACKAGES, VERIFIERS, EXTRA = (), (), ""
GOLDEN = 4  # images in golden.h
INT32 = 2**31 - 1
# A residual (below 2^8) moves left by at most this, so that it stays below 2^30 and the sum has the other 2^30.
RESIDUAL_LEFT = 22
MOST_GAP = 255


def write(
    network: Network,
    path: Path,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    name: str = "model",
) -> list[str]:
    """Write the folder `path`; returns what to know about it. ValueError for a layer that integers cannot carry."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
        raise ValueError(f"name: expected a C identifier, got {name!r}")
    model = _Model(network, name, _pixel_table(network, mean, std))
    path.mkdir()
    for file, text in model.files().items():
        (path / file).write_text(text)
    return [
        f"arena of {model.arena:,} bytes, constants of {model.constants:,} bytes; {sum(model.packed)} of "
        f"{len(model.packed)} layers with weights are stored and run compressed"
    ]


class _Model:
    """The source files of one network."""

    def __init__(self, network: Network, name: str, pixels: Array | None) -> None:
        self.network, self.name, self.pixels = network, name, pixels
        self.packed: list[bool] = []  # of every layer with weights: whether it is stored compressed
        self.constants = 0
        self.arrays: list[str] = []
        self.calls: list[str] = []
        for layer in network.float_layers:
            raise refuse(layer, "c", "it computes in float")
        if not network.shift:
            raise ValueError(
                "model: c wants power-of-two scales; quantize it with Int8Config(power_of_two=True), or take "
                "--format onnx"
            )
        self.first = self._input()
        scratch = max([self._patch(layer) for layer in network.layers] + [1])
        sizes = {v: int(np.prod(network.values[v].shape[1:])) for v in self._stored()}
        self.offsets, top = place(network, sizes)
        self.scratch_at, self.arena = top, top + scratch
        for layer in network.layers:
            if layer is not self.first:
                self.calls.append(getattr(self, f"_{layer.kind}")(layer))

    def _input(self) -> Layer:
        """The layer that quantizes the one input."""
        starts = [layer for layer in self.network.layers if layer.kind == "quantize"]
        if len(starts) != 1 or len(self.network.outputs) != 1:
            raise ValueError("model: c wants one input and one output")
        return starts[0]

    def _stored(self) -> list[int]:
        return [i for i, value in enumerate(self.network.values) if value.quantized]

    def _patch(self, layer: Layer) -> int:
        """Bytes that a convolution gathers per pixel."""
        if layer.kind != "conv2d":
            return 0
        assert layer.weights is not None
        _, _, height, width = layer.weights.weight.shape
        return height * width * self.network.values[layer.inputs[0]].shape[1]

    # --- the layers ---------------------------------------------------------------------------------------------------

    def _at(self, value: int) -> str:
        return f"arena + {self.offsets[value]}"

    def _image(self, value: int) -> tuple[int, int, int]:
        shape = self.network.values[value].shape
        return (shape[2], shape[3], shape[1]) if len(shape) == 4 else (1, 1, shape[1])

    def _conv2d(self, layer: Layer) -> str:
        stride, dilation = (
            as_pair("stride", layer.attributes["stride"], 1),
            as_pair("dilation", layer.attributes["dilation"], 1),
        )
        return self._product(layer, stride, as_sides(layer.attributes["padding"]), dilation)

    def _linear(self, layer: Layer) -> str:
        return self._product(layer, [1, 1], [0, 0, 0, 0], [1, 1])

    def _product(self, layer: Layer, stride: list[int], sides: list[int], dilation: list[int]) -> str:
        assert layer.weights is not None
        weights, out = layer.weights, self.network.values[layer.output]
        weight = weights.weight
        if layer.kind == "linear":
            weight = self._hwc_columns(layer, weight)
        outputs, inputs, height, width = weight.shape
        rows = weight.permute(0, 2, 3, 1).reshape(outputs, -1).numpy().astype(np.int64)  # taps, then channels
        channels = inputs * weights.groups
        taps = np.arange(height * width)[:, None] * channels + np.arange(inputs)[None]
        places = taps.ravel()
        offset = offsets(weights, torch.uint8).numpy().astype(np.int64)
        fields, rows, offset = self._shifts(layer, rows, offset)
        low, high = self.network.steps(layer) if out.quantized else (0, 0)
        name = f"{self.name}_{layer.name}"
        stored, spans, packed = _pack(rows, places)
        if packed:
            self._array("uint8_t", f"{name}_gaps", stored[0])
            self._array("int8_t", f"{name}_weight", stored[1])
            self._array("int32_t", f"{name}_spans", spans)
        else:
            self._array("int8_t", f"{name}_weight", rows)
        self._array("int32_t", f"{name}_offset", offset)
        self._array("int8_t", f"{name}_shift", fields)
        self.packed.append(packed)
        image, made = self._image(layer.inputs[0]), self._image(layer.output)
        residual = "0" if layer.residual is None else self._at(layer.residual)
        zero = 0 if layer.residual is None else self.network.values[layer.residual].zero_point
        struct = [
            *image, *made, height, width, *stride, sides[0], sides[2], *dilation, weights.groups,
            weights.input_zero_point, out.zero_point if out.quantized else 0, low, high, zero,
        ]  # fmt: skip
        pointers = [f"{name}_gaps" if packed else "0", f"{name}_spans" if packed else "0",
                    f"{name}_weight", f"{name}_offset", f"{name}_shift"]  # fmt: skip
        fields_text = ", ".join([*map(str, struct), *pointers])
        self.arrays.append(f"const struct convolution {name} = {{{fields_text}}};\n")
        target = (self._at(layer.output), "0") if out.quantized else ("0", "output")
        return f"convolve(&{name}, {self._at(layer.inputs[0])}, {residual}, {', '.join(target)});"

    def _hwc_columns(self, layer: Layer, weight: torch.Tensor) -> torch.Tensor:
        """The weight of a linear layer for an image that was flattened in HWC order, as activations lie here."""
        value = layer.inputs[0]
        maker = next((made for made in self.network.layers if made.output == value), None)
        while maker is not None and maker.kind == "flatten":
            shape = self.network.values[maker.inputs[0]].shape
            if len(shape) == 4:
                rows = weight.flatten(1).view(len(weight), *shape[1:]).permute(0, 2, 3, 1)
                return rows.reshape(len(weight), -1, 1, 1)
            value = maker.inputs[0]
            maker = next((made for made in self.network.layers if made.output == value), None)
        return weight

    def _shifts(self, layer: Layer, rows: Array, offset: Array) -> tuple[Array, Array, Array]:
        """(O, 4) right, sum_left, residual_left and sum_right of every channel, proven to stay within int32."""
        assert layer.weights is not None
        out = self.network.values[layer.output]
        highest = np.maximum(
            np.abs(offset + 255 * rows.clip(min=0).sum(1)), np.abs(offset + 255 * rows.clip(max=0).sum(1))
        )
        if not out.quantized:
            return self._output_shifts(layer, highest, rows, offset)
        scale = None if layer.residual is None else self.network.values[layer.residual].scale
        fields = shifts(layer.weights, out.scale, scale).numpy().astype(np.int64)
        right, sum_left, residual_left = fields[:, 0], fields[:, 1], fields[:, 2]
        # Bits of the sum below the residual's last one drop out of a rounding shift that is longer anyway.
        sum_right = (residual_left - RESIDUAL_LEFT).clip(min=0)
        if ((sum_right > 0) & (right - 1 < sum_right)).any():
            raise refuse(layer, "c", "its residual is too coarse for int32")
        right, residual_left = right - sum_right, residual_left - sum_right
        gone = right > 31  # everything is shifted out
        rows, offset = np.where(gone[:, None], 0, rows), np.where(gone, 0, offset)
        right, sum_left = np.where(gone, 31, right), np.where(gone, 0, sum_left)
        highest = np.where(gone, 0, highest)
        bound = (highest >> sum_right) * 2.0**sum_left + (0 if scale is None else 255 * 2.0**residual_left)
        if bound.max() > INT32:
            channel = int(bound.argmax())
            raise refuse(layer, "c", f"the sum of output channel {channel} could reach {bound.max():.3g}, beyond int32")
        return np.stack([right, sum_left, residual_left, sum_right], 1), rows, offset

    def _output_shifts(self, layer: Layer, highest: Array, rows: Array, offset: Array) -> tuple[Array, Array, Array]:
        """The network's output stays in int32, at the finest scale of its channels."""
        assert layer.weights is not None
        if layer.residual is not None or self.network.clamps(layer):
            raise refuse(layer, "c", "the last layer gives its sums, with neither residual nor clamp")
        scale = layer.weights.input_scale * layer.weights.weight_scale.double()
        fine = (1 - torch.frexp(scale)[1]).numpy().astype(np.int64)
        left = fine.max() - fine
        if (highest * 2.0**left).max() > INT32:
            raise refuse(layer, "c", "its channels differ too much in scale for int32")
        self.exponent = int(fine.max())
        zero = np.zeros_like(left)
        return np.stack([zero, left, zero, zero], 1), rows, offset

    def _add(self, layer: Layer) -> str:
        a, b = (self.network.values[i] for i in layer.inputs)
        out = self.network.values[layer.output]
        fine = [_exponent(v.scale) for v in (a, b)]
        finest = max(fine)
        lefts, right = [finest - f for f in fine], finest - _exponent(out.scale)
        if max(lefts) > RESIDUAL_LEFT or not -20 <= right <= 31:
            raise refuse(layer, "c", "its inputs differ too much in scale for int32")
        sources, numbers = [self._at(i) for i in layer.inputs], [a.zero_point, b.zero_point, *lefts, right]
        return self._requantize("add", layer, self._size(layer.output), sources, numbers)

    def _requantize(self, call: str, layer: Layer, count: int, sources: list[str], numbers: list[int]) -> str:
        out = self.network.values[layer.output]
        arguments = [*sources, self._at(layer.output), count, *numbers, out.zero_point, *self.network.steps(layer)]
        return f"{call}({', '.join(map(str, arguments))});"

    def _rescale(self, layer: Layer) -> str:
        return self._concat(layer)

    def _concat(self, layer: Layer) -> str:
        out = self.network.values[layer.output]
        height, width, channels = self._image(layer.output)
        calls, first = [], 0
        for value in layer.inputs:
            given = self.network.values[value]
            right = _exponent(given.scale) - _exponent(out.scale)
            if not -20 <= right <= 31:
                raise refuse(layer, "c", "its inputs differ too much in scale for int32")
            arguments = [self._at(value), self._at(layer.output), height * width, given.shape[1], channels, first,
                         given.zero_point, right, out.zero_point]  # fmt: skip
            calls.append(f"copy_channels({', '.join(map(str, arguments))});")
            first += given.shape[1]
        return "\n    ".join(calls)

    def _max_pool2d(self, layer: Layer) -> str:
        return self._pool(layer, "max_pool", [])

    def _avg_pool2d(self, layer: Layer) -> str:
        return self._pool(layer, "average_pool", self._average(layer))

    def _global_avg_pool2d(self, layer: Layer) -> str:
        height, width, _ = self._image(layer.inputs[0])
        window = {"kernel_size": (height, width), "stride": 1, "padding": 0}
        return self._pool(layer, "average_pool", self._average(layer), window)

    def _average(self, layer: Layer) -> list[int]:
        given, out = self.network.values[layer.inputs[0]], self.network.values[layer.output]
        right = _exponent(given.scale) - _exponent(out.scale)
        height, width, _ = self._image(layer.inputs[0])
        if not -12 <= right <= 12 or height * width > 2**10:
            raise refuse(layer, "c", "its scales differ too much for int32, or it averages too many pixels")
        return [given.zero_point, max(0, -right), max(0, right), out.zero_point]

    def _pool(self, layer: Layer, call: str, numbers: list[int], window: dict[str, Any] | None = None) -> str:
        given = window or layer.attributes
        if not given.get("count_include_pad", True):
            raise refuse(layer, "c", "an average that leaves its padding out")
        sides = as_sides(given["padding"])
        arguments = [
            self._at(layer.inputs[0]), self._at(layer.output), *self._image(layer.inputs[0]),
            *self._image(layer.output)[:2], *as_pair("kernel_size", given["kernel_size"], 1),
            *as_pair("stride", given["stride"], 1), sides[0], sides[2], *numbers,
        ]  # fmt: skip
        return f"{call}({', '.join(map(str, arguments))});"

    def _flatten(self, layer: Layer) -> str:
        return f"/* {layer.name}: the same bytes */"

    def _dequantize(self, layer: Layer) -> str:
        given = self.network.values[layer.inputs[0]]
        self.exponent = _exponent(given.scale)
        return f"widen({self._at(layer.inputs[0])}, output, {self._size(layer.output)}, {given.zero_point});"

    def _size(self, value: int) -> int:
        return int(np.prod(self.network.values[value].shape[1:]))

    # --- the files ----------------------------------------------------------------------------------------------------

    def _array(self, kind: str, name: str, values: Any) -> None:
        flat = np.asarray(values).ravel()
        self.constants += flat.size * {"int8_t": 1, "uint8_t": 1, "int32_t": 4}[kind]
        self.arrays.append(source.array(kind, name, flat.tolist()))

    def files(self) -> dict[str, str]:
        network, first = self.network, self.first
        shape, given = network.values[first.output].shape, network.values[first.output]
        outputs = self._size(network.outputs[0])
        if self.pixels is not None:
            self._array("uint8_t", f"{self.name}_pixels", self.pixels)
        images = min(GOLDEN, shape[0])
        golden_in = network.tensors[first.output][:images].permute(0, 2, 3, 1).numpy()
        golden_out = np.round(network.tensors[network.outputs[0]][:images].double().numpy() * 2.0**self.exponent)
        facts = {
            "name": self.name, "NAME": self.name.upper(), "height": shape[2], "width": shape[3], "channels": shape[1],
            "outputs": outputs, "input_exponent": _exponent(given.scale), "input_zero_point": given.zero_point,
            "output_exponent": self.exponent, "arena": self.arena, "constants": self.constants, "golden": images,
            "scratch": self.scratch_at, "input_at": self.offsets[first.output],
        }  # fmt: skip
        return {
            "model.h": source.header(facts, self.pixels is not None),
            "model.c": source.program(facts, self.calls, [a for a in self.arrays if a.startswith("const struct")],
                                      self.pixels is not None),
            "weights.c": source.weights(facts, [a for a in self.arrays if not a.startswith("const struct")]),
            "weights.h": source.declarations(facts, [a for a in self.arrays if not a.startswith("const struct")]),
            "golden.h": source.golden(facts, golden_in.ravel().tolist(), golden_out.astype(np.int64).ravel().tolist()),
            "main.c": source.main(facts),
        }  # fmt: skip


def _pack(rows: Array, places: Array) -> tuple[tuple[list[int], list[int]], list[int], bool]:
    """((gaps, values), first entry of every row and one past the last, whether that is smaller) of a sparse weight.

    A gap is the distance in the gathered taps from the entry before; a longer one passes over stored zeros.
    """
    gaps: list[int] = []
    values: list[int] = []
    spans = [0]
    for row in rows:
        at = 0
        for place_, weight in zip(places[row != 0].tolist(), row[row != 0].tolist(), strict=True):
            while place_ - at > MOST_GAP:
                gaps.append(MOST_GAP)
                values.append(0)
                at += MOST_GAP
            gaps.append(place_ - at)
            values.append(weight)
            at = place_
        spans.append(len(gaps))
    return (gaps, values), spans, 2 * len(gaps) + 4 * len(spans) < 0.9 * rows.size


def _pixel_table(network: Network, mean: Any, std: Any) -> Array | None:
    """(C, 256): the stored input of a raw pixel, normalized by `mean` and `std` of values in [0, 1]."""
    if mean is None and std is None:
        return None
    stored = next(network.values[layer.output] for layer in network.layers if layer.kind == "quantize")
    channels = stored.shape[1]
    means, stds = np.broadcast_to(mean or 0.0, channels), np.broadcast_to(std or 1.0, channels)
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 256).expand(1, channels, 1, 256).contiguous()
    real = Compose([Normalize(tuple(map(float, means)), tuple(map(float, stds)))])(ramp)
    steps = torch.round(real * (1.0 / stored.scale)).clamp(-stored.zero_point, 255 - stored.zero_point)
    return (steps + stored.zero_point).to(torch.uint8)[0, :, 0].numpy()


def _exponent(scale: float) -> int:
    """p of scale = 2^-p."""
    mantissa, exponent = np.frexp(scale)
    assert mantissa == 0.5
    return int(1 - exponent)
