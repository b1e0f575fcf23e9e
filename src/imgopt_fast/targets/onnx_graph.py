"""An ONNX graph in the making: nodes, constants, names; pruned weights stored small.

ONNX's own sparse tensors hold an int64 index per value, onnx's shape inference does not know them, and OpenVINO refuses
models that have one (2026.4). A pruned weight is therefore stored as values and one-byte gaps between their places,
from which Cast, CumSum and ScatterElements make the weight when an engine loads the model: 5 bytes per kept float
instead of 12, in standard operators that every engine folds.
"""

from importlib import import_module
from typing import Any

import numpy as np
import torch

from imgopt_fast import __version__
from imgopt_fast.targets.network import Network
from imgopt_fast.targets.verification import Array

# 19 is the first opset in which the quantized operators take every type; IR version 10 is what engines of 2024 read.
OPSET, IR_VERSION = 19, 10
MOST_GAP = 255  # a gap is one byte; a longer one passes over stored zeros


class Graph:
    """An ONNX graph in the making: nodes, constants, and the name of every value of the network."""

    def __init__(self, network: Network, *, domains: dict[str, int] | None = None) -> None:
        self.network = network
        self.helper, self.numpy_helper = import_module("onnx.helper"), import_module("onnx.numpy_helper")
        self.domains = {"": OPSET} | (domains or {})
        self.nodes: list[Any] = []
        self.made: set[str] = set()  # names of what the nodes give
        self.constants: dict[str, Array] = {}
        self.names = {value: described.name for value, described in enumerate(network.values)}
        self.names[network.input] = "images"
        if len(network.outputs) == 1:
            self.names[network.outputs[0]] = "output"
        for value in network.constants:
            self.constant(self.names[value], network.tensors[value].numpy())

    def constant(self, name: str, array: Any, dtype: Any = None) -> str:
        self.constants[name] = np.asarray(array, dtype)
        return name

    def node(self, operator: str, inputs: list[str], output: str, domain: str = "", **attributes: Any) -> str:
        self.made.add(output)
        self.nodes.append(self.helper.make_node(operator, inputs, [output], name=output, domain=domain, **attributes))
        return output

    def weight(self, name: str, array: Array) -> str:
        """A constant weight; one that is mostly zeros is stored as gaps and values where that is smaller."""
        packed = sparse(array)
        if packed is None:
            return self.constant(name, array)
        gaps, values = packed
        places = self.node("Cast", [self.constant(f"{name}_gaps", gaps)], f"{name}_steps", to=6)  # int32
        places = self.node("CumSum", [places, self.constant("zero", 0, np.int64)], f"{name}_places")
        zero = self.numpy_helper.from_array(np.zeros(1, array.dtype))
        size = self.constant(f"{name}_size", [array.size], np.int64)
        flat = self.node("ConstantOfShape", [size], f"{name}_zeros", value=zero)
        flat = self.node("ScatterElements", [flat, places, self.constant(f"{name}_values", values)], f"{name}_flat")
        return self.node("Reshape", [flat, self.constant(f"{name}_shape", array.shape, np.int64)], name)

    def serialize(self) -> bytes:
        onnx = import_module("onnx")
        types = {torch.float32: onnx.TensorProto.FLOAT, torch.uint8: onnx.TensorProto.UINT8}

        def info(value: int) -> Any:
            described = self.network.values[value]
            return self.helper.make_tensor_value_info(
                self.names[value], types[described.dtype], ["batch", *described.shape[1:]]
            )

        used = {name for node in self.nodes for name in node.input}
        graph = self.helper.make_graph(
            self.nodes,
            "network",
            [info(self.network.input)],
            [info(value) for value in self.network.outputs],
            [self.numpy_helper.from_array(array, name) for name, array in self.constants.items() if name in used],
        )
        model = self.helper.make_model(
            graph,
            opset_imports=[self.helper.make_opsetid(domain, version) for domain, version in self.domains.items()],
            ir_version=IR_VERSION,
            producer_name="imgopt_fast",
            producer_version=__version__,
        )
        # Shape inference stops at operators of other domains.
        onnx.checker.check_model(model, full_check=len(self.domains) == 1)
        data: bytes = model.SerializeToString()
        return data


def sparse(array: Array) -> tuple[Array, Array] | None:
    """(gaps, values) of an array in row order, or None where that is no smaller.

    A gap is the distance to the place of the value before; the first one counts from the beginning of the array.
    """
    flat = array.ravel()
    places = np.flatnonzero(flat)
    ends = np.diff(places, prepend=0)
    extra = [np.arange(at - step + MOST_GAP, at, MOST_GAP) for at, step in zip(places, ends, strict=True)
             if step > MOST_GAP]  # fmt: skip
    places = np.unique(np.concatenate([places, *extra])).astype(np.int64)
    if not len(places) or len(places) * (1 + array.itemsize) >= 0.9 * array.nbytes:
        return None
    return np.diff(places, prepend=0).astype(np.uint8), flat[places]


def pair(value: Any) -> list[int]:
    """[h, w] of a number, a list of one or a list of two."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * 2 if len(values) == 1 else values
