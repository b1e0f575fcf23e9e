"""Fast affine augmentation, int8 convolution and sparse masked matmul, and the training loop they make possible.

The names below are resolved on first use (PEP 562): `import imgopt_fast.numpy` needs no torch, and
`import imgopt_fast` costs milliseconds.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME_OF = {
    "affine_warp": "ops.affine_warp",
    "int8_conv2d": "ops.int8_conv2d",
    "pack_int8_weight": "ops.int8_conv2d",
    "PackedInt8Weight": "ops.int8_conv2d",
    "masked_matmul": "ops.masked_matmul",
    "masked_conv2d": "ops.masked_matmul",
    "int8_masked_matmul": "ops.masked_matmul",
    "mask_layout": "ops.masked_matmul",
    "pack_int8_masked_weight": "ops.masked_matmul",
    "pack_masked_weight": "ops.masked_matmul",
    "MaskLayout": "ops.masked_matmul",
    "PackedInt8MaskedWeight": "ops.masked_matmul",
    "PackedMaskedWeight": "ops.masked_matmul",
    "ExportReport": "targets",
    "export": "targets",
    "TrainConfig": "training",
    "train": "training",
}
_MODULES = ("augment", "compress", "data", "jax", "models", "nn", "numpy", "ops", "targets", "training")

__all__ = ["__version__", *sorted(_HOME_OF), *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
