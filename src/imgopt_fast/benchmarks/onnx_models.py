"""Quantized layers as ONNX models, and how onnxruntime and OpenVINO are made to run them at their best.

onnxruntime gets QLinearConv, its own operator; OpenVINO the same layer between QuantizeLinear and DequantizeLinear,
which it fuses. Both write into memory that they own, take the given number of threads, and do nothing else.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

OPSET = 19  # the first with every type that the quantized operators take; onnxruntime and OpenVINO know it well


class QuantizedConv(NamedTuple):
    """A convolution uint8 -> uint8 with zero points of zero."""

    input_shape: tuple[int, ...]
    weight: np.ndarray
    weight_scale: np.ndarray
    bias: np.ndarray  # int32, in steps of input_scale * weight_scale
    input_scale: float
    output_scale: float
    stride: int
    padding: int
    groups: int

    def attributes(self) -> dict[str, Any]:
        return {
            "kernel_shape": list(self.weight.shape[2:]),
            "strides": [self.stride] * 2,
            "pads": [self.padding] * 4,
            "group": self.groups,
        }

    def constants(self) -> dict[str, np.ndarray]:
        return {
            "x_scale": np.asarray(self.input_scale, np.float32),
            "y_scale": np.asarray(self.output_scale, np.float32),
            "zero": np.asarray(0, np.uint8),
            "w": self.weight,
            "w_scale": self.weight_scale,
            "w_zero": np.zeros(len(self.weight), np.int8),
            "b": self.bias,
            "b_scale": (np.float32(self.input_scale) * self.weight_scale).astype(np.float32),
            "b_zero": np.zeros(len(self.weight), np.int32),
        }


def qlinear_conv(layer: QuantizedConv) -> bytes:
    """The layer as one QLinearConv."""
    helper = import_module("onnx.helper")
    names = ["x", "x_scale", "zero", "w", "w_scale", "w_zero", "y_scale", "zero", "b"]
    return model_of(layer, [helper.make_node("QLinearConv", names, ["y"], **layer.attributes())])


def qdq_conv(layer: QuantizedConv) -> bytes:
    """The layer in float between dequantization and quantization, for compilers that fuse the pattern.

    Its input is float32 and quantized inside: from a uint8 input in NHWC, OpenVINO 2026.4 dequantizes and computes in
    float (660 us instead of 290 for 3x3 64->64 @56 on a Zen 5 core), and from one in NCHW it reorders (390 us).
    """
    node = import_module("onnx.helper").make_node
    nodes = [
        node("QuantizeLinear", ["x", "x_scale", "zero"], ["xq"]),
        node("DequantizeLinear", ["xq", "x_scale", "zero"], ["xf"]),
        node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["wf"], axis=0),
        node("DequantizeLinear", ["b", "b_scale", "b_zero"], ["bf"], axis=0),
        node("Conv", ["xf", "wf", "bf"], ["yf"], **layer.attributes()),
        node("QuantizeLinear", ["yf", "y_scale", "zero"], ["y"]),
    ]
    return model_of(layer, nodes, float_input=True)


def model_of(layer: QuantizedConv, nodes: list[Any], *, float_input: bool = False) -> bytes:
    """Serialized model with input x and output y, uint8 unless said; only the constants that the nodes use."""
    helper, numpy_helper = import_module("onnx.helper"), import_module("onnx.numpy_helper")
    types = import_module("onnx").TensorProto
    used = {name for node in nodes for name in node.input}
    constants = [numpy_helper.from_array(value, name) for name, value in layer.constants().items() if name in used]
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", types.FLOAT if float_input else types.UINT8, layer.input_shape)],
        [helper.make_tensor_value_info("y", types.UINT8, [layer.input_shape[0], len(layer.weight), None, None])],
        constants,
    )
    # IR version 10 goes with the opset and is older than any runtime that can read it.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    data: bytes = model.SerializeToString()
    return data


def onnxruntime_call(model: bytes, value: np.ndarray, threads: int) -> Callable[[], np.ndarray]:
    """Runs the model on `value` with bound input and output, so that nothing is copied or allocated per call."""
    ort = import_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name, output = session.get_inputs()[0].name, session.get_outputs()[0].name
    binding = session.io_binding()
    binding.bind_cpu_input(name, value)
    first = session.run(None, {name: value})[0]
    target = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(first))
    binding.bind_ortvalue_output(output, target)

    def call(_alive: np.ndarray = value) -> np.ndarray:  # the binding only points to the value
        session.run_with_iobinding(binding)
        result: np.ndarray = target.numpy()
        return result

    return call


def openvino_call(
    model: bytes, value: np.ndarray, threads: int, *, channels_last: bool = False
) -> Callable[[], np.ndarray]:
    """Runs the model on `value`, compiled for latency on the CPU.

    With `channels_last`, input and output are NHWC, which is what OpenVINO computes in: it then reorders nothing.
    """
    ov = import_module("openvino")
    core = ov.Core()
    network = core.read_model(model)
    network.reshape(network.inputs[0].partial_shape if channels_last else list(value.shape))
    if channels_last:
        preprocess = import_module("openvino.preprocess").PrePostProcessor(network)
        nhwc, nchw = ov.Layout("NHWC"), ov.Layout("NCHW")
        preprocess.input().tensor().set_layout(nhwc)
        preprocess.input().model().set_layout(nchw)
        preprocess.output().tensor().set_layout(nhwc)
        preprocess.output().model().set_layout(nchw)
        network = preprocess.build()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        # No stream means the calling thread: no hand-over to another one, which costs much on a busy machine.
        "NUM_STREAMS": 0 if threads == 1 else 1,
        # The process is pinned already, and float parts are to be compared as float32.
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = core.compile_model(network, "CPU", settings).create_infer_request()
    request.set_input_tensor(ov.Tensor(value, shared_memory=True))

    def call(_alive: np.ndarray = value) -> np.ndarray:  # the tensor only points to the value
        request.infer()
        result: np.ndarray = request.get_output_tensor().data
        return result

    return call
