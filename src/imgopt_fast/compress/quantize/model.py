"""`quantize`, and the network that it returns."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from imgopt_fast._arguments import described
from imgopt_fast.compress.quantize.config import Int8Config
from imgopt_fast.compress.quantize.convert import convert
from imgopt_fast.compress.quantize.plan import Plan
from imgopt_fast.compress.quantize.prepare import make_plan
from imgopt_fast.compress.quantize.report import QuantizationReport, describe, log_once, notes
from imgopt_fast.nn.int8 import Float32Buffers


class Int8Model(Float32Buffers):
    """A quantized network: floating input of any precision, float32 output, int8 between them. Inference only.

    `network` is an ordinary graph module of `nn.Int8Segment`s and float operations; print `report` for what runs how.
    `input_shape` is that of the calibration's images, (C, H, W). What is not int8 is float32, also after `half()`.

    Raises TypeError and ValueError, naming `images`, for ones that are not floating or of another shape.
    """

    def __init__(
        self,
        network: GraphModule,
        report: QuantizationReport,
        image_size: tuple[int, ...] | None,
        input_shape: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.network = network
        self.report = report
        self.image_size = image_size
        self.input_shape = input_shape
        self.eval()

    def forward(self, images: Tensor) -> Any:
        if not isinstance(images, Tensor) or not images.is_floating_point():
            raise TypeError(f"images: expected a floating tensor, as in calibration, got {described(images, Tensor)}")
        if images.ndim != 1 + len(self.input_shape) or images.shape[1:2] != self.input_shape[:1]:
            raise ValueError(
                f"images: expected a batch of {self.input_shape} each, as in calibration, got {tuple(images.shape)}"
            )
        if self.image_size is not None and tuple(images.shape[2:]) != self.image_size:
            raise ValueError(
                f"images: expected size {self.image_size}, which the padding was computed for at calibration, "
                f"got {tuple(images.shape[2:])}"
            )
        return self.network(images.float())

    def train(self, mode: bool = True) -> "Int8Model":
        """Stays as it is: nothing here trains, and a network around it may."""
        return super().train(False)


def quantize(model: nn.Module, calibration: Iterable[Any], config: Int8Config | None = None) -> Int8Model:
    """Quantize `model` to int8 after training.

    Args:
        model: any module that torch.export can trace, with one image tensor (N, C, H, W) as input and anything as
            output; of any precision, device, memory format and mode. It is not changed. Masked layers count as dense
            ones whose masked weights are zero; where skipping zeros is faster than int8 dot products over them, they
            are skipped, and `report` says where.
        calibration: batches of real input, as the model takes them: floating tensors, or tuples whose first element is
            one, as data loaders give; computed in float32. 100 to 500 images are enough; memory does not grow with
            their number.
        config: see `Int8Config`.

    Returns a module with float input and output and a plain state_dict. Convolutions and linear layers with constant
    weights run in int8, and what lies between them as far as it has an int8 form; the rest stays float, and `report`
    names it with the reason.

    Raises:
        ValueError: no calibration batch, values that are not finite, an unknown name in `config.exclude`, a model that
            cannot be traced, or a layer whose sums could overflow; the message names the layer and the way out.
        TypeError: batches that are not floating tensors, a model or a config that is none.
    """
    return to_int8(make_plan(model, calibration, config or Int8Config()))


def to_int8(plan: Plan, attributes: nn.Module | None = None) -> Int8Model:
    """The network of a plan, with its report; `attributes` as for `convert`."""
    network = convert(plan, attributes).to(plan.device)
    report = describe(plan.graph, plan.fusion, network)
    report.notes += notes(report)
    for note in report.notes:
        log_once(note)
    return Int8Model(network, report, plan.image_size, plan.input_shape)
