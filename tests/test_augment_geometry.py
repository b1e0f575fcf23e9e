"""The converters of coordinate conventions, each against the library or the formula whose convention it converts."""

import math

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage

from imgopt_fast import affine_warp
from imgopt_fast.augment import geometry

ANGLED = np.array([[0.9, 0.25, -1.75], [-0.2, 1.1, 2.5]])  # exact in binary: peers in float32 see the same map


def ramp(height: int, width: int) -> torch.Tensor:
    """A smooth image, so that a wrong coordinate shows and a peer's coarse weights do not."""
    y, x = torch.meshgrid(
        torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij"
    )
    return torch.stack([torch.sin(x / 3) + y / 7, torch.cos(y / 4) * x / 9])[None]


def warped(images: torch.Tensor, matrix: np.ndarray, **options) -> torch.Tensor:
    return affine_warp(images, torch.from_numpy(np.ascontiguousarray(matrix))[None], **options)


@pytest.mark.parametrize("align_corners", [False, True])
def test_torch_convention(align_corners):
    images = ramp(11, 17)
    theta = torch.tensor([[[0.8, 0.2, 0.1], [-0.3, 1.1, -0.2]]], dtype=torch.float64)
    grid = F.affine_grid(theta, [1, 2, 9, 13], align_corners=align_corners)
    expected = F.grid_sample(images, grid, align_corners=align_corners)
    matrix = geometry.from_torch(theta, (11, 17), (9, 13), align_corners=align_corners)
    torch.testing.assert_close(affine_warp(images, matrix, size=(9, 13)), expected, rtol=0, atol=1e-12)
    back = geometry.to_torch(matrix, (11, 17), (9, 13), align_corners=align_corners)
    torch.testing.assert_close(back, theta, rtol=0, atol=1e-14)


@pytest.mark.filterwarnings("ignore:Since version 1.3.0, affine_grid behavior has changed for unit-size grids")
@pytest.mark.parametrize("align_corners", [False, True])
def test_torch_convention_with_an_axis_of_one_pixel(align_corners):
    images = ramp(1, 6)
    theta = torch.tensor([[[0.8, 0.3, 0.1], [0.0, 1.0, 0.0]]], dtype=torch.float64)
    grid = F.affine_grid(theta, [1, 2, 1, 4], align_corners=align_corners)
    expected = F.grid_sample(images, grid, align_corners=align_corners)
    matrix = geometry.from_torch(theta, (1, 6), (1, 4), align_corners=align_corners)
    torch.testing.assert_close(affine_warp(images, matrix, size=(1, 4)), expected, rtol=0, atol=1e-12)


def test_torch_convention_carries_gradients():
    theta = torch.tensor([[[0.8, 0.2, 0.1], [-0.3, 1.1, -0.2]]], dtype=torch.float64, requires_grad=True)
    matrix = geometry.compose(geometry.from_torch(theta, (5, 5), (5, 5)), torch.eye(3, dtype=torch.float64)[None])
    geometry.invert(matrix).sum().backward()
    assert theta.grad is not None
    assert theta.grad.isfinite().all()
    with pytest.raises(ValueError, match="at least 2"):
        geometry.to_torch(theta, (1, 5), (5, 5), align_corners=True)


@pytest.mark.parametrize("inverse_map", [False, True])
def test_opencv_convention(inverse_map):
    images = ramp(20, 24)
    array = images[0, 0].numpy()
    flags = cv2.INTER_LINEAR | (cv2.WARP_INVERSE_MAP if inverse_map else 0)
    expected = cv2.warpAffine(array, ANGLED, (24, 20), flags=flags)
    matrix = geometry.from_opencv(ANGLED, inverse_map=inverse_map)
    result = warped(images, matrix)[0, 0].numpy()
    assert np.abs(result - expected)[5:-5, 5:-5].max() < 0.02  # OpenCV may round coordinates to 1/32 pixel
    np.testing.assert_allclose(geometry.to_opencv(geometry.from_opencv(ANGLED)), ANGLED, atol=1e-14)


def test_opencv_perspective():
    images = ramp(20, 24)
    matrix = np.vstack([ANGLED, [0.002, -0.003, 1.0]])
    expected = cv2.warpPerspective(images[0, 1].numpy(), matrix, (24, 20), flags=cv2.INTER_LINEAR)
    result = warped(images, geometry.from_opencv(matrix))[0, 1].numpy()
    assert np.abs(result - expected)[5:-5, 5:-5].max() < 0.02


def test_pillow_convention():
    images = ramp(20, 24)
    source = Image.fromarray(images[0, 0].numpy().astype(np.float32))
    for data, kind in (
        (ANGLED.ravel(), Image.Transform.AFFINE),
        ([*ANGLED.ravel(), 0.002, -0.003], Image.Transform.PERSPECTIVE),
    ):
        expected = np.asarray(source.transform((24, 20), kind, list(data), Image.Resampling.BILINEAR))
        result = warped(images, geometry.from_pillow(data))[0, 0].numpy()
        assert np.abs(result - expected)[5:-5, 5:-5].max() < 1e-4
    with pytest.raises(ValueError, match="data"):
        geometry.from_pillow([1.0, 2.0])


def test_scipy_convention():
    images = ramp(20, 24)
    linear, offset = np.array([[0.9, 0.25], [-0.2, 1.1]]), np.array([1.5, -0.75])
    expected = ndimage.affine_transform(images[0, 0].numpy(), linear, offset, order=1, mode="grid-constant")
    result = warped(images, geometry.from_scipy(linear, offset))[0, 0].numpy()
    np.testing.assert_allclose(result, expected, atol=1e-12)
    with pytest.raises(ValueError, match="matrix"):
        geometry.from_scipy(np.eye(3))


@pytest.mark.parametrize("center", [None, (4.0, 6.5)])
def test_torchvision_convention(center):
    """Against the closed form of its documentation, inverted here as a plain 3 × 3 matrix."""
    height, width, angle, scale, (tx, ty), shear = 20, 26, 31.0, 1.3, (3.0, -2.0), (12.0, -7.0)
    cx, cy = (width / 2, height / 2) if center is None else center  # pixel edges
    a, sx, sy = (math.radians(v) for v in (angle, *shear))
    forward = np.array(
        [
            [math.cos(a - sy) / math.cos(sy), -math.cos(a - sy) * math.tan(sx) / math.cos(sy) - math.sin(a), 0],
            [math.sin(a - sy) / math.cos(sy), -math.sin(a - sy) * math.tan(sx) / math.cos(sy) + math.cos(a), 0],
            [0, 0, 1],
        ]
    )
    forward[:2, :2] *= scale

    def shift(x: float, y: float) -> np.ndarray:
        return np.array([[1.0, 0, x], [0, 1, y], [0, 0, 1]])

    full = shift(tx, ty) @ shift(cx - 0.5, cy - 0.5) @ forward @ shift(0.5 - cx, 0.5 - cy)
    matrix = geometry.from_torchvision(
        (height, width), angle=angle, translate=(tx, ty), scale=scale, shear=shear, center=center
    )
    np.testing.assert_allclose(geometry.homogeneous(matrix), np.linalg.inv(full), atol=1e-12)


def test_a_positive_angle_turns_clockwise():
    images = torch.zeros(1, 1, 9, 9)
    images[0, 0, 0, 4] = 1  # twelve o'clock
    result = warped(images, geometry.from_torchvision((9, 9), angle=90.0))
    assert result[0, 0, 4, 8] == pytest.approx(1.0)  # three o'clock


def test_compose_is_one_warp_after_the_other():
    images = ramp(16, 16)
    first, then = geometry.translation(2.0, -1.0), geometry.horizontal_flip(16)
    twice = warped(warped(images, first), then)
    torch.testing.assert_close(warped(images, geometry.compose(first, then)), twice, rtol=0, atol=0)
    assert geometry.compose(first, then).shape == (2, 3)
    assert geometry.compose(first, np.eye(3)).shape == (3, 3)
    np.testing.assert_allclose(geometry.compose(ANGLED, geometry.invert(ANGLED)), np.eye(3)[:2], atol=1e-15)
    with pytest.raises(ValueError, match="at least one"):
        geometry.compose()
    with pytest.raises(ValueError, match="matrix"):
        geometry.compose(np.eye(2))


def test_elementary_maps_are_exact():
    images = torch.arange(2 * 3 * 5 * 7, dtype=torch.uint8).view(2, 3, 5, 7)
    assert torch.equal(warped(images, geometry.horizontal_flip(7)), images.flip(3))
    assert torch.equal(warped(images, geometry.vertical_flip(5)), images.flip(2))
    assert torch.equal(warped(images, geometry.resized_crop(1, 2, 3, 4, (3, 4)), size=(3, 4)), images[:, :, 1:4, 2:6])
    expected = F.interpolate(images.double(), (10, 14), mode="bilinear", align_corners=False)
    result = warped(images.double(), geometry.resized_crop(0, 0, 5, 7, (10, 14)), size=(10, 14), padding_mode="edge")
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


def test_homography_takes_points_to_points(rng):
    source = np.array([[0.0, 0], [20, 0], [20, 10], [0, 10]])
    target = source + rng.uniform(-3, 3, (4, 4, 2))
    matrix = geometry.homography(source, target)
    assert matrix.shape == (4, 3, 3)
    moved = geometry.transform_points(torch.from_numpy(np.broadcast_to(source, (4, 4, 2)).copy()), matrix)
    np.testing.assert_allclose(moved.numpy(), target, atol=1e-9)
    peer = cv2.getPerspectiveTransform(target[0].astype(np.float32), source.astype(np.float32))
    np.testing.assert_allclose(matrix[0], peer, atol=1e-4)
    with pytest.raises(ValueError, match="source and target"):
        geometry.homography(source[:3], target)
    line = np.array([[0.0, 0], [10, 5], [20, 10], [0, 10]])
    with pytest.raises(ValueError, match="target: expected four points of which no three lie on one line"):
        geometry.homography(source, line)
    assert np.array_equal(geometry.homography(source, source), np.eye(3))


def test_boxes_are_clipped_and_upright():
    boxes = torch.tensor([[[0.0, 0, 8, 6], [1, 2, 3, 5]]])
    flipped = geometry.transform_boxes(boxes, geometry.horizontal_flip(8)[None])
    torch.testing.assert_close(flipped, torch.tensor([[[0.0, 0, 8, 6], [5, 2, 7, 5]]], dtype=torch.float64))
    moved = geometry.transform_boxes(boxes, geometry.translation(-2.0, 100.0)[None], (6, 8))
    torch.testing.assert_close(moved, torch.tensor([[[0.0, 6, 6, 6], [0, 6, 1, 6]]], dtype=torch.float64))
