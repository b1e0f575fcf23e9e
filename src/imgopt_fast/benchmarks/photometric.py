"""Hue, sharpness and tables, passes of their own behind a warp, against torch, OpenCV and kornia.

A batch of 64 uint8 RGB images of 224 x 224 in channels_last, an amount per sample, uint8 out. The torch side is what
torchvision's tensor functions compute, in float32; kornia takes floats from 0 to 1, so its conversions count.

AVX2 alone takes 2.1 times as long as AVX-512 for the hue and 1.6 times for the sharpness: 60 vector instructions for
eight pixels, where the other has 45 for sixteen, and 33 for sixteen bytes of a row. They are arithmetic: eight blends
choose by the largest channel (looked up in registers instead, it took as long), eighteen additions, products and clamps
make the three channels, thirteen bring bytes in and out. Fewer would take words of 16 bits, which round elsewhere.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from imgopt_fast.benchmarks.case import Agreement, Case, Runner, Work
from imgopt_fast.benchmarks.warp_inputs import photographs
from imgopt_fast.ops.photometric import adjust_hue, adjust_sharpness, apply_table

BATCH, SIDE = 64, 224
OPENCV_GOAL = 4.0  # what is asked of the warps, too
LEVEL = Agreement(1.0)  # float32 sums in another order may round to the other side of a half
SMOOTHING = torch.tensor([[1.0, 1.0, 1.0], [1.0, 5.0, 1.0], [1.0, 1.0, 1.0]]) / 13


@dataclass(eq=False)
class PhotometricCase(Case):
    """One pass over the batch; what it computes and against whom is the subclass's."""

    subject: ClassVar[str] = "photometric"
    name: str
    flops: float  # per pixel
    quick: bool = False

    @cached_property
    def images(self) -> torch.Tensor:
        return photographs(BATCH, 3, SIDE)

    @cached_property
    def amounts(self) -> torch.Tensor:
        return torch.rand(BATCH, generator=torch.Generator().manual_seed(3))

    def work(self) -> Work:
        pixels = BATCH * SIDE**2
        return Work(self.flops * pixels, bytes_read=3 * pixels, bytes_written=3 * pixels)

    def with_opencv(self, one: Callable[[Any, float], Any], agreement: Agreement) -> Runner:
        """`one` for each image, (H, W, C), and its amount."""
        images, amounts = list(self.images.permute(0, 2, 3, 1).numpy()), self.amounts.tolist()
        return Runner(
            lambda: [one(image, amount) for image, amount in zip(images, amounts, strict=True)],
            agreement,
            lambda found: torch.stack([torch.from_numpy(image) for image in found]).permute(0, 3, 1, 2),
            OPENCV_GOAL,
        )


@dataclass(eq=False)
class HueCase(PhotometricCase):
    """Turns of the colour circle in HSV."""

    def ours(self) -> Runner:
        images, amounts = self.images, self.amounts
        return Runner(lambda: adjust_hue(images, amounts))

    def peers(self) -> Mapping[str, Callable[[], Runner]]:
        return {"torch": self.with_torch, "opencv": self.with_hsv, "kornia": self.with_kornia}

    def with_torch(self) -> Runner:
        images, turns = self.images, self.amounts.view(-1, 1, 1)

        def call() -> torch.Tensor:
            r, g, b = images.float().unbind(1)
            most, least = images.amax(1).float(), images.amin(1).float()
            chroma = most - least
            divisor = chroma.clamp(min=1)
            sector = torch.where(most == g, 2 + (b - r) / divisor, 4 + (r - g) / divisor)
            sector = torch.where(most == r, (g - b) / divisor, sector) + 6 * turns
            channels = []
            for offset in (5, 3, 1):
                k = (sector + offset).remainder_(6)
                channels.append(most - chroma * torch.minimum(k, 4 - k).clamp_(0, 1))
            return torch.stack(channels, 1).round_().byte()

        return Runner(call, LEVEL)

    def with_kornia(self) -> Runner:
        adjust = import_module("kornia.enhance").adjust_hue
        images, turns = self.images, self.amounts * 2 * math.pi

        def call() -> torch.Tensor:
            result: torch.Tensor = adjust(images.contiguous().float().div_(255), turns)
            return result.mul_(255).round_().byte()

        return Runner(call, LEVEL)

    def with_hsv(self) -> Runner:
        """Through eight-bit HSV, as OpenCV's users do: 256 hues, so results are off by some levels."""
        cv2 = import_module("cv2")

        def one(image: Any, amount: float) -> Any:
            hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
            hsv[..., 0] += round(amount * 256) % 256
            return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)

        return self.with_opencv(one, Agreement(8.0, outliers=0.05))


@dataclass(eq=False)
class SharpnessCase(PhotometricCase):
    """Between smoothed and as it is, or sharpened, by Pillow's 3 x 3 filter."""

    @cached_property
    def factors(self) -> torch.Tensor:
        return 2 * self.amounts

    def ours(self) -> Runner:
        images, factors = self.images, self.factors
        return Runner(lambda: adjust_sharpness(images, factors))

    def peers(self) -> Mapping[str, Callable[[], Runner]]:
        return {"torch": self.with_torch, "opencv": self.with_filter}

    def with_torch(self) -> Runner:
        images, weight = self.images, self.factors.view(-1, 1, 1, 1)
        kernel = SMOOTHING.expand(3, 1, 3, 3)

        def call() -> torch.Tensor:
            pixels = images.float()
            result = pixels.clone()
            smooth = F.conv2d(pixels, kernel, groups=3)
            result[..., 1:-1, 1:-1] = torch.lerp(smooth, pixels[..., 1:-1, 1:-1], weight).clamp_(0, 255)
            return result.round_().byte()

        return Runner(call, LEVEL)

    def with_filter(self) -> Runner:
        """One filter per image, which takes in the outermost pixels, too: 1.8 % of all."""
        cv2 = import_module("cv2")
        smoothing, middle = SMOOTHING.numpy(), torch.zeros(3, 3)
        middle[1, 1] = 1.0
        identity = middle.numpy()

        def one(image: Any, amount: float) -> Any:
            factor = 2 * amount
            return cv2.filter2D(image, -1, factor * identity + (1 - factor) * smoothing)

        return self.with_opencv(one, Agreement(1.0, outliers=0.02))


@dataclass(eq=False)
class TableCase(PhotometricCase):
    """Each level replaced by that of its sample's and channel's table."""

    @cached_property
    def tables(self) -> torch.Tensor:
        return torch.randint(0, 256, (BATCH, 3, 256), generator=torch.Generator().manual_seed(4)).to(torch.uint8)

    def ours(self) -> Runner:
        images, tables = self.images, self.tables
        return Runner(lambda: apply_table(images, tables))

    def peers(self) -> Mapping[str, Callable[[], Runner]]:
        return {"torch": self.with_torch, "opencv": self.with_lut}

    def with_torch(self) -> Runner:
        images, tables = self.images.contiguous(), self.tables
        return Runner(lambda: tables.gather(2, images.flatten(2).long()).view(images.shape))

    def with_lut(self) -> Runner:
        cv2 = import_module("cv2")
        tables = itertools.cycle(self.tables.permute(0, 2, 1)[:, None].contiguous().numpy())
        return self.with_opencv(lambda image, _: cv2.LUT(image, next(tables)), Agreement(0.0))


CASES: tuple[Case, ...] = (
    # Largest and smallest (four), what lies below them (two), three differences, the choices by the largest channel
    # (twelve), and per channel a product, two sums, a magnitude and two limits.
    HueCase("hue", 39.0, quick=True),
    # Per channel eight sums, which share rows and columns, two products, limits and rounding.
    SharpnessCase("sharpness", 27.0),
    TableCase("table", 0.0),
)
