"""affine_warp in plain torch, in float64: obviously right, on any device, and the oracle of the tests.

It computes every coordinate, tap and sum in float64 (float32 where the device has no float64) and rounds once, at
the end; the kernels' integer weights and float32 coordinates stay within the bounds that
csrc/affine_warp/contract.h states.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

A = -0.75  # Keys' parameter, as in torch and OpenCV


def affine_warp(
    images: torch.Tensor, matrix: torch.Tensor, size: Sequence[int], interpolation: str, padding_mode: str,
    fill: Sequence[float], antialias: bool, table: torch.Tensor | None, color_matrix: torch.Tensor | None,
    mean: Sequence[float], std: Sequence[float], dtype: torch.dtype | None, memory_format: torch.memory_format,
) -> torch.Tensor:  # fmt: skip
    """The operation `imgopt_fast::affine_warp`; see `imgopt_fast.affine_warp` for the arguments."""
    dtype = dtype or images.dtype
    if table is not None:
        images = table.expand(len(images), -1, -1).gather(2, images.flatten(2).long()).view_as(images)
    wide = _wide(images)
    values = _sample_all(images, matrix, size, interpolation, padding_mode, fill, antialias).to(wide)
    unit = images.dtype != torch.uint8  # values are in [0, 1] units, not in levels
    if color_matrix is not None:
        values = values if unit else values / 255
        values, unit = _colored(values, color_matrix).clamp(0, 1), True
    if dtype == torch.uint8:
        levels = values * 255 if unit else values
        result = levels.nan_to_num(0.0).round().clamp(0, 255)
    else:
        result = values if unit else values / 255
        if std:
            result = (result - _channels(mean, result)) / _channels(std, result)
    return result.to(dtype).contiguous(memory_format=memory_format)


def affine_warp_backward(
    grad: torch.Tensor, images: torch.Tensor, matrix: torch.Tensor, interpolation: str, padding_mode: str,
    fill: Sequence[float], antialias: bool, color_matrix: torch.Tensor | None, std: Sequence[float],
    needs_images: bool, needs_matrix: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The operation `imgopt_fast::affine_warp_backward`: torch's autograd through the sampling, the rest by hand."""
    # An implementation that is called below autograd (by a dispatch mode, in a compiled graph) has it switched off.
    autograd = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with torch.enable_grad(), autograd:
        source = images.detach().requires_grad_(needs_images)
        theta = matrix.detach().requires_grad_(needs_matrix)
        values = _sample_all(source, theta, grad.shape[2:], interpolation, padding_mode, fill, antialias)
    flow = grad.to(values.dtype)
    if std:
        flow = flow / _channels(std, flow)
    if color_matrix is not None:
        rgb = _colored(values.detach(), color_matrix)
        flow = torch.where((rgb >= 0) & (rgb <= 1), flow, 0.0)
        flow = torch.einsum("nij,nihw->njhw", color_matrix.to(flow.dtype).expand(len(flow), -1, -1)[:, :, :3], flow)
    wanted = [t for t, needed in ((source, needs_images), (theta, needs_matrix)) if needed]
    found = list(torch.autograd.grad(values, wanted, flow, materialize_grads=True)) if values.requires_grad else []
    grad_images = torch.empty_like(images).copy_(found.pop(0)) if needs_images else images.new_empty((0,))
    grad_matrix = found.pop(0) if needs_matrix else matrix.new_empty((0,))
    return grad_images, grad_matrix


def coordinates(matrix: torch.Tensor, size: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Source x and y, each (N, H, W), of every output pixel; `matrix` (N, 2 or 3, 3) in the dtype of the result."""
    x = torch.arange(size[1], dtype=matrix.dtype, device=matrix.device)
    y = torch.arange(size[0], dtype=matrix.dtype, device=matrix.device)[:, None]
    m = matrix[:, :, :, None, None]
    rows = [m[:, i, 0] * x + m[:, i, 1] * y + m[:, i, 2] for i in range(matrix.shape[1])]
    if len(rows) == 2:
        return rows[0], rows[1]
    w = rows[2]
    infinite = w == 0
    w = torch.where(infinite, 1.0, w)  # so that no gradient becomes 0 · inf
    return torch.where(infinite, torch.inf, rows[0] / w), torch.where(infinite, torch.inf, rows[1] / w)


def minification(matrix: torch.Tensor, size: Sequence[int]) -> tuple[int, int]:
    """(ky, kx): source pixels per output pixel along each source axis, rounded down, at least 1.

    `matrix` is one image's (2 or 3, 3). The linear part of a homography is its Jacobian at the output's centre.
    """
    m = matrix.double().tolist()
    if len(m) == 3 and m[2] != [0.0, 0.0, 1.0]:
        x, y = (size[1] - 1) / 2, (size[0] - 1) / 2
        u, v, w = (row[0] * x + row[1] * y + row[2] for row in m)
        if w == 0:
            return 1, 1
        m = [[(row[j] - t / w * m[2][j]) / w for j in range(2)] for row, t in ((m[0], u), (m[1], v))]
    lengths = [math.hypot(m[i][0], m[i][1]) + 1e-6 for i in (1, 0)]
    ky, kx = (max(1, math.floor(min(length, 2.0**30))) if math.isfinite(length) else 1 for length in lengths)
    return ky, kx


def decimated(images: torch.Tensor, ky: int, kx: int) -> torch.Tensor:
    """Averages of ky × kx boxes; the last ones average what they cover. uint8 rounds half up."""
    ky, kx = min(ky, images.shape[2]), min(kx, images.shape[3])
    boxes = F.avg_pool2d(images.to(_wide(images)), (ky, kx), ceil_mode=True, count_include_pad=False)
    return (boxes + 0.5).floor().to(torch.uint8) if images.dtype == torch.uint8 else boxes.to(images.dtype)


def _sample_all(
    images: torch.Tensor, matrix: torch.Tensor, size: Sequence[int], interpolation: str, padding_mode: str,
    fill: Sequence[float], antialias: bool,
) -> torch.Tensor:  # fmt: skip
    n, channels = images.shape[:2]
    wide = _wide(images)
    matrix = matrix.to(wide).expand(n, -1, -1)
    if not antialias:
        return sampled(images.to(wide), *coordinates(matrix, size), interpolation, padding_mode, fill)
    results = []
    for i in range(n):
        ky, kx = minification(matrix[i].detach(), size)
        source = decimated(images[i : i + 1], ky, kx).to(wide)
        ky, kx = min(ky, images.shape[2]), min(kx, images.shape[3])
        x, y = coordinates(matrix[i : i + 1], size)
        x, y = (x - (kx - 1) / 2) / kx, (y - (ky - 1) / 2) / ky
        results.append(sampled(source, x, y, interpolation, padding_mode, fill))
    return torch.cat(results) if results else torch.empty((0, channels, *size), dtype=wide, device=images.device)


def sampled(
    images: torch.Tensor, x: torch.Tensor, y: torch.Tensor, interpolation: str, padding_mode: str, fill: Sequence[float]
) -> torch.Tensor:
    """`images` (N, C, H, W) at the points (x, y), each (N, H', W')."""
    finite = x.isfinite() & y.isfinite()
    x, y = (torch.where(finite, t, 0.0).clamp(-(2.0**30), 2.0**30) for t in (x, y))
    columns, rows = _taps(x, interpolation), _taps(y, interpolation)
    outside = _channels(fill, images)
    height, width = images.shape[2:]
    result = torch.zeros((*images.shape[:2], *x.shape[1:]), dtype=images.dtype, device=images.device)
    for iy, wy in rows:
        fy, inside_y = _folded(iy, height, padding_mode)
        for ix, wx in columns:
            fx, inside_x = _folded(ix, width, padding_mode)
            index = (fy * width + fx).flatten(1)[:, None].expand(-1, images.shape[1], -1)
            tap = images.flatten(2).gather(2, index).view_as(result)
            tap = torch.where((inside_y & inside_x)[:, None], tap, outside)
            result = result + (wy * wx)[:, None] * tap
    return torch.where(finite[:, None], result, outside)


def _taps(t: torch.Tensor, interpolation: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Index and weight of each pixel that the point `t` reads along one axis."""
    if interpolation == "nearest":
        return [((t + 0.5).floor().long(), torch.ones_like(t))]
    base = t.floor().detach()
    f = t - base
    i = base.long()
    if interpolation == "bilinear":
        return [(i, 1 - f), (i + 1, f)]

    def near(d: torch.Tensor) -> torch.Tensor:  # distance 0..1
        return ((A + 2) * d - (A + 3)) * d * d + 1

    def far(d: torch.Tensor) -> torch.Tensor:  # distance 1..2
        return ((A * d - 5 * A) * d + 8 * A) * d - 4 * A

    return [(i - 1, far(1 + f)), (i, near(f)), (i + 1, near(1 - f)), (i + 2, far(2 - f))]


def _folded(i: torch.Tensor, n: int, padding_mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Index inside [0, n), and whether the pixel is one of the image (only "constant" has others)."""
    if padding_mode == "constant":
        return i.clamp(0, n - 1), (i >= 0) & (i < n)
    inside = torch.ones_like(i, dtype=torch.bool)
    if padding_mode == "edge" or n == 1:
        return i.clamp(0, n - 1), inside
    if padding_mode == "reflect":
        i = i.remainder(2 * n - 2)
        return torch.minimum(i, 2 * n - 2 - i), inside
    i = i.remainder(2 * n)
    return torch.minimum(i, 2 * n - 1 - i), inside


def _colored(values: torch.Tensor, color_matrix: torch.Tensor) -> torch.Tensor:
    m = color_matrix.to(values.dtype).expand(len(values), -1, -1)
    return torch.einsum("nij,njhw->nihw", m[:, :, :3], values) + m[:, :, 3, None, None]


def _channels(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(list(values), dtype=like.dtype, device=like.device)[:, None, None]


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64
