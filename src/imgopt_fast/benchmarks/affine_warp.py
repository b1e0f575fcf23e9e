"""affine_warp against affine_grid + grid_sample, OpenCV, kornia and albumentations.

A batch of 64 uint8 RGB images of 224 x 224, each with its own rotation of up to 30 degrees about the centre and scale
of 0.8 to 1.2, unless the name says otherwise. OpenCV runs in a loop over the batch, which is how it is used; the
conversion to what a network takes is charged to every contestant of a case that ends there. The images are smooth
with a little noise, as photographs are.

What stands between these cases and their goals, measured on a Zen 5 core with AVX-512; cycles are per sixteen pixels:

- Nearest and bilinear uint8 look their taps up in patches of the source in registers (csrc/affine_warp/patch_avx512.h).
  64 bilinear RGB pixels take 538 instructions on average, counted step by step: 366 in a block inside the image, of
  which 70 are shuffles, which issue two a cycle, and 43 copies between registers, as vpermi2b overwrites one of its
  sources; 676 in one of the seventh at its border; 79 for fetching ahead and 30 for the plan of a strip. Nearest takes
  340. With images and results in the L2 cache that is 29 cycles, nearest 20; a batch of 10 MB in and 10 MB out adds 6.
  Fetching patches ahead made it 6 % slower. Next would be masks instead of clamped coordinates at a constant border,
  about 40 instructions of such a block.
- float32 and bfloat16 results of 16 MiB and more go around the caches (csrc/affine_warp/stream_avx512.h), which took a
  third off: 2.2 ms instead of 3.5. Rows that are not whole lines do not, as lines streamed in parts took half as long
  again as ordinary stores.
- 45 times grid_sample would be 27 cycles, less than the kernel takes with everything in the cache.
- Homographies take 1 ms more than affine maps: float64 coordinates with a division each, which vdivpd does in half a
  cycle; Newton's steps from vrcp14pd took longer. Where one shrinks the image by more than 1.8, the window
  (csrc/affine_warp/window.h) that also serves bicubic and stronger minification takes over.
- Floating images are sampled from float32 planes with their border written out (csrc/affine_warp/floating.h). Sixteen
  RGB pixels take 28 ns nearest, 42 bilinear and 59 bicubic: of nearest, loads of single taps are 45 %, offsets 19 %,
  stores 17 % and the copy 13 %. The gathers of AVX-512 were up to a fifth slower. Next would be pixels of four floats
  side by side, one load for all channels.
- Of the pipeline's 3.1 ms the kernel takes 2.4 to 2.6, with a colour matrix 0.3 more than without, the mean of the
  source 0.25, which is what reading it from memory takes, and Python 0.2. A mean taken image by image just before its
  warp would save most of that reading, but the operation has no argument for it. 512 images of 32 x 32 take 1.1 to
  1.6: 1.0 in the kernel (0.16 of it per image, whatever its size), 0.06 for the mean, 0.3 of Python and NumPy.
- A fresh float32 batch of 38 MB cost 3 ms of page faults, 20 to 90 where the system had to move memory to find large
  pages. Outputs now take over the memory of dropped ones (csrc/outputs.h); the peers' memory is torch's.
- The Numba twin takes 30 cycles for one pixel: 10 to copy its twelve taps, a load and a store of a byte each, because
  LLVM makes no vectors of loads from everywhere; 10 for coordinates, sums, rounding and stores, in vectors; the rest
  for blocks, which cost 700 cycles each, and for pixels at or beyond the border. OpenCV takes 17 to 20.
- Of the gradients of 16 float32 images, those of the images take 3.3 ms (4.9 with each tap added on its own), those of
  the matrix 4.2 (6.7 with each row of taps loaded and weighted on its own). A quarter of each is waiting for the
  incoming gradient and for what it falls on: fetching three rows ahead took 1.5 ms off both, and of the rest half is
  the two sums in memory of the one and the six loads of the other for each pixel. Blocks at the border, a fifth, test
  every pixel. The floor of 0.3 ms counts bytes and arithmetic only. channels_last and 16-bit images copy the taps of
  each pixel for the matrix, three times as slow.
- uint8 images of two or of five channels and more are warped a few planes at a time: 16 of six channels take 2.4 ms. In
  channels_last the portable rows serve them, ten times as slow.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from imgopt_fast import _native
from imgopt_fast.benchmarks.augmentation import PipelineCase
from imgopt_fast.benchmarks.case import Agreement, Case, Runner, Work, on_one_thread
from imgopt_fast.benchmarks.warp_inputs import BILINEAR_FLOPS, MEAN, STD, affine_grid_theta, draw_matrices, photographs
from imgopt_fast.ops.affine_warp import affine_warp

# Their coordinates are float32 and their weights are rounded: a uint8 result may fall on the other side of a half.
ONE_LEVEL = Agreement(1.0, outliers=1e-3)
# 0.02 of 255 levels, over the smallest std; bfloat16 rounds a value of up to 2.7 by 2^-8 of itself.
NORMALIZED = {torch.float32: Agreement(1e-3, outliers=1e-3), torch.bfloat16: Agreement(0.02, outliers=1e-3)}
CV2_BORDER = {
    "constant": "BORDER_CONSTANT",
    "edge": "BORDER_REPLICATE",
    "reflect": "BORDER_REFLECT_101",
    "symmetric": "BORDER_REFLECT",
}
TORCH_PADDING = {"constant": "zeros", "edge": "border", "reflect": "reflection", "symmetric": "reflection"}


@dataclass(eq=False)
class WarpCase(Case):
    """One warp of a batch; with `dtype` the result is normalised and NCHW, without it uint8 and channels_last."""

    subject: ClassVar[str] = "affine_warp"
    name: str
    quick: bool = False
    batch: int = 64
    side: int = 224
    channels: int = 3
    interpolation: str = "bilinear"
    padding_mode: str = "constant"
    perspective: bool = False
    dtype: torch.dtype | None = None
    threads: int | None = None
    isa: str | None = None
    goals: Mapping[str, float] | None = None

    @cached_property
    def images(self) -> torch.Tensor:
        return photographs(self.batch, self.channels, self.side)

    @cached_property
    def matrix(self) -> torch.Tensor:
        return draw_matrices(self.batch, self.side, self.perspective)

    @cached_property
    def normalization(self) -> dict[str, Any]:
        if self.dtype is None:
            return {}
        # Contiguous: the layout of the uint8 input is channels_last, that of the chains' results is NCHW.
        return {"mean": MEAN, "std": STD, "dtype": self.dtype, "memory_format": torch.contiguous_format}

    def ours(self) -> Runner:
        images, matrix, more = self.images, self.matrix, self.normalization
        options: dict[str, Any] = {"interpolation": self.interpolation, "padding_mode": self.padding_mode, **more}
        return Runner(lambda: affine_warp(images, matrix, **options))

    def work(self) -> Work:
        # Every source pixel that a turned and scaled image touches is read once (about all of them), every output
        # element written once. Arithmetic is counted where a good arrangement of it is known.
        pixels = self.batch * self.channels * self.side**2
        out_bytes = 1 if self.dtype is None else self.dtype.itemsize
        known = self.interpolation == "bilinear" and self.channels == 3 and not self.perspective
        flops = float(BILINEAR_FLOPS * self.batch * self.side**2) if known else 0.0
        return Work(flops, bytes_read=pixels, bytes_written=pixels * out_bytes)

    def peers(self) -> Mapping[str, Callable[[], Runner]]:
        peers: dict[str, Callable[[], Runner]] = {"torch": self.with_torch, "opencv": self.with_opencv}
        if self.perspective:
            del peers["torch"]  # affine_grid knows no homography
        elif self.dtype is not None:
            peers["torch chain"] = self.with_torch_chain
        if self.threads == 2:
            peers["ours, one thread"] = self.one_thread
        elif (self.interpolation, self.padding_mode, self.dtype, self.isa) == ("bilinear", "constant", None, None):
            peers["kornia"] = self.with_kornia
        return peers

    @property
    def reference(self) -> str:  # type: ignore[override]
        return "opencv" if self.perspective else "torch"

    def goal(self, name: str) -> float | None:
        return (self.goals or {}).get(name)

    def with_torch(self) -> Runner:
        """affine_grid + grid_sample alone, on images that are float32 and NCHW already."""
        images = self.images.float().contiguous()
        sample = self.sampler()
        agreement = self.agreement()
        return Runner(lambda: sample(images), agreement, self.finish_levels, self.goal("torch"))

    def with_torch_chain(self) -> Runner:
        """From the same uint8 batch to the same normalised batch."""
        images, sample, finish = self.images, self.sampler(), self.normalizer()
        return Runner(lambda: finish(sample(images.float())), self.agreement(), goal=self.goal("torch chain"))

    def sampler(self) -> Callable[[torch.Tensor], torch.Tensor]:
        theta = affine_grid_theta(self.matrix, self.side)
        shape = [self.batch, self.channels, self.side, self.side]
        # "symmetric" mirrors about the pixel's outer edge, which grid_sample does with align_corners=False.
        aligned = self.padding_mode != "symmetric"
        theta = theta if aligned else affine_grid_theta(self.matrix, self.side, aligned=False)

        def sample(images: torch.Tensor) -> torch.Tensor:
            grid = F.affine_grid(theta, shape, align_corners=aligned)
            padding = TORCH_PADDING[self.padding_mode]
            return F.grid_sample(images, grid, self.interpolation, padding, align_corners=aligned)

        return sample

    def normalizer(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Levels to normalised values in `dtype`, in place where it can be."""
        scale = torch.tensor([1 / (255 * s) for s in STD]).view(1, 3, 1, 1)
        offset = torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)]).view(1, 3, 1, 1)
        assert self.dtype is not None
        dtype = self.dtype
        return lambda levels: levels.mul_(scale).add_(offset).to(dtype)

    def finish_levels(self, levels: torch.Tensor) -> torch.Tensor:
        """Float levels as the result that ours is compared with."""
        if self.dtype is None:
            return levels.round().clamp(0, 255)
        return self.normalizer()(levels.clone().contiguous())

    def agreement(self) -> Agreement:
        if self.dtype is not None:
            return NORMALIZED[self.dtype]
        # Nearest: a coordinate near a half picks another pixel.
        return Agreement(1.0, outliers=5e-3) if self.interpolation == "nearest" else ONE_LEVEL

    def with_opencv(self) -> Runner:
        warp, source = self.opencv_warp(), self.images.permute(0, 2, 3, 1).numpy()
        matrices = self.matrix.double().numpy()
        target = torch.empty(source.shape, dtype=torch.uint8)
        views = list(target.numpy())

        def levels() -> torch.Tensor:
            for image, matrix, view in zip(source, matrices, views, strict=True):
                warp(image, matrix, view)
            return target.permute(0, 3, 1, 2)

        # Its cubic kernel and its older linear one have weights in 1/32 pixel steps.
        agreement = self.agreement() if self.interpolation != "bicubic" else Agreement(4.0, outliers=0.01)
        if self.dtype is None:
            return Runner(levels, agreement, goal=self.goal("opencv"))
        finish, layout = self.normalizer(), torch.contiguous_format

        def chain() -> torch.Tensor:
            return finish(levels().to(torch.float32, memory_format=layout))

        # Its warp has rounded to uint8 before the normalisation: half a level more.
        rounded = Agreement(agreement.bound + 0.51 / (255 * min(STD)), agreement.outliers)
        return Runner(chain, rounded, goal=self.goal("opencv"))

    def opencv_warp(self) -> Callable[[Any, Any, Any], Any]:
        """From an image of pixels and a matrix into another image."""
        cv2 = import_module("cv2")
        flags = {"nearest": cv2.INTER_NEAREST, "bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}
        how = flags[self.interpolation] | cv2.WARP_INVERSE_MAP
        border, size = getattr(cv2, CV2_BORDER[self.padding_mode]), (self.side, self.side)
        warp = cv2.warpPerspective if self.perspective else cv2.warpAffine
        return lambda image, matrix, target: warp(image, matrix, size, dst=target, flags=how, borderMode=border)

    def with_kornia(self) -> Runner:
        transform = import_module("kornia.geometry.transform")
        images, size = self.images.float().contiguous(), (self.side, self.side)
        matrix = torch.eye(3).repeat(self.batch, 1, 1)
        matrix[:, : self.matrix.shape[1]] = self.matrix
        forward = torch.linalg.inv(matrix.double()).float()  # kornia's maps input to output
        if self.perspective:
            return Runner(
                lambda: transform.warp_perspective(images, forward, size, self.interpolation, align_corners=True),
                Agreement(1.0, outliers=0.02),
                self.finish_levels,
            )
        affine = forward[:, :2].contiguous()
        return Runner(
            lambda: transform.warp_affine(images, affine, size, self.interpolation, align_corners=True),
            Agreement(self.agreement().bound, outliers=0.02),
            self.finish_levels,
        )

    def one_thread(self) -> Runner:
        return on_one_thread(self.ours(), self.goal("ours, one thread"))


@dataclass(eq=False)
class TwinCase(WarpCase):
    """The Numba twin instead of the compiled kernel, called with the operation's positional arguments."""

    def ours(self) -> Runner:
        fallback = import_module("imgopt_fast.ops.affine_warp.fallback")
        images, matrix, size = self.images, self.matrix, [self.side, self.side]
        fill, layout = [0.0] * self.channels, torch.channels_last
        how: tuple[Any, ...] = (self.interpolation, self.padding_mode, fill, False, None, None, [], [], None, layout)
        return Runner(lambda: fallback.affine_warp(images, matrix, size, *how))


@dataclass(eq=False)
class FloatingCase(WarpCase):
    """float32 images and results, NCHW here and for torch, rows of pixels for OpenCV."""

    @cached_property
    def images(self) -> torch.Tensor:
        return photographs(self.batch, self.channels, self.side).float().div_(255).contiguous()

    def work(self) -> Work:
        values = self.images.numel()
        return Work(0.0, bytes_read=4 * values, bytes_written=4 * values)

    def peers(self) -> Mapping[str, Callable[[], Runner]]:
        peers: dict[str, Callable[[], Runner]] = {"torch": self.with_torch, "opencv": self.with_opencv}
        if self.perspective:
            del peers["torch"]
        return peers

    def agreement(self) -> Agreement:
        # OpenCV's older kernels have weights in 1/32 pixel steps; a coordinate near a half picks another pixel.
        return Agreement(4 / 255, outliers=0.01)

    def finish_levels(self, levels: torch.Tensor) -> torch.Tensor:
        return levels

    def with_opencv(self) -> Runner:
        warp, source = self.opencv_warp(), self.images.permute(0, 2, 3, 1).contiguous()
        target = torch.empty_like(source)
        images, views, matrices = list(source.numpy()), list(target.numpy()), self.matrix.double().numpy()

        def call() -> torch.Tensor:
            for image, matrix, view in zip(images, matrices, views, strict=True):
                warp(image, matrix, view)
            return target.permute(0, 3, 1, 2)

        return Runner(call, self.agreement(), goal=self.goal("opencv"))


@dataclass(eq=False)
class GradientCase(WarpCase):
    """The backward of a bilinear warp of float32 images: the gradients of the images and of the matrix."""

    @cached_property
    def pixels(self) -> torch.Tensor:
        return self.images.float().div_(255).contiguous()

    @cached_property
    def grad(self) -> torch.Tensor:
        return torch.rand(self.pixels.shape, generator=torch.Generator().manual_seed(9)) - 0.5

    def ours(self) -> Runner:
        matrix = self.matrix.clone().requires_grad_()
        return self.gradient(lambda images: affine_warp(images, matrix), matrix)

    def peers(self) -> Mapping[str, Callable[[], Runner]]:
        peers: dict[str, Callable[[], Runner]] = {"torch": self.with_torch}
        if self.threads == 2:
            peers["ours, one thread"] = self.one_thread
        return peers

    def work(self) -> Work:
        # Images and incoming gradient are read, the gradient of the images is written. Per pixel and channel: four
        # products with a weight and four sums into the gradient, and five of each for the slopes along both axes.
        values = self.pixels.numel()
        return Work(18.0 * values, bytes_read=8 * values, bytes_written=4 * values)

    def gradient(self, forward: Callable[[torch.Tensor], torch.Tensor], matrix: torch.Tensor) -> Runner:
        """A runner of the backward of `forward` alone. The matrix's gradient has other units in torch's coordinates."""
        images, grad = self.pixels.clone().requires_grad_(), self.grad
        output = forward(images)
        # A coordinate near a pixel's centre may lie on its other side.
        agreement = Agreement(1e-3, outliers=1e-3)
        return Runner(
            lambda: torch.autograd.grad(output, [images, matrix], grad, retain_graph=True)[0],
            agreement,
            goal=self.goal("torch"),
        )

    def with_torch(self) -> Runner:
        theta = affine_grid_theta(self.matrix, self.side).requires_grad_()
        shape = list(self.pixels.shape)

        def forward(images: torch.Tensor) -> torch.Tensor:
            return F.grid_sample(images, F.affine_grid(theta, shape, align_corners=True), align_corners=True)

        return self.gradient(forward, theta)


def _cases() -> list[Case]:
    four = {"opencv": 4.0}
    found: list[Case] = [
        WarpCase("bilinear uint8 -> uint8", quick=True, goals={"opencv": 8.0, "torch": 45.0}),
        WarpCase("fused -> bfloat16 NCHW", dtype=torch.bfloat16, goals={"opencv": 10.0}),
        WarpCase("fused -> float32 NCHW", quick=True, dtype=torch.float32, goals={"opencv": 7.0, "torch": 45.0}),
        WarpCase("nearest", interpolation="nearest", goals=four),
        WarpCase("bicubic", interpolation="bicubic", goals=four),
        WarpCase("homography", perspective=True, goals=four),
        WarpCase("edge border", padding_mode="edge", goals=four),
        WarpCase("reflect border", padding_mode="reflect", goals=four),
        WarpCase("symmetric border", padding_mode="symmetric", goals=four),
        WarpCase("1 channel", channels=1, goals=four),
        WarpCase("4 channels", channels=4, goals=four),
        WarpCase("512 images of 32 x 32", batch=512, side=32, quick=True, goals=four),
    ]
    found += [
        FloatingCase("float32 images, nearest", batch=16, interpolation="nearest"),
        FloatingCase("float32 images, bilinear", batch=16),
        FloatingCase("float32 images, bicubic", batch=16, interpolation="bicubic"),
        FloatingCase("float32 images, homography", batch=16, perspective=True),
    ]
    if "avx2" in _native.supported_isas():
        found.append(WarpCase("AVX2 forced", isa="avx2", goals={"opencv": 3.0}))
    if _native.core() is not None:
        found.append(WarpCase("two threads", threads=2, goals={"ours, one thread": 1.8}))
    found.append(GradientCase("gradients, 16 float32 images", batch=16))
    if _native.core() is not None:
        found.append(GradientCase("gradients, one image, two threads", batch=1, threads=2))
    found += [
        PipelineCase("pipeline", 64, 224, {"albumentations": 14.0, "kornia": 60.0}, quick=True),
        PipelineCase("pipeline, 512 images of 32 x 32", 512, 32, {"albumentations": 25.0, "kornia": 14.0}),
    ]
    found.append(TwinCase("Numba twin", batch=16, goals={"torch": 2.0}))
    return found


CASES = _cases()
