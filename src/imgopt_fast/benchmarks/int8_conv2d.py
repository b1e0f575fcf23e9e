"""int8_conv2d against torch's quantized engines, onnxruntime and OpenVINO on the convolutions of real networks.

Every contestant computes the same quantized layer: uint8 activations, int8 weights with a scale per output channel,
int32 bias, ReLU by saturation, uint8 output. Each gets the layout that it likes best, untimed: channels_last for
torch, OpenVINO and ours, NCHW for onnxruntime. OpenVINO quantizes its input inside (onnx_models.py says why), a few
per cent of its time. Weights are packed before the clock starts, as in a deployed network.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch.nn import functional as F

from imgopt_fast import _native
from imgopt_fast.benchmarks import onnx_models
from imgopt_fast.benchmarks.case import Agreement, Case, Runner, Work, on_one_thread
from imgopt_fast.benchmarks.counting import taps_inside
from imgopt_fast.ops.int8_conv2d import int8_conv2d, pack_int8_weight
from imgopt_fast.ops.int8_graph import Int8GraphBuilder, int8_graph

INPUT_SCALE = 0.02
# The others round bias and product in another order: where the real result is near a half they may be one step off.
ONE_STEP = Agreement(1.0)
ENGINES = ("x86", "onednn", "fbgemm")
PLANNED = 6  # layers of a planned case
# Why goals are missed, as measured on a Zen 5 core (3.8 GHz, 966 GOP/s by vpdpbusd in that run) with the kernels of
# this version; `benchmarks/report.py` prints them below the table.
NOTES = (
    "A call of its own costs 2.7 us: 1.1 the dispatcher with four arguments, 0.5 the output's memory, 1 Python, which "
    "finds the checked call again. 192->64 at 14 x 14 is 5.7 us of arithmetic in a call of 8.2.",
    "3 x 3: the loop runs at the measured vpdpbusd rate, as oneDNN's does. Taps that meet only padding are left out "
    "where the zero point is 0, and the floor does not count them: 19 % of the products at 7 x 7 pixels, of which 16 "
    "% go, and 9 % at 14 x 14; at 28 x 28 (5 %) sorting the pixels costs as much as it saves. 64 channels at 56 x 56 "
    "take their products, those with padding among them, at 96 % of the rate; neither weights fetched into L1 ahead "
    "nor copies of padded rows in place of the table change that. In a plan they come to 92 to 93 % of a loop of "
    "vpdpbusd that takes turns with them, and to 89 to 90 where torch's float layers take turns as well. 512 "
    "channels at 7 x 7 come to 90 in a loop of one call and to 83 in a plan, whose six layers have 14 MB of weights, "
    "85 with these in large pages.",
    "1 x 1 with K <= 64: bound by instructions, not by memory: core and L3 exchange 120 GB/s, 8 images of 64->256 at "
    "56 x 56 need 8. Rows are read without a table, their addresses follow from the first one. 64->256 takes 230 "
    "cycles per tile of 6 x 64 sums, of which the products need 192, and the multiplications and half of the packing "
    "20 more on the same two pipes. With 24 filters a quarter of the lanes is empty. Slower were tiles of half the "
    "height, to overlap more (by a quarter), the last 16 products of two rows at a time before their rounding (by 12 "
    "to 40 %), and sums taken as floats (by 5 %: the fused multiplications meet the products on two of the four "
    "pipes, the conversions they replace do not). No faster were two dwords to a step of the loop (but for K = 16, by "
    "3 %), and blocks of 24 to 192 pixels.",
    "7 x 7 stem: 37 dwords a pixel bound it at 246 us; 1.5 times oneDNN's 408 us would be 272. Of the 279 rounding and "
    "packing take 20, the call 3, the copies of input rows with their padding, made once for several output rows, and "
    "the last of the 21 bytes of each kernel row, shuffled into two dwords, some 5. Eight images take 290 us each; "
    "fetching the lines of the output ahead does not change that. Copying all 147 bytes of every pixel took 77 us in "
    "unaligned stores and gained nothing; an unrolled kernel row did not either.",
    "Depthwise 3 x 3: 11 to 12 cycles per 64 outputs with stride 1 (28 x 28 and 56 x 56), 14 at 7 x 7, and 15 to 20 "
    "with stride 2, of which the 12 vpdpbusd and 4 multiplications need 8; the rest is instructions, 47 and 54, of "
    "which the core takes about 5 per cycle. Of 144 channels a ninth of the vectors collects four rows of 16 "
    "channels, and a load of a pixel that begins in the middle of a cache line counts twice. oneDNN takes 2.7 to 4.1 "
    "times as long in the same process, but for images that the second cache does not hold: 2.3 for 96 channels at "
    "112 x 112, stride 2, N = 1, 2.1 for 144 at 56 x 56, stride 2, N = 8. Of the "
    "latter the sums alone take 73 us; with its 4.5 MB in the third cache a call takes 98 us, from memory 240, where a "
    "copy at 40 GB/s would take 113 and the goal allows 110. What the other contestants leave in the caches decides "
    "which. 96 channels at 112 x 112 take 34 us from the third cache, 22 of them sums, and 4 to 8 of their own for the "
    "call and its 300 KB of output. Fetching these ahead makes 144 channels a quarter to a third faster from memory "
    "and 1 to 13 % slower from the third cache; bands of 4 rows are up to 19 % slower, strips of 56 pixels "
    "up to 12 %, and pages of 2 MiB between 6 % faster and 8 % slower.",
    "Depthwise and the 1 x 1 behind it in one step of a plan: MobileNetV2 writes 2.3 MB of depthwise outputs per image "
    "and reads them again, 19 us of 1040 at the second cache's rate, 31 with the three largest at the third's: 2 to 3 "
    "%, for a kernel that would need both sets of weights and sums. Not done.",
    "Depthwise with AVX-VNNI takes words, as AVX2 does: by count some 62 instructions per 16 outputs of 3 x 3, of "
    "which vpdpwssd would save 10; columns of bytes for vpdpbusd, as on AVX-512, would take about 39. Not built.",
    "Depthwise 5 x 5: 22 cycles per 64 outputs with stride 1 (64 channels at 28 x 28) and 29 at 14 x 14, of which 28 "
    "vpdpbusd and 4 multiplications need 16; weights and sums of 64 channels do not fit the registers, so a row is "
    "gone through twice and every byte is loaded twice. With stride 2 27 cycles (128 channels at 56 x 56) and 35 with"
    " 144, whose last 16 take a seventh of the time and whose pixels mostly lie in two cache lines. oneDNN takes 3.0 "
    "times as long at N = 1, 1.8 to 2.2 at N = 8, where the goal allows 144 channels 172 us: one call takes 152 behind "
    "another, 187 after 40 MB of other work, 367 from memory. Fetching ahead takes a third of the latter and costs the "
    "others a tenth.",
    "AVX2: two multiplications for 32 products bound fbgemm and ours at 32 products per cycle. fbgemm adds pairs of "
    "products in 16 bits, where they saturate, which is why torch halves the range of its activations for it "
    "(reduce_range). Here channels are paired when weights are packed so that no pair can, for all 8 bits: three "
    "vector instructions for 32 products where words take four. From registers bytes reach 31.7 products per cycle "
    "and words 27.8. With fbgemm forced to AVX2 in the same process it takes 1.06 to 1.18 times as long as ours in 3 "
    "x 3 layers, 1.01 in the first layer, which takes words, and 0.97 to 1.02 in 1 x 1 layers, whose pixels are "
    "brought into the order of the pairs once for every 16 filters (nine layers of ResNet-50; 1.00 to 1.12 and 0.93 "
    "to 0.95 with 16 channels at a time). Weights with a deviation of 60 steps of 127 have too few pairs and take "
    "words.",
)


class Layer(NamedTuple):
    """A convolution: `channels` to `filters`, square kernel, `side` of the input, "same" padding for odd kernels."""

    channels: int
    filters: int
    kernel: int
    stride: int
    side: int
    groups: int = 1

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def out_side(self) -> int:
        return (self.side + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def multiply_adds(self) -> int:
        taps = taps_inside((self.side, self.side), self.kernel, self.stride, self.padding)
        return taps * self.filters * self.channels // self.groups

    def __str__(self) -> str:
        kind = f"dw {self.channels}" if self.groups == self.channels > 1 else f"{self.channels}->{self.filters}"
        return f"{self.kernel}x{self.kernel} {kind} @{self.side}" + (f" /{self.stride}" if self.stride > 1 else "")


@dataclass(eq=False)
class ConvCase(Case):
    """One layer at one batch size."""

    subject: ClassVar[str] = "int8_conv2d"
    layer: Layer
    batch: int = 1
    quick: bool = False
    threads: int | None = None
    isa: str | None = None
    label: str = ""

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.layer} N={self.batch}{self.label}"

    @cached_property
    def input(self) -> torch.Tensor:
        shape = (self.batch, self.layer.channels, self.layer.side, self.layer.side)
        generator = torch.Generator().manual_seed(1)
        values = torch.randn(shape, generator=generator).mul_(60).clamp_(0, 255)  # what a ReLU leaves: half zeros
        return values.to(torch.uint8).contiguous(memory_format=torch.channels_last)

    @cached_property
    def weight(self) -> torch.Tensor:
        layer, generator = self.layer, torch.Generator().manual_seed(2)
        shape = (layer.filters, layer.channels // layer.groups, layer.kernel, layer.kernel)
        return torch.randn(shape, generator=generator).mul_(40).round_().clamp_(-127, 127).to(torch.int8)

    @cached_property
    def weight_scale(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        return 0.5e-3 * (1 + torch.rand(self.layer.filters, generator=generator))

    @cached_property
    def bias(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(4)
        steps = torch.randint(-1000, 1000, (self.layer.filters,), generator=generator)
        return steps * (INPUT_SCALE * self.weight_scale)  # whole steps, so that all round it to the same integers

    @cached_property
    def output_scale(self) -> float:
        # Input and weights have root mean squares of about 42 and 40 steps; three deviations fill the range.
        terms = self.layer.channels // self.layer.groups * self.layer.kernel**2
        return 3 * 42 * 40 * math.sqrt(terms) * INPUT_SCALE * 0.75e-3 / 255

    def ours(self) -> Runner:
        layer, x, scale = self.layer, self.input, self.output_scale
        packed = pack_int8_weight(
            self.weight, self.weight_scale, self.bias, input_scale=INPUT_SCALE, groups=layer.groups
        )
        stride, padding = layer.stride, layer.padding
        return Runner(lambda: int8_conv2d(x, packed, output_scale=scale, stride=stride, padding=padding))

    def work(self) -> Work:
        # Two operations per multiply-add of the layer as it is, without the padding of channels to a vector; the
        # input that the stride reaches and the weights are read once, the output is written once.
        layer = self.layer
        reached = min(layer.side, layer.out_side * layer.stride if layer.kernel > 1 else layer.out_side) ** 2
        outputs = self.batch * layer.filters * layer.out_side**2
        weights = layer.filters * layer.channels // layer.groups * layer.kernel**2
        return Work(
            int8_ops=2.0 * self.batch * layer.multiply_adds,
            bytes_read=self.batch * layer.channels * reached + weights,
            bytes_written=outputs,
        )

    def peers(self) -> Mapping[str, Callable[[], Runner]]:
        peers: dict[str, Callable[[], Runner]] = {"torch": self.with_torch_float}
        if self.threads is not None:
            return {**peers, "ours, one thread": self.one_thread}
        for engine in ENGINES:
            peers[f"torch {engine}"] = lambda engine=engine: self.with_torch_quantized(engine)  # type: ignore[misc]
        return {**peers, "onnxruntime": self.with_onnxruntime, "openvino": self.with_openvino}

    @property
    def best_goal(self) -> float | None:
        """Least ratio to the fastest quantized peer."""
        if self.isa is not None or self.threads is not None:
            return None
        layer = self.layer
        if layer.groups == layer.channels > 1:
            return 2.5
        if layer.kernel == 7:
            return 1.5
        return 1.3 if layer.kernel == 1 and layer.channels <= 64 else 0.95

    @property
    def floor_goal(self) -> float | None:
        """Plain 3 x 3 layers are all arithmetic."""
        layer = self.layer
        plain = layer.kernel == 3 and layer.groups == 1 and layer.stride == 1 and layer.channels >= 64
        return 0.85 if plain and self.isa is None and self.threads is None else None

    def with_torch_float(self) -> Runner:
        """F.conv2d in float32 on the dequantized values; its result is quantized for the comparison only."""
        layer, scale = self.layer, self.output_scale
        x = (self.input.float() * INPUT_SCALE).contiguous(memory_format=torch.channels_last)
        weight = (self.weight.float() * self.weight_scale.view(-1, 1, 1, 1)).contiguous(
            memory_format=torch.channels_last
        )
        bias, options = self.bias, {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups}
        return Runner(
            lambda: F.conv2d(x, weight, bias, **options),
            ONE_STEP,
            lambda real: (real / scale).round().clamp(0, 255),
        )

    def with_torch_quantized(self, engine: str) -> Runner:
        layer, scale, before = self.layer, self.output_scale, torch.backends.quantized.engine
        x = torch._make_per_tensor_quantized_tensor(self.input, INPUT_SCALE, 0)
        scales, zeros = self.weight_scale.double(), torch.zeros(layer.filters, dtype=torch.long)
        weight = torch._make_per_channel_quantized_tensor(self.weight, scales, zeros, 0)
        torch.backends.quantized.engine = engine
        try:
            pair = [layer.stride] * 2, [layer.padding] * 2, [1, 1], layer.groups
            packed = torch.ops.quantized.conv2d_prepack(weight, self.bias, *pair)
        finally:
            torch.backends.quantized.engine = before
        conv = torch.ops.quantized.conv2d.new
        return Runner(lambda: conv(x, packed, scale, 0), ONE_STEP, lambda quantized: quantized.int_repr())

    def with_onnxruntime(self) -> Runner:
        model = onnx_models.qlinear_conv(self.quantized_layer())
        x = self.input.contiguous()
        call = onnx_models.onnxruntime_call(model, x.numpy(), torch.get_num_threads())
        return Runner(call, ONE_STEP, lambda output: torch.from_numpy(output))

    def with_openvino(self) -> Runner:
        model = onnx_models.qdq_conv(self.quantized_layer())
        x = self.input.permute(0, 2, 3, 1).contiguous() * INPUT_SCALE
        call = onnx_models.openvino_call(model, x.numpy(), torch.get_num_threads(), channels_last=True)
        return Runner(call, ONE_STEP, lambda output: torch.from_numpy(output).permute(0, 3, 1, 2))

    def quantized_layer(self) -> onnx_models.QuantizedConv:
        layer = self.layer
        steps = (self.bias.double() / (INPUT_SCALE * self.weight_scale.double())).round().to(torch.int32)
        return onnx_models.QuantizedConv(
            input_shape=tuple(self.input.shape),
            weight=self.weight.numpy(),
            weight_scale=self.weight_scale.numpy(),
            bias=steps.numpy(),
            input_scale=INPUT_SCALE,
            output_scale=self.output_scale,
            stride=layer.stride,
            padding=layer.padding,
            groups=layer.groups,
        )

    def one_thread(self) -> Runner:
        return on_one_thread(self.ours(), 1.7)


@dataclass(eq=False)
class PlannedCase(ConvCase):
    """PLANNED times the same layer, one behind the other, as one plan of int8_graph: no call between them."""

    label: str = f", {PLANNED} in a plan"

    def ours(self) -> Runner:
        builder = Int8GraphBuilder()
        value, scale = builder.input(channels=self.layer.channels, scale=INPUT_SCALE), INPUT_SCALE
        for _ in range(PLANNED):
            # The same sums in every layer, whatever the scale of its input.
            weight_scale, bias = self.weight_scale * (INPUT_SCALE / scale), self.bias
            value = builder.conv2d(
                value, self.weight, weight_scale, bias, padding=self.layer.padding, output_scale=self.output_scale
            )
            scale = self.output_scale
        program, inputs = builder.build([value]), [self.input]
        return Runner(lambda: int8_graph(inputs, program), result=lambda outputs: outputs[0])

    def work(self) -> Work:
        one = super().work()
        return Work(int8_ops=PLANNED * one.int8_ops, bytes_read=one.bytes_read, bytes_written=one.bytes_written)

    def peers(self) -> Mapping[str, Callable[[], Runner]]:
        return {"torch": self.with_torch_float}

    @property
    def best_goal(self) -> float | None:
        return None

    @property
    def floor_goal(self) -> float | None:
        return 0.9

    def with_torch_float(self) -> Runner:
        """F.conv2d in float32 on integers, exact to a few units of the sum, rounded to bytes behind every layer."""
        padding, scale = self.layer.padding, self.output_scale
        weight = self.weight.float().contiguous(memory_format=torch.channels_last)
        steps = (self.bias / (INPUT_SCALE * self.weight_scale)).round()
        factor = (INPUT_SCALE * self.weight_scale / scale).view(-1, 1, 1)

        def call() -> torch.Tensor:
            x = self.input.float()
            for _ in range(PLANNED):
                x = (F.conv2d(x, weight, steps, padding=padding) * factor).round().clamp(0, 255)
            return x

        # A value that is rounded the other way in one layer moves its neighbours in the next.
        return Runner(call, Agreement(2.0, outliers=1e-3))


def resnet50_layers() -> list[Layer]:
    """The distinct convolutions of ResNet-50 at 224 x 224 (stride in the 3 x 3, as torchvision has it)."""
    layers = [Layer(3, 64, 7, 2, 224)]
    channels, side = 64, 56
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(min(blocks, 2)):  # later blocks repeat the second
            step = stride if block == 0 else 1
            layers.append(Layer(channels, width, 1, 1, side))
            layers.append(Layer(width, width, 3, step, side))
            layers.append(Layer(width, 4 * width, 1, 1, side // step))
            if block == 0:
                layers.append(Layer(channels, 4 * width, 1, step, side))
            channels, side = 4 * width, side // step
    return list(dict.fromkeys(layers))


def mobilenet_v2_layers() -> list[Layer]:
    """The distinct convolutions of MobileNetV2 at 224 x 224."""
    layers = [Layer(3, 32, 3, 2, 224)]
    channels, side = 32, 112
    settings = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    for expansion, filters, blocks, stride in settings:
        for block in range(blocks):
            step, wide = (stride if block == 0 else 1), channels * expansion
            if expansion > 1:
                layers.append(Layer(channels, wide, 1, 1, side))
            layers.append(Layer(wide, wide, 3, step, side, groups=wide))
            layers.append(Layer(wide, filters, 1, 1, side // step))
            channels, side = filters, side // step
    layers.append(Layer(channels, 1280, 1, 1, side))
    return list(dict.fromkeys(layers))


# Depthwise 5 x 5 as EfficientNet-B0 has them.
DEPTHWISE_5 = [Layer(144, 144, 5, 2, 56, groups=144), Layer(480, 480, 5, 1, 14, groups=480)]
QUICK = {
    Layer(3, 64, 7, 2, 224),
    Layer(64, 64, 3, 1, 56),
    Layer(64, 256, 1, 1, 56),
    Layer(256, 256, 3, 1, 14),
    Layer(512, 2048, 1, 1, 7),
    Layer(96, 96, 3, 2, 112, groups=96),
}


def _cases() -> list[Case]:
    layers = list(dict.fromkeys(resnet50_layers() + mobilenet_v2_layers())) + DEPTHWISE_5
    found: list[Case] = [
        ConvCase(layer, batch, quick=layer in QUICK and batch == 1) for batch in (1, 8) for layer in layers
    ]
    wide = Layer(128, 128, 3, 1, 28)
    found += [PlannedCase(layer) for layer in layers if layer.kernel == 3 and layer.stride == 1 and layer.groups == 1]
    if "avx2" in _native.supported_isas():
        found.append(ConvCase(wide, isa="avx2", label=", AVX2 forced"))
    if _native.core() is not None:
        found.append(ConvCase(wide, batch=8, threads=2, label=", two threads"))
    return found


CASES = _cases()
