"""What became of each layer."""

import logging
from dataclasses import dataclass, field

from torch import Tensor
from torch.fx import GraphModule, Node

from imgopt_fast import _native
from imgopt_fast.compress.quantize.fuse import SILENT, Fusion
from imgopt_fast.compress.quantize.trace import constant, layer_name


@dataclass(frozen=True)
class LayerReport:
    """One layer or float operation. `dtype` is what really runs; `reason` says why it is not int8, "" where it is."""

    name: str
    operation: str
    dtype: str
    reason: str
    parameters: int


@dataclass
class QuantizationReport:
    """Rows in the order of execution; `segments` counts the calls that run int8 parts, `notes` are warnings."""

    layers: list[LayerReport]
    segments: int
    notes: list[str] = field(default_factory=list)

    @property
    def int8_layers(self) -> list[str]:
        return [layer.name for layer in self.layers if layer.dtype == "int8"]

    @property
    def float_layers(self) -> dict[str, str]:
        """Name of each part that stayed float, and why."""
        return {layer.name: layer.reason for layer in self.layers if layer.dtype != "int8"}

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers] + [5])
        lines = [f"{'layer':{width}}  {'operation':20}  {'runs in':8}  why not int8"]
        for layer in self.layers:
            lines.append(f"{layer.name:{width}}  {layer.operation:20}  {layer.dtype:8}  {layer.reason}".rstrip())
        total = sum(layer.parameters for layer in self.layers)
        inside = sum(layer.parameters for layer in self.layers if layer.dtype == "int8")
        lines.append(f"{inside:,} of {total:,} weights in int8, in {self.segments} segments")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def describe(graph: GraphModule, fusion: Fusion, segments: int) -> QuantizationReport:
    """The report of a graph's int8 operations and of everything that stays float beside them."""
    layers = []
    for node in graph.graph.nodes:
        if node in fusion.operations:
            operation = fusion.operations[node]
            weights = 0 if operation.weight is None else operation.weight.numel()
            layers.append(LayerReport(operation.name, operation.kind, "int8", "", weights))
        elif node in fusion.reasons and node.target not in SILENT and isinstance(node.meta.get("val"), Tensor):
            layers.append(_float_row(graph, node, fusion.reasons[node]))
    return QuantizationReport(layers, segments)


def _float_row(graph: GraphModule, node: Node, reason: str) -> LayerReport:
    name = layer_name(node) or node.name
    operation = str(node.target).removeprefix("aten.").removesuffix(".default")
    constants = [constant(graph, source) for source in node.all_input_nodes]
    weights = sum(value.numel() for value in constants if value is not None and value.ndim > 1)
    return LayerReport(name, operation, "float32", reason, weights)


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
