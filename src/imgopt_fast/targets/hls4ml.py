"""From a QONNX file of ours to an hls4ml project: C++ for high-level synthesis, and its simulation.

hls4ml takes fewer forms than QONNX has. A bias is the convolution's third input there, not an Add; and the weights of a
layer share one fixed-point type, so that those of channels with unlike scales are put on the finest one, with as many
more bits as the scales differ. None of it changes a value. Only the biases and the images have no Quant node to take a
type from: they get the default type, made as wide as the biases need.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from imgopt_fast.targets.qonnx import readable

IMAGE_BITS = 32  # fraction of the type of an image's values, which the first Quant node rounds
INTEGER_BITS = 16  # of the default type


def convert(path: str | Path, folder: str | Path, image_shape: tuple[int, int, int], **options: Any) -> Any:
    """An hls4ml `ModelGraph` of the QONNX file `path`, its project in `folder`.

    Call `compile()` on it for the C simulation, `predict(images)` on float32 (N, C, H, W), and `build()` for synthesis
    where the vendor's tools are installed.

    Args:
        path: what `export(model, "qonnx", path)` wrote. What hls4ml cannot take, such as an unsigned zero point, it
            refuses with an exception of its own.
        image_shape: (C, H, W) of one image.
        options: of `hls4ml.converters.convert_from_onnx_model`, such as `backend` (here "Vitis" by default) and `part`.
    """
    hls4ml = import_module("hls4ml")
    model = prepare(path, image_shape)
    fraction = max([IMAGE_BITS, *(_fraction_bits(value) for value in _biases(model))])
    options = {"backend": "Vitis", "io_type": "io_parallel"} | options
    config = hls4ml.utils.config.config_from_onnx_model(
        model,
        granularity="name",
        backend=options["backend"],
        default_precision=f"ap_fixed<{INTEGER_BITS + fraction},{INTEGER_BITS}>",
    )
    return hls4ml.converters.convert_from_onnx_model(model, output_dir=str(folder), hls_config=config, **options)


def prepare(path: str | Path, image_shape: tuple[int, int, int]) -> Any:
    """The file as a qonnx `ModelWrapper` in the forms that hls4ml reads: channels last, for one image."""
    wrapper, cleanup = import_module("qonnx.core.modelwrapper"), import_module("qonnx.util.cleanup")
    channels_last = import_module("qonnx.transformation.channels_last")
    with readable():
        model = wrapper.ModelWrapper(str(path))
        model.set_tensor_shape("images", [1, *image_shape])
        _share_scales(model)
        model = cleanup.cleanup_model(model)
        model = cleanup.cleanup_model(model.transform(channels_last.ConvertToChannelsLastAndClean()))
    _join_biases(model)
    return model


def _share_scales(model: Any) -> None:
    """Put the weights of every layer on its finest scale."""
    for node in model.graph.node:
        scale = model.get_initializer(node.input[1]) if node.op_type == "Quant" else None
        if scale is None or scale.size == 1:
            continue
        bits = float(model.get_initializer(node.input[3])) + np.log2(scale.max() / scale.min())
        model.set_initializer(node.input[1], np.asarray(scale.min(), np.float32))
        model.set_initializer(node.input[3], np.asarray(bits, np.float32))


def _join_biases(model: Any) -> None:
    """Make what is added to a convolution its third input, and every bias a vector."""
    for node in list(model.graph.node):
        bias = model.get_initializer(node.input[1]) if node.op_type == "Add" else None
        if bias is None:
            continue
        model.set_initializer(node.input[1], bias.reshape(-1))
        producer = model.find_producer(node.input[0])
        if producer.op_type == "Conv":
            producer.input.append(node.input[1])
            producer.output[0] = node.output[0]
            model.graph.node.remove(node)


def _biases(model: Any) -> list[Any]:
    places = {"Conv": 2, "Add": 1}
    named = [node.input[places[node.op_type]] for node in model.graph.node if node.op_type in places]
    return [value for value in map(model.get_initializer, named) if value is not None]


def _fraction_bits(values: Any) -> int:
    """Bits behind the binary point that hold every one of `values` exactly."""
    bits = 0
    while not np.array_equal(scaled := np.ldexp(values.astype(np.float64), bits), np.round(scaled)):
        bits += 1
    return bits
