"""Quantized ONNX networks on our kernels: QDQ and integer models as one `int8_graph` program.

The graph (graph.py) is read backwards from its outputs (reader.py). A tensor of stored integers is a value of the
program (stored.py); the float tensors between DequantizeLinear and QuantizeLinear exist only as the operation that the
pair surrounds, with the Relu, Clip and Add in between fused into it as the kernels fuse them (real.py). What is
constant is computed first, by onnx's reference. Weights of any zero point are taken (products.py).
"""

from importlib import import_module
from pathlib import Path
from typing import Any

from imgopt_fast.compress.from_onnx.network import OnnxNetwork
from imgopt_fast.compress.from_onnx.reader import Reader

__all__ = ["OnnxNetwork", "from_onnx"]


def from_onnx(model: Any) -> OnnxNetwork:
    """The quantized ONNX `model` (a path, its bytes or a ModelProto) as a module that runs on `int8_graph`.

    Understood are QDQ models, whose layers stand between DequantizeLinear and QuantizeLinear, and QLinearConv,
    QLinearMatMul, ConvInteger and MatMulInteger with constant weights; around them Relu, Clip, Add, Concat, pools,
    Flatten and Reshape. The sums of the last two may be scaled in float (Cast, Mul by a constant, Add) and rounded by
    QuantizeLinear, which is how `export` with `form="qlinear"` writes what QLinearConv cannot say. The arithmetic is
    that of `int8_conv2d`, which is QLinearConv's; an engine that rounds its multipliers in another way may differ by
    one step where a sum lies between two.

    Raises ValueError, naming the node and the way out, for what has no int8 form; ImportError without onnx.
    """
    onnx = import_module("onnx")
    if isinstance(model, (str, Path)):
        model = onnx.load(model)
    elif isinstance(model, bytes):
        model = onnx.load_from_string(model)
    return Reader(model).network()
