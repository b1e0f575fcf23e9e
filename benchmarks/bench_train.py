"""The training against a plain PyTorch loop, and what surrounds it: decoding, the cache, photos, transfer.

    python benchmarks/bench_train.py throughput CIFAR     images/s of both loops: ResNet-20, batch 128, alternated
    python benchmarks/bench_train.py accuracy CIFAR       both loops over three seeds: hours on two cores; --device cuda
    python benchmarks/bench_train.py decode CIFAR         decoding all files, and reading them from the cache
    python benchmarks/bench_train.py head CIFAR           a new last layer on cached features
    python benchmarks/bench_train.py photos PHOTOS        decode and augment to 224x224, against Pillow
    python benchmarks/bench_train.py sampling             --grad-sampling 1, 2 and 4 on the embedded images

CIFAR is a zip or folder of CIFAR-10 as JPEG files, PHOTOS a folder of photos; IMGOPT_CIFAR and IMGOPT_PHOTOS serve as
well. OMP_NUM_THREADS sets the threads of both sides. The plain loop is in plain_loop.py. Contestants have processes of
their own. Photos are counted per second of the processor, of which each side uses one thread.
"""

import argparse
import dataclasses
import io
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from plain_loop import RECIPE, plain_steps, plain_training
from torch import Tensor

from imgopt_fast.augment import Compose, Normalize, RandomHorizontalFlip, RandomResizedCrop
from imgopt_fast.data import Dataset, load_dataset
from imgopt_fast.data.decode import decode_whole, upright_size
from imgopt_fast.models import create_model
from imgopt_fast.training import TrainConfig, evaluate, train
from imgopt_fast.training.allocator import freed_memory_kept
from imgopt_fast.training.augmentation import Augmentation
from imgopt_fast.training.clock import share
from imgopt_fast.training.distributed import Process
from imgopt_fast.training.events import Events
from imgopt_fast.training.head import fit_head
from imgopt_fast.training.loop import Fitting, fit
from imgopt_fast.training.run_folder import RunFolder
from imgopt_fast.training.stages import Stage

Call = Callable[[int], int]  # takes a number of steps or rounds, returns that of the images
SIDE, PHOTOS = 224, 25  # pixels of a view, and views of a batch
LARGEST = 2048 * 2048 * 3  # bytes of a photo whose memory is used again
CROP = {"scale": (0.25, 1.0), "ratio": (3 / 4, 4 / 3)}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# --------------------------------------------------------------------------------------------------------- contestants


class Contestant:
    """What `make` returns, called in a process of its own, so that none runs in the memory that another one left."""

    def __init__(self, make: Callable[..., Call], *arguments: Any) -> None:
        context = get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, make, *arguments))
        self.process.start()

    def rate(self, count: int) -> float:
        """Images/s of a call with `count`."""
        self.connection.send(count)
        images_per_second: float = self.connection.recv()
        return images_per_second

    def close(self) -> None:
        self.connection.send(0)
        self.process.join()


def serve(connection: Connection, make: Callable[..., Call], *arguments: Any) -> None:
    now = time.process_time if make in (our_photos, plain_photos) else time.perf_counter
    with freed_memory_kept() if make is our_photos else nullcontext():  # as in every training of ours
        call = make(*arguments)
        while count := connection.recv():
            begin = now()
            images = call(count)
            connection.send(images / (now() - begin))


# ------------------------------------------------------------------------------------------------------- measurements


def shortened(data: Dataset, images: int) -> Dataset:
    return dataclasses.replace(data, train=data.train.first(images), validation=data.validation.take(torch.arange(64)))


def our_epoch(config: TrainConfig, data: Dataset, mean: Any, std: Any) -> tuple[float, dict[str, float]]:
    """Images/s of an epoch over `data` in our loop, and the seconds of its phases."""
    model = create_model(config.model, num_classes=len(data.class_names), in_channels=data.channels)
    model = model.to(memory_format=torch.channels_last)
    augment = Augmentation(config, Normalize(mean, std), len(data.class_names))
    prepare = Compose([Normalize(mean, std)])
    with tempfile.TemporaryDirectory() as folder:
        fitting = Fitting(config, data, augment, prepare, RunFolder(Path(folder)), Process(), Events(None))
        (row,) = fit(Stage("dense", 0, 1, config.lr, 0.5), model, fitting, [])
    return row.images_per_second, fitting.times["dense"]


def throughput(path: str, rounds: int, images: int) -> None:
    """Both loops in turn; each round trains `images` images in each, behind a few steps that are not counted."""
    config, data = RECIPE, load_dataset(path)
    mean, std = data.statistics()
    workers = torch.get_num_threads()
    part, steps, skip = shortened(data, images), images // config.batch_size, 4
    plain = Contestant(plain_training, path, config, workers)
    plain.rate(skip)
    our_epoch(config, shortened(data, 4 * config.batch_size), mean, std)
    rates: dict[str, list[float]] = {"ours": [], "plain": []}
    waits = []
    for _ in range(rounds):
        rate, times = our_epoch(config, part, mean, std)
        rates["ours"].append(rate)
        waits.append(share(times, "wait"))
        plain.rate(skip)  # the workers' queues have filled while ours ran
        rates["plain"].append(plain.rate(steps))
    plain.close()
    ratios = [a / b for a, b in zip(rates["ours"], rates["plain"], strict=True)]
    precision = config.amp_dtype if config.uses_amp() else "float32"
    print(f"{workers} threads; ours in {precision}, channels_last; plain in float32 with {workers} workers")
    for name, values in rates.items():
        print(f"{name:6} {statistics.median(values):8,.0f} images/s  ({min(values):,.0f} to {max(values):,.0f})")
    print(f"ratio  {statistics.median(ratios):8.2f}  ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"data wait of ours {statistics.median(waits):.2%}")


def accuracies(path: str, seeds: list[int], epochs: int, device: str) -> None:
    """Test accuracy of both loops after the same number of epochs, for each seed."""
    data = load_dataset(path)
    mean, std = data.statistics()
    found: dict[str, list[float]] = {"ours": [], "plain": []}
    for seed in seeds:
        config = dataclasses.replace(RECIPE, data=path, epochs=epochs, seed=seed, memory=False, device=device)
        with tempfile.TemporaryDirectory() as folder:
            report = train(dataclasses.replace(config, output=folder))
        found["ours"].append(report.stages[-1].test_top1)
        torch.manual_seed(seed)
        model = create_model(config.model, num_classes=len(data.class_names), in_channels=data.channels)
        steps = epochs * (len(data.train) // config.batch_size)
        for _ in plain_steps(config, data, model.to(device), torch.get_num_threads(), steps):
            pass
        prepare = Compose([Normalize(mean, std)])
        found["plain"].append(evaluate.accuracy(model, data.test.to(torch.device(device)), prepare))
        print(f"seed {seed}: ours {found['ours'][-1]:.2%}, plain {found['plain'][-1]:.2%}", flush=True)
    for name, values in found.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{name:6} {statistics.mean(values):.2%} ± {spread:.2%}")


def decoding(path: str) -> None:
    """Seconds to decode every file, and to find them in the cache."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["IMGOPT_CACHE"] = folder
        for what in ("decoded", "from the cache", "from the cache"):
            begin = time.perf_counter()
            data = load_dataset(path)
            seconds = time.perf_counter() - begin
            count = len(data.train) + len(data.validation) + len(data.test)
            print(f"{count:,} files {what}: {seconds:.2f} s")


def heads(path: str) -> None:
    """Seconds of a transfer to a new last layer on cached features, behind an untrained ResNet-20."""
    config, data = RECIPE, load_dataset(path)
    mean, std = data.statistics()
    model = create_model(config.model, num_classes=len(data.class_names), in_channels=data.channels)
    model = model.to(memory_format=torch.channels_last)
    prepare = Compose([Normalize(mean, std)])
    augment = Augmentation(config, Normalize(mean, std), len(data.class_names))
    with tempfile.TemporaryDirectory() as folder:
        fitting = Fitting(config, data, augment, prepare, RunFolder(Path(folder)), Process(), Events(None))
        fit_head(Stage("dense", 0, 20, config.lr, 0.0), model, fitting)
    times = fitting.times["dense"]
    print(
        f"{len(data.train):,} images: features {times['features']:.1f} s, 20 epochs of the head {times['head']:.1f} s"
    )


def sampling(seeds: list[int], epochs: int) -> None:
    """Seconds and validation accuracy of a training of ResNet-8 on the embedded images, by `--grad-sampling`."""
    found: dict[int, list[tuple[float, float]]] = {}
    for seed in seeds:
        for every in (1, 2, 4):
            config = TrainConfig(
                epochs=epochs, prune_epochs=0, quantize="none", grad_sampling=every, seed=seed, memory=False,
                reference_epoch=False,
            )  # fmt: skip
            with tempfile.TemporaryDirectory() as folder:
                rows = train(dataclasses.replace(config, output=folder)).epochs
            found.setdefault(every, []).append((sum(row.seconds for row in rows), rows[-1].eval_top1))
    exact = found[1]
    for every, runs in found.items():
        ratios = [e[0] / r[0] for e, r in zip(exact, runs, strict=True)]
        costs = [r[1] - e[1] for e, r in zip(exact, runs, strict=True)]
        print(
            f"--grad-sampling {every}: {statistics.mean(r[0] for r in runs):.1f} s, "
            f"{statistics.mean(ratios):.2f} times the speed ({min(ratios):.2f} to {max(ratios):.2f}); validation "
            f"{statistics.mean(r[1] for r in runs):.2%}, {100 * statistics.mean(costs):+.2f} points "
            f"({100 * min(costs):+.2f} to {100 * max(costs):+.2f})"
        )


def photo_files(folder: str) -> list[bytes]:
    paths = [path for path in sorted(Path(folder).iterdir()) if path.suffix.lower() in (".jpg", ".jpeg")]
    return [path.read_bytes() for path in paths]


def in_batches(files: list[bytes], views: Callable[[list[bytes]], Tensor]) -> Call:
    """Makes the views of all files a number of times."""

    def call(count: int) -> int:
        for first in [*range(0, len(files), PHOTOS)] * count:
            some = files[first : first + PHOTOS]
            assert views(some).shape == (len(some), 3, SIDE, SIDE)
        return count * len(files)

    return call


def our_photos(folder: str) -> Call:
    torch.set_num_threads(1)
    crop = Compose([RandomResizedCrop(SIDE, **CROP), RandomHorizontalFlip(), Normalize(MEAN, STD)])

    buffer = np.empty(LARGEST, np.uint8)

    def views(some: list[bytes]) -> Tensor:
        sizes = [torch.empty(()).expand(3, *upright_size(data)) for data in some]
        draws = [crop.make_params(size, key=(0, 0, i)) for i, size in enumerate(sizes)]
        batch = torch.empty((len(some), 3, SIDE, SIDE), memory_format=torch.channels_last)
        for i, data in enumerate(some):  # each to its end, while it is in the cache
            image = torch.from_numpy(decode_whole(data, buffer)).permute(2, 0, 1)
            batch[i] = crop.transform(image, draws[i])
        return batch

    return in_batches(photo_files(folder), views)


def plain_photos(folder: str) -> Call:
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]

    def view(data: bytes) -> Tensor:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        width, height = image.size
        area = rng.uniform(*CROP["scale"]) * width * height
        ratio = math.exp(rng.uniform(*map(math.log, CROP["ratio"])))
        w, h = min(width, round(math.sqrt(area * ratio))), min(height, round(math.sqrt(area / ratio)))
        left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
        part = image.crop((left, top, left + w, top + h)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        if rng.random() < 0.5:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        tensor = torch.from_numpy(np.array(part)).permute(2, 0, 1).contiguous().float().div_(255)
        return tensor.sub_(mean).div_(std)

    return in_batches(photo_files(folder), lambda some: torch.stack([view(data) for data in some]))


def photos(folder: str, rounds: int) -> None:
    """Images/s from JPEG bytes to normalized 224x224 floats, in one thread: ours, and Pillow with torch."""
    sides = {"ours": Contestant(our_photos, folder), "plain": Contestant(plain_photos, folder)}
    for side in sides.values():
        side.rate(1)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            rates[name].append(side.rate(2))
    for side in sides.values():
        side.close()
    ratios = [a / b for a, b in zip(rates["ours"], rates["plain"], strict=True)]
    for name, values in rates.items():
        print(f"{name:6} {statistics.median(values):6.0f} photos/s  ({min(values):.0f} to {max(values):.0f})")
    print(f"ratio  {statistics.median(ratios):6.2f}  ({min(ratios):.2f} to {max(ratios):.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("throughput", "accuracy", "decode", "head", "photos", "sampling"))
    parser.add_argument("data", nargs="?", help="default: IMGOPT_CIFAR, for photos IMGOPT_PHOTOS")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=2560, help="per round of `throughput` (default: 2560)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cpu", help="that `accuracy` trains on (default: cpu)")
    parser.add_argument("--epochs", type=int, default=30)
    arguments = parser.parse_args()
    path = arguments.data or os.environ.get("IMGOPT_PHOTOS" if arguments.what == "photos" else "IMGOPT_CIFAR")
    if path is None and arguments.what != "sampling":
        parser.error("expected a data set, as an argument or in IMGOPT_CIFAR or IMGOPT_PHOTOS")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    torch.manual_seed(0)
    if arguments.what == "throughput":
        throughput(path, arguments.rounds, arguments.images)
    elif arguments.what == "accuracy":
        accuracies(path, arguments.seeds, arguments.epochs, arguments.device)
    elif arguments.what == "decode":
        decoding(path)
    elif arguments.what == "head":
        heads(path)
    elif arguments.what == "sampling":
        sampling(arguments.seeds, arguments.epochs)
    else:
        photos(path, arguments.rounds)


if __name__ == "__main__":
    main()
