"""`quantize`, and the network that it returns."""

from collections.abc import Iterable
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from imgopt_fast.compress.quantize.calibrate import choose_scale, images_of, observe
from imgopt_fast.compress.quantize.config import Int8Config
from imgopt_fast.compress.quantize.convert import convert, scaled_nodes, share_concat_scales
from imgopt_fast.compress.quantize.fold import fold
from imgopt_fast.compress.quantize.fuse import fuse
from imgopt_fast.compress.quantize.report import QuantizationReport, describe, log_once, speed_note
from imgopt_fast.compress.quantize.trace import trace
from imgopt_fast.nn import Int8Segment


class Int8Model(nn.Module):
    """A quantized network: float input, float output, int8 between them. Inference only.

    `network` is an ordinary graph module of `nn.Int8Segment`s and float operations; print `report` for what runs how.
    """

    def __init__(self, network: GraphModule, report: QuantizationReport, image_size: tuple[int, ...] | None) -> None:
        super().__init__()
        self.network = network
        self.report = report
        self.image_size = image_size
        self.eval()

    def forward(self, images: Tensor) -> Any:
        if self.image_size is not None and tuple(images.shape[2:]) != self.image_size:
            raise ValueError(
                f"images: expected size {self.image_size}, which the padding was computed for at calibration, "
                f"got {tuple(images.shape[2:])}"
            )
        return self.network(images)

    def train(self, mode: bool = True) -> "Int8Model":
        """Raises RuntimeError when `mode` is set: an int8 network has nothing to train."""
        if mode:
            raise RuntimeError(
                "an int8 network does not train; train the float network, with `qat` if int8 costs accuracy"
            )
        super().train(False)
        return self


def quantize(model: nn.Module, calibration: Iterable[Any], config: Int8Config | None = None) -> Int8Model:
    """Quantize `model` to int8 after training.

    Args:
        model: any module that torch.export can trace, with one image tensor (N, C, H, W) as input and anything as
            output. It is not changed. Masked layers count as dense ones whose masked weights are zero.
        calibration: batches of real input, as the model takes them: floating tensors, or tuples whose first element is
            one, as data loaders give. 100 to 500 images are enough; memory does not grow with their number.
        config: see `Int8Config`.

    Returns a module with float input and output and a plain state_dict. Convolutions and linear layers with constant
    weights run in int8, and what lies between them as far as it has an int8 form; the rest stays float, and `report`
    names it with the reason.

    Raises:
        ValueError: no calibration batch, values that are not finite, an unknown name in `config.exclude`, a model that
            cannot be traced, or a layer whose sums could overflow; the message names the layer and the way out.
        TypeError: batches that are not floating tensors.
    """
    config = config or Int8Config()
    batches = images_of(calibration, model)
    first = next(batches, None)
    if first is None:
        raise ValueError("calibration: expected at least one batch of images, got none")
    graph, image_size = trace(model, first)
    fold(graph)
    fusion = fuse(graph, config.exclude)
    names = {node: operation.name for node, operation in fusion.operations.items()}
    histograms = observe(graph, scaled_nodes(fusion), chain([first], batches), names)
    scales = {node: choose_scale(histogram, config) for node, histogram in histograms.items()}
    share_concat_scales(fusion, scales)
    network = convert(graph, fusion, scales, config)
    segments = sum(isinstance(part, Int8Segment) for part in network.children())
    report = describe(graph, fusion, segments)
    note = speed_note()
    if note is not None:
        report.notes.append(note)
        log_once(note)
    return Int8Model(network, report, image_size)
