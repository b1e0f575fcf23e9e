"""The one way in which an exporter says no: the layer, the reason, the way out."""

from imgopt_fast.targets.network import FLOAT, Layer

WAYS_OUT = {
    "onnx": "replace it in the model, or take --format pt2, which carries every layer",
    "c": "replace it in the model (ReLU for SiLU, a pool for a gate), or take --format onnx",
    "qonnx": "replace it in the model (ReLU for SiLU, a pool for a gate), or take --format onnx",
    "stablehlo": "replace it in the model, or take --format pt2, which carries every layer",
}


def refuse(layer: Layer, format: str, reason: str) -> ValueError:
    """The error for a layer that a format cannot carry."""
    what = str(layer.operation).removesuffix(".default") if layer.kind == FLOAT else layer.kind
    return ValueError(f"{layer.name} ({what}): {format} cannot carry it: {reason}; {WAYS_OUT[format]}")
