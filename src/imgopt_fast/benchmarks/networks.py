"""Whole classifiers at 224 x 224, from float input to logits: int8 against float32 and the other engines.

Weights are random and the batch norms hold the statistics of random images: speed does not depend on accuracy.
torch fx, onnxruntime and OpenVINO quantize the same network with their own recommended settings, from the same
calibration images, and OpenVINO runs the very model that onnxruntime does. Quantized results differ from float ones;
the comparison with float32 is only to catch a network that computes something else.
"""

import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from imgopt_fast.benchmarks import onnx_models
from imgopt_fast.benchmarks.case import Agreement, Case, Runner, Work
from imgopt_fast.benchmarks.counting import layers_of, multiply_adds
from imgopt_fast.models import create_model

SIDE = 224
CALIBRATION_IMAGES = 8
OPSET = 17
NOTES = (
    "OpenVINO, layer by layer (its own profile beside a timer around every step of the plan, ResNet-50, 16 images): "
    "most 1 x 1 and 3 x 3 layers are within 5 % of each other, ours ahead in the stem and the pooling behind it. "
    "Against the rate of the 3 x 3 layers, 1 x 1 layers with 256 channels and more reach 95 to 100 %; 64 to 256 at 56 "
    "x 56 82 %, 75 with a residual (rounding and packing of sums of 64 products; a residual is asked for before the "
    "sums that it joins, 0.83 of the time it took before), 128 to 512 at 28 x 28 87 to 93 %. The next step is an "
    "epilogue that overlaps with the products of the next tile. ResNet-18 on 16 images spends 7.5 % in the first layer,"
    " 0.7 % quantizing and 0.5 to 0.9 % in the pool behind it; groups of 1 MB in place of 4, which the second cache "
    "holds, take 0.4 of that pool's time and as long as a whole.",
    "onnxruntime: three times its speed would take ResNets to 1.9 times the vpdpbusd rate (they are at 0.7 to 0.8 of "
    "it, 1.1 to 1.2 times as fast); MobileNetV2 to 0.7 of its floor.",
    "Between the layers: a sum takes the place of its residual, groups of images grow where images shrink (three in "
    "the first stage of ResNet-50, 16 in the last), and the next panel's weights are fetched while one is in use.",
)
# Noise of 8 bits after fifty layers of random weights, as a share of the largest logit; that of a network that
# computes something else exceeds it for every third logit.
QUANTIZED = Agreement(0.4, outliers=0.01, relative=True)


def images(count: int, seed: int) -> torch.Tensor:
    """Random images, smooth as images are, of zero mean and unit variance; channels_last."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, SIDE // 8, SIDE // 8, generator=generator)
    smooth = nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bilinear", align_corners=False)
    return (smooth / smooth.std()).contiguous(memory_format=torch.channels_last)


@cache
def float_model(name: str) -> nn.Module:
    """The network `name` with lived-in batch norms, in eval mode."""
    torch.manual_seed(0)
    model = channels_last(create_model(name, num_classes=1000, in_channels=3))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            # Zero-initialised residual branches would make half of the network vanish.
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            module.momentum = None  # the average over all that follows
    with torch.no_grad():
        model.train()(images(CALIBRATION_IMAGES, seed=1))
    model.eval()
    return model


@cache
def folded_model(name: str) -> nn.Module:
    """float_model with its batch norms folded into the convolutions, as any deployment does."""
    return channels_last(import_module("torch.fx.experimental.optimization").fuse(float_model(name)))


def channels_last(model: nn.Module) -> nn.Module:
    converted: nn.Module = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return converted


@cache
def int8_model(name: str) -> nn.Module:
    """Ours."""
    quantize = import_module("imgopt_fast.compress.quantize").quantize
    model: nn.Module = quantize(float_model(name), [images(CALIBRATION_IMAGES, seed=2)])
    return model


@cache
def fx_model(name: str) -> nn.Module:
    """torch's own quantization in FX graph mode for x86."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "x86"
    try:
        fx, mapping = import_module("torch.ao.quantization.quantize_fx"), import_module("torch.ao.quantization")
        example = (images(1, seed=2),)
        prepared = fx.prepare_fx(float_model(name), mapping.get_default_qconfig_mapping("x86"), example)
        with torch.no_grad():
            prepared(images(CALIBRATION_IMAGES, seed=2))
        converted: nn.Module = fx.convert_fx(prepared)
        return converted
    finally:
        torch.backends.quantized.engine = before


@cache
def qdq_model(name: str) -> bytes:
    """The network as ONNX with quantization nodes, by onnxruntime's tool: per channel, uint8 activations."""
    tool = import_module("onnxruntime.quantization")
    stream: Any = io.BytesIO()  # a path, says the annotation of torch.onnx.export; a stream, its text
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter that needs no further package is the old one
        torch.onnx.export(
            float_model(name), (images(1, seed=2).contiguous(),), stream, dynamo=False, opset_version=OPSET,
            input_names=["x"], output_names=["y"], dynamic_axes={"x": {0: "batch"}, "y": {0: "batch"}},
        )  # fmt: skip

    class Reader(tool.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.batches: Iterator[torch.Tensor] = iter(images(CALIBRATION_IMAGES, seed=2).contiguous().split(1))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"x": batch.numpy()}

    logging.disable(logging.WARNING)  # it recommends a step that changes nothing: the exporter has folded already
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "int8.onnx"
        tool.quantize_static(
            import_module("onnx").load_from_string(stream.getvalue()), target, Reader(),
            quant_format=tool.QuantFormat.QDQ, per_channel=True,
            activation_type=tool.QuantType.QUInt8, weight_type=tool.QuantType.QInt8,
        )  # fmt: skip
        logging.disable(logging.NOTSET)
        return target.read_bytes()


@dataclass(eq=False)
class Int8Case(Case):
    """A quantized network at one batch size."""

    subject: ClassVar[str] = "networks"
    model: str
    batch: int
    threads: int | None = None
    quick: bool = False

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.model} int8 N={self.batch}" + (", two threads" if self.threads == 2 else "")

    @cached_property
    def input(self) -> torch.Tensor:
        return images(self.batch, seed=3)

    def ours(self) -> Runner:
        return self.forward(int8_model(self.model))

    def peers(self) -> Mapping[str, Callable[[], Runner]]:
        return {
            "torch": lambda: self.forward(folded_model(self.model), 4.0),
            "torch fx int8": lambda: self.forward(fx_model(self.model), 1.4),
            "onnxruntime": self.with_onnxruntime,
            "openvino": self.with_openvino,
        }

    def forward(self, model: nn.Module, goal: float | None = None) -> Runner:
        x = self.input

        def call() -> Any:
            with torch.inference_mode():
                return model(x)

        return Runner(call, QUANTIZED, goal=goal)

    def with_onnxruntime(self) -> Runner:
        x = self.input.contiguous().numpy()
        call = onnx_models.onnxruntime_call(qdq_model(self.model), x, torch.get_num_threads())
        return Runner(call, QUANTIZED, torch.from_numpy, goal=3.0)

    def with_openvino(self) -> Runner:
        x = self.input.contiguous().numpy()
        call = onnx_models.openvino_call(qdq_model(self.model), x, torch.get_num_threads())
        return Runner(call, QUANTIZED, torch.from_numpy, goal=1.1)

    def work(self) -> Work:
        # Two operations per multiply-add of the convolutions and the classifier; the weights, a byte each, and the
        # float images are read once, the logits written. Activations may stay in a cache.
        products, weights = size_of(self.model)
        return Work(
            int8_ops=2.0 * self.batch * products,
            bytes_read=weights + 4.0 * self.input.numel(),
            bytes_written=4.0 * self.batch * 1000,
        )


@cache
def size_of(name: str) -> tuple[int, int]:
    """Multiply-adds per image, and number of weights, of the convolutions and linear layers."""
    model = float_model(name)
    return multiply_adds(model, images(1, seed=2)), sum(layer.weight.numel() for layer in layers_of(model))


def _cases() -> list[Case]:
    found: list[Case] = []
    for model in ("resnet18", "resnet50", "mobilenetv2"):
        for batch in (1, 16):
            quick = model == "resnet18" and batch == 1
            found += [Int8Case(model, batch, quick=quick), Int8Case(model, batch, threads=2)]
    return found


CASES = _cases()
