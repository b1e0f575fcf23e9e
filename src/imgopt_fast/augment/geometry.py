"""Coordinate maps in the one convention of this library, and exact converters from the others.

A matrix here takes an output pixel to the input point it is sampled from,

    [x, y, 1]_in ∝ M · [x, y, 1]_out,      x = column, y = row, pixel centres at integers,

is (..., 2, 3) for an affine map or (..., 3, 3) for a homography, and is what `imgopt_fast.affine_warp` takes. The
centre of a W × H image is ((W - 1) / 2, (H - 1) / 2); its left edge lies at x = -0.5.

Everything is computed in float64. Functions of a matrix accept NumPy arrays, or torch tensors, for which they
return tensors on the same device and are differentiable.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

Matrix = NDArray[np.float64]
Size = tuple[int, int]
M = TypeVar("M", NDArray[np.float64], torch.Tensor)

# ---------------------------------------------------------------------------------------------------- algebra


def compose(*matrices: M) -> M:
    """The one matrix for warping by the first, then by the second, and so on; batches broadcast.

    Returns (..., 2, 3) when every argument is affine, else (..., 3, 3).
    """
    if not matrices:
        raise ValueError("compose() needs at least one matrix")
    result: Any = homogeneous(matrices[0])
    for matrix in matrices[1:]:
        result = result @ homogeneous(matrix)
    affine = all(matrix.shape[-2] == 2 for matrix in matrices)
    return cast(M, result[..., :2, :] if affine else result)


def invert(matrix: M) -> M:
    """The map from input points to output points: (..., 2, 3) or (..., 3, 3) as given."""
    full: Any = homogeneous(matrix)
    inverse = torch.linalg.inv(full) if isinstance(full, torch.Tensor) else np.linalg.inv(full)
    return cast(M, inverse[..., : matrix.shape[-2], :])


def homogeneous(matrix: M) -> M:
    """(..., 3, 3) float64: the row [0, 0, 1] joins an affine matrix."""
    if matrix.ndim < 2 or tuple(matrix.shape[-2:]) not in ((2, 3), (3, 3)):
        raise ValueError(f"matrix must be (..., 2, 3) or (..., 3, 3), got {tuple(matrix.shape)}")
    if isinstance(matrix, torch.Tensor):
        matrix = matrix.to(torch.float64)
        if matrix.shape[-2] == 3:
            return matrix
        row = matrix.new_tensor([0.0, 0.0, 1.0]).expand(*matrix.shape[:-2], 1, 3)
        return torch.cat([matrix, row], dim=-2)
    full: NDArray[np.float64] = np.asarray(matrix, dtype=np.float64)
    if full.shape[-2] == 3:
        return full
    result = np.zeros((*full.shape[:-2], 3, 3))
    result[..., :2, :] = full
    result[..., 2, 2] = 1.0
    return result


def affine(a: ArrayLike, b: ArrayLike, c: ArrayLike, d: ArrayLike, e: ArrayLike, f: ArrayLike) -> Matrix:
    """x_in = a·x + b·y + c and y_in = d·x + e·y + f: (..., 2, 3); the arguments broadcast."""
    entries = [v if isinstance(v, (float, np.ndarray)) else np.asarray(v, np.float64) for v in (a, b, c, d, e, f)]
    shapes = {v.shape for v in entries if isinstance(v, np.ndarray)} - {()}
    shape = shapes.pop() if len(shapes) == 1 else np.broadcast_shapes(*shapes)
    result = np.empty((*shape, 2, 3))
    for i, value in enumerate(entries):
        result[..., i // 3, i % 3] = value
    return result


# ---------------------------------------------------------------------------------------------------- elementary maps


def translation(x: ArrayLike, y: ArrayLike) -> Matrix:
    """Moves the image by `x` pixels to the right and `y` pixels down."""
    return affine(1.0, 0.0, np.negative(x), 0.0, 1.0, np.negative(y))


def horizontal_flip(width: int) -> Matrix:
    return affine(-1.0, 0.0, width - 1, 0.0, 1.0, 0.0)


def vertical_flip(height: int) -> Matrix:
    return affine(1.0, 0.0, 0.0, 0.0, -1.0, height - 1)


def resized_crop(top: ArrayLike, left: ArrayLike, height: ArrayLike, width: ArrayLike, size: Size) -> Matrix:
    """The `height` × `width` pixels from row `top` and column `left` on, stretched over an output of `size` (H, W).

    Outer edges meet outer edges (half-pixel centres), as in every resize that is not called "align corners".
    """
    sx, sy = np.divide(width, size[1]), np.divide(height, size[0])
    return affine(sx, 0.0, np.add(left, 0.5 * sx - 0.5), 0.0, sy, np.add(top, 0.5 * sy - 0.5))


def rotate_scale_shear(
    angle: ArrayLike,
    scale: ArrayLike,
    shear: tuple[ArrayLike, ArrayLike] | None,
    center: tuple[ArrayLike, ArrayLike],
    translate: tuple[ArrayLike, ArrayLike] | None = None,
) -> Matrix:
    """Turns the image by `angle` degrees clockwise, scales and shears it about `center` (x, y), then moves it.

    The image moves by T · C · R(angle) · Shear_y · Shear_x · scale · C⁻¹, shears in degrees and of opposite sign (that
    is torchvision's order and sign); this is the inverse of that.
    """
    rotation, inverse_scale = np.radians(angle), np.divide(1.0, scale)
    a, b = np.cos(rotation) * inverse_scale, np.sin(rotation) * inverse_scale
    d, e = -b, a
    if shear is not None:
        # Shear_x⁻¹ · Shear_y⁻¹ · R(-angle), where Shear_x⁻¹ = [1, tan_x; 0, 1] and Shear_y⁻¹ = [1, 0; tan_y, 1]
        tan_x, tan_y = np.tan(np.radians(shear[0])), np.tan(np.radians(shear[1]))
        d, e = tan_y * a - b, tan_y * b + a
        a, b = a + tan_x * d, b + tan_x * e
    x, y = center if translate is None else (np.add(center[0], translate[0]), np.add(center[1], translate[1]))
    return affine(a, b, np.subtract(center[0], a * x + b * y), d, e, np.subtract(center[1], d * x + e * y))


def homography(source: ArrayLike, target: ArrayLike) -> Matrix:
    """The map under which the image's points `source` land on `target`: (..., 4, 2) as (x, y) each, to (..., 3, 3).

    The last entry is 1, unless the map takes the output's first pixel to infinity. ValueError where three of the four
    points lie on one line.
    """
    start, end = np.asarray(source, np.float64), np.asarray(target, np.float64)
    if start.shape[-2:] != (4, 2) or end.shape[-2:] != (4, 2):
        raise ValueError(f"source and target must be (..., 4, 2), got {start.shape} and {end.shape}")
    for name, points in (("source", start), ("target", end)):
        if not no_three_on_a_line(points).all():
            raise ValueError(f"{name}: expected four points of which no three lie on one line, got {points.tolist()}")
    a, b, c = np.moveaxis(_from_unit_square(end), -1, 0)
    back = np.stack([np.cross(b, c), np.cross(c, a), np.cross(a, b)], axis=-2)  # the inverse, times the determinant
    matrix = _from_unit_square(start) @ back
    last = matrix[..., 2:, 2:]
    return np.asarray(matrix / np.where(last == 0, 1, last))


def no_three_on_a_line(points: Matrix) -> NDArray[np.bool_]:
    """Of four points (..., 4, 2); exact for whole numbers."""
    one, other = (np.roll(points, -steps, axis=-2) - points for steps in (1, 2))
    return np.asarray((one[..., 0] * other[..., 1] != one[..., 1] * other[..., 0]).all(axis=-1))


def _from_unit_square(corners: Matrix) -> Matrix:
    """The map from (0, 0), (1, 0), (1, 1), (0, 1) to `corners` (P. Heckbert, 1989): whole numbers for a rectangle."""
    p, q, r, s = np.moveaxis(corners, -2, 0)

    def area(u: Matrix, v: Matrix) -> Matrix:
        return np.asarray(u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0])

    skew, whole = p - q + r - s, area(q - r, s - r)
    g, h = area(skew, s - r) / whole, area(q - r, skew) / whole
    columns = [q - p + g[..., None] * q, s - p + h[..., None] * s, p]
    top = np.stack(columns, axis=-1)
    return np.concatenate([top, np.stack([g, h, np.ones_like(g)], axis=-1)[..., None, :]], axis=-2)


# ---------------------------------------------------------------------------------------------------- conventions


def from_opencv(matrix: M, *, inverse_map: bool = False) -> M:
    """The matrix of `cv2.warpAffine` or `cv2.warpPerspective`; also kornia's `warp_affine` and `warp_perspective`.

    Theirs takes input pixels to output pixels, unless `inverse_map` (cv2.WARP_INVERSE_MAP); centres at integers.
    """
    full = homogeneous(matrix)[..., : matrix.shape[-2], :]
    return full if inverse_map else invert(full)


def to_opencv(matrix: M) -> M:
    """The inverse of `from_opencv`."""
    return invert(homogeneous(matrix)[..., : matrix.shape[-2], :])


def from_torch(theta: M, input_size: Size, output_size: Size, *, align_corners: bool = False) -> M:
    """The matrix of `torch.nn.functional.affine_grid` and `grid_sample`, sizes as (H, W).

    Theirs takes output to input too, in coordinates where -1 and 1 are the image's outer edges, or with
    `align_corners` the centres of its outermost pixels.
    """
    to_pixels = _from_unit(input_size, align_corners)
    to_unit = _to_unit(output_size, align_corners)
    return _sandwich(to_pixels, theta, to_unit)


def to_torch(matrix: M, input_size: Size, output_size: Size, *, align_corners: bool = False) -> M:
    """The inverse of `from_torch`; with `align_corners` both sizes must exceed 1."""
    if align_corners and min(*input_size, *output_size) < 2:
        raise ValueError(f"align_corners needs sizes of at least 2, got {input_size} and {output_size}")
    return _sandwich(_to_unit(input_size, align_corners), matrix, _from_unit(output_size, align_corners))


def from_torchvision(
    size: Size,
    *,
    angle: ArrayLike = 0.0,
    translate: tuple[ArrayLike, ArrayLike] | None = None,
    scale: ArrayLike = 1.0,
    shear: tuple[ArrayLike, ArrayLike] | None = None,
    center: tuple[float, float] | None = None,
) -> Matrix:
    """The map of `torchvision.transforms.functional.affine` for images of `size` (H, W): (..., 2, 3).

    `angle` and `shear` in degrees, positive `angle` clockwise (`functional.rotate` counts the other way round: pass
    the negative), `translate` in pixels (x, y); `center` (x, y) measured from the upper left corner of the image,
    by default its middle. Arrays give one matrix per sample.
    """
    x, y = (size[1] * 0.5, size[0] * 0.5) if center is None else center
    return rotate_scale_shear(angle, scale, shear, (x - 0.5, y - 0.5), translate)


def from_pillow(data: ArrayLike) -> Matrix:
    """The `data` of `PIL.Image.transform`: (..., 6) for AFFINE or (..., 8) for PERSPECTIVE.

    Theirs takes output to input too, with pixel centres at half-integers.
    """
    values = np.asarray(data, dtype=np.float64)
    if values.shape[-1] == 6:
        matrix = values.reshape(*values.shape[:-1], 2, 3)
    elif values.shape[-1] == 8:
        one = np.ones((*values.shape[:-1], 1))
        matrix = np.concatenate([values, one], axis=-1).reshape(*values.shape[:-1], 3, 3)
    else:
        raise ValueError(f"data must be (..., 6) or (..., 8), got {values.shape}")
    # their outer coordinate is ours plus a half: shift in, map, shift back
    return compose(translation(0.5, 0.5), matrix, translation(-0.5, -0.5))


def from_scipy(matrix: ArrayLike, offset: ArrayLike = 0.0) -> Matrix:
    """The 2 × 2 `matrix` and `offset` of `scipy.ndimage.affine_transform`: output to input, in (row, column) order."""
    linear = np.asarray(matrix, dtype=np.float64)
    if linear.shape != (2, 2):
        raise ValueError(f"matrix must be (2, 2), got {linear.shape}")
    rows, columns = np.broadcast_to(np.asarray(offset, dtype=np.float64), (2,))
    return affine(linear[1, 1], linear[1, 0], columns, linear[0, 1], linear[0, 0], rows)


# ---------------------------------------------------------------------------------------------------- annotations


def transform_points(points: torch.Tensor, matrix: M) -> torch.Tensor:
    """Where the points (N, K, 2) of the input images appear in the output: float64 (x, y), pixel centres at integers.

    `matrix` is (N or 1, 2 or 3, 3), the one that the images were warped with.
    """
    forward = torch.as_tensor(invert(homogeneous(matrix)), dtype=torch.float64, device=points.device)
    moved = torch.nn.functional.pad(points.to(torch.float64), (0, 1), value=1.0) @ forward.transpose(-1, -2)
    return moved[..., :2] / moved[..., 2:]


def transform_boxes(boxes: torch.Tensor, matrix: M, size: Size | None = None) -> torch.Tensor:
    """The upright boxes around the moved boxes (N, K, 4), each (x1, y1, x2, y2): float64.

    Boxes are measured along pixel edges: (0, 0, W, H) holds the whole image. They are clipped to an output of `size`
    (H, W) when it is given; one that left the image ends with no area.
    """
    x1, y1, x2, y2 = (boxes.to(torch.float64) - 0.5).unbind(-1)
    corners = torch.stack([torch.stack(p, -1) for p in ((x1, y1), (x2, y1), (x2, y2), (x1, y2))], dim=-2)
    moved = transform_points(corners.flatten(1, 2), matrix).reshape(corners.shape) + 0.5
    low, high = moved.amin(-2), moved.amax(-2)
    if size is not None:
        limit = torch.tensor([size[1], size[0]], dtype=torch.float64, device=boxes.device)
        low, high = torch.minimum(low.clamp(min=0), limit), torch.minimum(high.clamp(min=0), limit)
    return torch.cat([low, high], dim=-1)


# ---------------------------------------------------------------------------------------------------- details


def _to_unit(size: Size, align_corners: bool) -> Matrix:
    """Pixels to torch's unit coordinates; an axis of one aligned pixel has the coordinate 0, as in affine_grid."""
    (ax, bx), (ay, by) = (_axis_to_unit(length, align_corners) for length in (size[1], size[0]))
    return affine(ax, 0.0, bx, 0.0, ay, by)


def _axis_to_unit(length: int, align_corners: bool) -> tuple[float, float]:
    if align_corners:
        return (2.0 / (length - 1), -1.0) if length > 1 else (0.0, 0.0)
    return 2.0 / length, 1.0 / length - 1.0


def _from_unit(size: Size, align_corners: bool) -> Matrix:
    height, width = size
    less = 1 if align_corners else 0
    sx, sy = (width - less) / 2.0, (height - less) / 2.0
    return affine(sx, 0.0, (width - 1) / 2.0, 0.0, sy, (height - 1) / 2.0)


def _sandwich(left: Matrix, matrix: M, right: Matrix) -> M:
    if isinstance(matrix, torch.Tensor):
        first, last = (torch.from_numpy(m).to(matrix.device) for m in (left, right))
        return compose(first, matrix, last)
    return cast(M, compose(left, cast(Any, matrix), right))
