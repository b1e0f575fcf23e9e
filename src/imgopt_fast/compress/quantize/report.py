"""What became of each layer."""

import logging
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from imgopt_fast import _native
from imgopt_fast.compress.quantize.fuse import SILENT, Fusion
from imgopt_fast.compress.quantize.names import key, unique
from imgopt_fast.compress.quantize.sensitivity import LayerSensitivity
from imgopt_fast.compress.quantize.trace import constant, layer_name
from imgopt_fast.nn import Int8Segment

if TYPE_CHECKING:  # profile takes the Int8Model that carries this report
    from imgopt_fast.compress.quantize.profile import NetworkProfile


@dataclass(frozen=True)
class LayerReport:
    """One layer or float operation. `dtype` is what really runs; `reason` says why it is not int8, "" where it is.

    `share` of the time, `live_bytes` of activations while it runs, and `decibels` and `score` of the network in which
    it alone is int8 are None until `QuantizationReport.measured` fills them in. `zeros` says of a pruned int8 layer
    whether its zeros are skipped.
    """

    name: str
    operation: str
    dtype: str
    reason: str
    parameters: int
    share: float | None = None
    live_bytes: int | None = None
    decibels: float | None = None
    score: float | None = None
    zeros: str = ""


# The measured columns: field, heading, how a value is written.
_MEASURED: list[tuple[str, str, Callable[[Any], str]]] = [
    ("share", "time", "{:.1%}".format),
    ("live_bytes", "KiB live", lambda size: f"{size / 1024:.1f}"),
    ("decibels", "dB alone", "{:.1f}".format),
    ("score", "score", "{:.4g}".format),
]


@dataclass
class QuantizationReport:
    """Rows in the order of execution; `segments` counts the calls that run int8 parts, `notes` are warnings.

    `floats` names the network's float operations in the order of its graph, also those that only change shapes.
    """

    layers: list[LayerReport]
    segments: int
    notes: list[str] = field(default_factory=list)
    floats: list[str] = field(default_factory=list)

    @property
    def int8_layers(self) -> list[str]:
        return [layer.name for layer in self.layers if layer.dtype == "int8"]

    @property
    def float_layers(self) -> dict[str, str]:
        """Name of each part that stayed float, and why."""
        return {layer.name: layer.reason for layer in self.layers if layer.dtype != "int8"}

    def measured(
        self, profile: "NetworkProfile | None" = None, sensitivity: Iterable[LayerSensitivity] = ()
    ) -> "QuantizationReport":
        """This report with the columns that `profile` and `sensitivity` measured; layers without a measurement keep
        theirs empty."""
        steps = {} if profile is None else {key(step.name): step for step in profile.steps}
        noise = {layer.name: layer for layer in sensitivity}
        layers = []
        for layer in self.layers:
            if step := steps.get(key(layer.name)):
                layer = replace(layer, share=step.share, live_bytes=step.live_bytes)
            if found := noise.get(layer.name):
                layer = replace(layer, decibels=found.decibels, score=found.score)
            layers.append(layer)
        return replace(self, layers=layers)

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers] + [5])
        shown = [column for column in _MEASURED if any(getattr(layer, column[0]) is not None for layer in self.layers)]
        head = "".join(f"  {title:>8}" for _, title, _ in shown)
        lines = [f"{'layer':{width}}  {'operation':20}  {'runs in':8}{head}  why not int8"]
        for layer in self.layers:
            cells = ((getattr(layer, field), write) for field, _, write in shown)
            values = "".join(f"  {'' if value is None else write(value):>8}" for value, write in cells)
            line = f"{layer.name:{width}}  {layer.operation:20}  {layer.dtype:8}{values}  {layer.reason or layer.zeros}"
            lines.append(line.rstrip())
        total = sum(layer.parameters for layer in self.layers)
        inside = sum(layer.parameters for layer in self.layers if layer.dtype == "int8")
        lines.append(f"{inside:,} of {total:,} weights in int8, in {self.segments} segments")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def describe(graph: GraphModule, fusion: Fusion, network: GraphModule) -> QuantizationReport:
    """The report of a graph's int8 operations and of everything that stays float beside them in `network`."""
    segments = [part for part in network.children() if isinstance(part, Int8Segment)]
    names = _float_names(fusion)
    zeros = {name: text for segment in segments for name, text in segment.zeros().items()}
    layers = []
    for node in graph.graph.nodes:
        if node in fusion.operations:
            operation = fusion.operations[node]
            weights = 0 if operation.weight is None else operation.weight.numel()
            text = zeros.get(key(operation.name), "")
            layers.append(LayerReport(operation.name, operation.kind, "int8", "", weights, zeros=text))
        elif node in fusion.reasons and node.target not in SILENT and _computes(node):
            layers.append(_float_row(graph, node, names[node.name], fusion.reasons[node]))
    floats = [names.get(node.name, node.name) for node in float_operations(network)]
    return QuantizationReport(layers, len(segments), floats=floats)


def float_operations(network: GraphModule) -> list[Node]:
    """What a quantized network computes outside of its segments. Their order survives pickling, their names do not."""
    return [node for node in network.graph.nodes if node.op == "call_function" and node.target is not operator.getitem]


def _float_names(fusion: Fusion) -> dict[str, str]:
    """The unique name of every float operation, its module's where it is in one, by the name of its node."""
    taken = {key(operation.name) for operation in fusion.operations.values()}
    shown_first = sorted(fusion.reasons, key=lambda node: node.target in SILENT)
    return {node.name: unique(layer_name(node) or node.name, taken) for node in shown_first}


def _computes(node: Node) -> bool:
    """Whether `node` gives tensors, one or several, and not sizes."""
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(node.meta.get("val")))


def _float_row(graph: GraphModule, node: Node, name: str, reason: str) -> LayerReport:
    operation = str(node.target).removeprefix("aten.").removesuffix(".default")
    constants = [constant(graph, source) for source in node.all_input_nodes]
    weights = sum(value.numel() for value in constants if value is not None and value.ndim > 1)
    if operation.startswith("imgopt_fast.int8"):  # the model's own `nn.Int8Conv2d`, or a part that is quantized already
        return LayerReport(name, operation.removeprefix("imgopt_fast."), "int8", "", weights)
    return LayerReport(name, operation, "float32", reason, weights)


def notes(report: QuantizationReport) -> list[str]:
    """What a user should know before relying on the network."""
    if not report.int8_layers:
        return ["no layer runs in int8, the report has the reasons; the network is the float one"]
    slow = speed_note()
    return [] if slow is None else [slow]


def speed_note() -> str | None:
    """Why int8 cannot be faster than float in this process, None where it can; logged once by `quantize`."""
    backend = _native.backend()
    if backend != "native":
        return f"int8 runs on the {backend} backend, which is slower than float32; `imgopt-fast doctor` says why"
    if _native.active_isa() == "scalar":
        return "int8 runs on the scalar kernels, which are slower than float32: this CPU or IMGOPT_ISA offers no better"
    return None


def log_once(note: str) -> None:
    if note not in _logged:
        _logged.add(note)
        logging.getLogger("imgopt_fast").warning(note)


_logged: set[str] = set()
