"""A model on its way to int8: traced, folded, fused and calibrated, not yet converted."""

from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch.fx import GraphModule, Node

from imgopt_fast.compress.quantize.calibrate import Scale
from imgopt_fast.compress.quantize.config import Int8Config
from imgopt_fast.compress.quantize.fuse import PASSING, Fusion


@dataclass(eq=False)
class Plan:
    """Everything that conversion, training and analysis need to know. Nothing writes to it, so copies share it."""

    graph: GraphModule
    image_size: tuple[int, ...] | None  # where the graph is bound to one
    input_shape: tuple[int, ...]  # of one image of the calibration
    fusion: Fusion
    scales: dict[Node, Scale]  # for each of `scaled_nodes`
    config: Int8Config

    def __deepcopy__(self, memo: dict[int, Any]) -> "Plan":
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "a network in quantization-aware training does not pickle: save its state_dict(), which loads into that of "
            "another qat() with the same calibration, or the network that convert() returns"
        )

    @property
    def device(self) -> torch.device:
        """Where its weights are; the CPU without any."""
        weights = (operation.weight for operation in self.fusion.operations.values() if operation.weight is not None)
        return next(chain(weights, self.graph.parameters(), self.graph.buffers()), torch.empty(0)).device

    def scale_of(self, node: Node) -> Scale:
        """The quantization of a value, looked up through the operations that hand their input's on."""
        while node in self.fusion.operations and self.fusion.operations[node].kind in PASSING:
            node = self.fusion.operations[node].inputs[0]
        return self.scales[node]

    def sources(self, node: Node) -> list[Node]:
        """What a node of `order` reads."""
        operation = self.fusion.operations.get(node)
        return node.all_input_nodes if operation is None else operation.sources

    @cached_property
    def output(self) -> Node:
        node: Node = next(node for node in self.graph.graph.nodes if node.op == "output")
        return node

    @cached_property
    def order(self) -> list[Node]:
        """The nodes that remain when operations swallow theirs, in an order that respects dependencies."""
        return [node for node in self.graph.graph.nodes if node in self.fusion.readers]

    @cached_property
    def last_read(self) -> dict[Node, list[Node]]:
        """Which values a node is the last to read; those of the output are kept."""
        last = {source: node for node in self.order for source in self.sources(node)}
        found: dict[Node, list[Node]] = {}
        for source, node in last.items():
            if source not in self.output.all_input_nodes:
                found.setdefault(node, []).append(source)
        return found


def scaled_nodes(fusion: Fusion) -> list[Node]:
    """The nodes whose values are quantized with a scale of their own."""
    found: dict[Node, None] = {}
    for node, operation in fusion.operations.items():
        found |= {source: None for source in operation.sources if source not in fusion.operations}
        if operation.kind not in PASSING and not fusion.gives_float(operation):
            found[node] = None
    return list(found)
