"""affine_warp: kernels, Numba twin and reference against a float64 oracle, and against torch, scipy and OpenCV."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import optional
from warp_problems import FLOATS, check, homography, layout, oracle, random_images, rotation

from imgopt_fast import affine_warp
from imgopt_fast.ops.affine_warp import INTERPOLATIONS, PADDING_MODES, fallback, reference

pytestmark = pytest.mark.usefixtures("one_thread")


# --- against the oracle --------------------------------------------------------------------------------------------

SIZES = [  # n, c, input, output
    (2, 3, (23, 37), (31, 70)),
    (1, 1, (64, 65), (17, 129)),
    (3, 4, (9, 16), (16, 16)),
    (1, 3, (1, 1), (5, 3)),
    (2, 1, (1, 7), (3, 63)),
    (2, 2, (6, 1), (64, 64)),
    (1, 5, (40, 30), (8, 15)),
]


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.bfloat16])
def test_oracle(dtype: torch.dtype, interpolation: str, padding_mode: str, isa_or_backend: str) -> None:
    for (n, c, (h, w), size), perspective in itertools.product(SIZES, (False, True)):
        images = random_images((n, c, h, w), dtype)
        matrix = (homography if perspective else rotation)(n, h, w)
        fill = [float(10 * i + 3) for i in range(c)]
        if dtype != torch.uint8:
            fill = [v / 255 for v in fill]
        options = {"size": size, "interpolation": interpolation, "padding_mode": padding_mode, "fill": fill}
        expected = oracle(images, matrix, **options)
        for name, output in (("contiguous", dtype), ("channels_last", torch.float32), ("strided", torch.uint8)):
            memory_format = torch.channels_last if name == "channels_last" else torch.contiguous_format
            actual = affine_warp(layout(images, name), matrix, dtype=output, memory_format=memory_format, **options)
            assert actual.dtype == output
            assert actual.is_contiguous(memory_format=memory_format)
            check(actual, expected)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.uint8, *FLOATS])
def test_normalised(dtype: torch.dtype, channels: int, isa_or_backend: str) -> None:
    images = random_images((2, channels, 50, 61))
    matrix = rotation(2, 50, 61)
    mean, std = [0.485, 0.456, 0.406, 0.5][:channels], [0.229, 0.224, 0.225, 0.3][:channels]
    options: dict[str, Any] = {"size": (45, 70), "fill": 128.0}
    if dtype != torch.uint8:
        options |= {"mean": mean, "std": std}
    expected = oracle(images, matrix, **options)
    for name in ("contiguous", "channels_last", "strided"):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            check(
                affine_warp(layout(images, name), matrix, dtype=dtype, memory_format=memory_format, **options),
                expected, scale=2 / 0.224,
            )  # fmt: skip


@pytest.mark.parametrize("images_dtype", [torch.uint8, torch.float32, torch.float64])
def test_color_matrix_and_table(images_dtype: torch.dtype, isa_or_backend: str) -> None:
    images = random_images((2, 3, 20, 33), images_dtype)
    matrix = rotation(2, 20, 33)
    colors = torch.rand(2, 3, 4, dtype=torch.float64) * 1.5 - 0.4
    table = torch.stack([torch.randperm(256).to(torch.uint8) for _ in range(6)]).view(2, 3, 256)
    options: dict[str, Any] = {"color_matrix": colors, "fill": [0.2, 0.4, 0.7]}
    if images_dtype == torch.uint8:
        options |= {"table": table, "fill": [20, 90, 200]}
    normal = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    exact = oracle(images, matrix, **options)
    assert 0.1 < ((exact == 0) | (exact == 1)).double().mean() < 0.9  # the clamp matters
    check(affine_warp(images, matrix, dtype=torch.uint8, **options), oracle(images, matrix, **options))
    check(
        affine_warp(images, matrix, dtype=torch.float32, **options, **normal),
        oracle(images, matrix, **options, **normal), scale=3,
    )  # fmt: skip
    for key in ("color_matrix", "table"):
        if key in options:
            one = options | {key: options[key][1:]}
            check(affine_warp(images, matrix, dtype=torch.float32, **one), oracle(images, matrix, **one))


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_antialias(dtype: torch.dtype, padding_mode: str, isa_or_backend: str) -> None:
    images = random_images((4, 3, 40, 53), dtype)
    matrix = rotation(4, 40, 53, degrees=5, scale=0.5)
    matrix[:, 0] *= torch.tensor([1.0, 2.0, 0.3, 900.0])[:, None]
    for m in (matrix, homography(4, 40, 53) * torch.tensor([2.2, 3.1, 1.0])[:, None]):
        options = {
            "size": (13, 19),
            "padding_mode": padding_mode,
            "antialias": True,
            "fill": 0.5 if dtype.is_floating_point else 77,
        }
        check(affine_warp(images, m, **options), oracle(images, m, **options))
    table = 255 - torch.arange(256, dtype=torch.uint8).expand(1, 3, 256)
    if dtype == torch.uint8:
        check(affine_warp(images, matrix, table=table, **options), oracle(images, matrix, table=table, **options))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("arrangement", ["contiguous", "channels_last", "strided"])
def test_tables_and_boxes_of_every_layout(channels: int, arrangement: str, isa_or_backend: str) -> None:
    """Bit for bit, against NumPy: the table of each channel, then means that round half up."""
    n, h, w = 2, 19, 37
    images = layout(random_images((n, channels, h, w), torch.uint8), arrangement)
    table = torch.stack([torch.randperm(256) for _ in range(n * channels)]).to(torch.uint8).view(n, channels, 256)
    looked_up = table.gather(2, images.flatten(2).long()).view_as(images)
    eye = torch.eye(3)[None, :2]
    assert torch.equal(affine_warp(images, eye, table=table, interpolation="nearest"), looked_up)
    for box in (2, 3, 4, 5, 40):
        width, height = -(-w // box), -(-h // box)
        exact = torch.empty(n, channels, height, width, dtype=torch.uint8)
        for y, x in itertools.product(range(height), range(width)):
            area = looked_up[:, :, y * box : (y + 1) * box, x * box : (x + 1) * box].long().flatten(2)
            exact[:, :, y, x] = ((2 * area.sum(2) + area.shape[2]) // (2 * area.shape[2])).to(torch.uint8)
        # floor(box x + (box - 1) / 2 + ...) falls on the middle of box x.
        matrix = torch.tensor([[[box, 0, (box - 1) / 2], [0, box, (box - 1) / 2]]], dtype=torch.float64)
        options = {"size": (height, width), "interpolation": "nearest", "antialias": True, "padding_mode": "edge"}
        assert torch.equal(affine_warp(images, matrix, table=table, **options), exact), box


def test_box_means_round_half_up_for_every_sum(isa_or_backend: str) -> None:
    """All sums of 2 x 2 levels, and large boxes of few levels, where the quotient is taken by division."""
    levels = torch.arange(1021)
    parts = torch.stack([(levels + k) // 4 for k in range(4)], dim=1).to(torch.uint8)  # four levels of each sum
    images = parts.view(1021, 1, 2, 2)
    exact = (2 * levels + 4) // 8
    half = torch.tensor([[[2, 0, 0.5], [0, 2, 0.5]]], dtype=torch.float64)
    result = affine_warp(images, half, size=(1, 1), antialias=True, interpolation="nearest", padding_mode="edge")
    assert torch.equal(result.flatten().long(), exact)
    for side in (180, 181, 200):  # 2^15 lies between the squares of the first two
        tall = torch.zeros(1, 1, side, side, dtype=torch.uint8)
        for lit in (side * side // 2 - 1, side * side // 2, side * side // 2 + 1):
            tall.view(-1)[:] = 0
            tall.view(-1)[:lit] = 1
            matrix = torch.tensor([[[side, 0, (side - 1) / 2], [0, side, (side - 1) / 2]]], dtype=torch.float64)
            mean = affine_warp(tall, matrix, size=(1, 1), antialias=True, interpolation="nearest", padding_mode="edge")
            assert mean.item() == (2 * lit + side * side) // (2 * side * side)


def test_antialias_is_a_box_mean() -> None:
    images = random_images((1, 1, 6, 8))
    half = torch.tensor([[[2.0, 0, 0.5], [0, 3.0, 1.0]]])
    exact = images[0, 0].view(2, 3, 4, 2).double().mean((1, 3))
    assert torch.equal(
        affine_warp(images, half, size=(2, 4), antialias=True)[0, 0], (exact + 0.5).floor().to(torch.uint8)
    )


def test_numba_twin_directly() -> None:
    colors = torch.rand(1, 3, 4, dtype=torch.float64) * 0.6
    for dtype, transform in ((torch.uint8, rotation), (torch.float32, homography)):
        images, matrix = layout(random_images((2, 3, 19, 24), dtype), "channels_last"), transform(2, 19, 24)
        fill = [0.1, 0.5, 0.9] if dtype.is_floating_point else [10.0, 100.0, 200.0]
        for interpolation, padding_mode, antialias in itertools.product(INTERPOLATIONS, PADDING_MODES, (False, True)):
            arguments = ([11, 13], interpolation, padding_mode, fill, antialias, None, colors, [], [])
            actual = fallback.affine_warp(images, matrix * 2.1, *arguments, dtype, torch.contiguous_format)
            expected = reference.affine_warp(
                images, matrix * 2.1, *arguments, torch.float64, torch.contiguous_format
            )  # fmt: skip
            check(actual, expected)


# --- exactness -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("dtype", [torch.uint8, *FLOATS])
def test_identity_shift_and_flip_are_exact(
    dtype: torch.dtype, interpolation: str, padding_mode: str, isa_or_backend: str
) -> None:
    for c, (h, w) in ((3, (33, 130)), (1, (5, 64)), (4, (7, 17)), (2, (1, 3))):
        images = random_images((1, c, h, w), dtype)
        options: dict[str, Any] = {"interpolation": interpolation, "padding_mode": padding_mode}
        for name in ("contiguous", "channels_last"):
            source = layout(images, name)
            assert torch.equal(affine_warp(source, torch.eye(3)[None], **options), images)
            flip = torch.tensor([[[-1.0, 0, w - 1], [0, -1, h - 1]]])
            assert torch.equal(affine_warp(source, flip, **options), images.flip(2, 3))
            shift = torch.tensor([[[1.0, 0, -2], [0, 1, 1]]])
            mode = {"edge": "edge", "constant": "constant", "reflect": "reflect", "symmetric": "symmetric"}[
                padding_mode
            ]
            padded = np.pad(images.double().numpy(), ((0, 0), (0, 0), (0, 1), (2, 0)), mode)  # type: ignore[call-overload]
            expected = torch.from_numpy(padded[:, :, 1:, :w]).to(dtype)
            assert torch.equal(affine_warp(source, shift, **options), expected)


def test_float_of_uint8_within_two_ulp(isa_or_backend: str) -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    for interpolation in INTERPOLATIONS:
        actual = affine_warp(images, torch.eye(3)[None], dtype=torch.float32, interpolation=interpolation)
        exact = images.double() / 255
        ulp = torch.from_numpy(np.spacing(exact.float().numpy())).double()
        assert ((actual.double() - exact).abs() <= 2 * ulp).all()


def test_half_even_ties(isa_or_backend: str) -> None:
    """A shift by half a pixel puts every second value on a tie."""
    images = random_images((1, 3, 40, 64))
    shift = torch.tensor([[[1.0, 0, 0.5], [0, 1, 0]]])
    left, right = images[..., :-1].double(), images[..., 1:].double()
    actual = affine_warp(images, shift)[..., :-1]
    assert torch.equal(actual, ((left + right) / 2).round().to(torch.uint8))


def test_reciprocal_of_the_weight_sum_rounds_exactly() -> None:
    """rne(float32(acc) · float32(1/32512)) is the exact quotient rounded half to even, for every possible sum."""
    total = 32512
    acc = np.arange(-2 * 255, 255 * total + 2 * 255 + 1, dtype=np.int64)
    found = np.rint(acc.astype(np.float32) * np.float32(1 / total)).astype(np.int64)
    twice, floor = 2 * (acc % total), acc // total
    up = (twice > total) | ((twice == total) & (floor % 2 == 1))
    assert np.array_equal(found, floor + up)


# --- degenerate coordinates, sizes and threads -----------------------------------------------------------------------


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
def test_non_finite_coordinates_yield_fill(padding_mode: str, isa_or_backend: str) -> None:
    for dtype, interpolation in itertools.product((torch.uint8, torch.float32), INTERPOLATIONS):
        images = random_images((1, 3, 9, 70), dtype)
        fill = [3.0, 5.0, 7.0]
        expected = torch.tensor(fill)[:, None, None].expand(3, 9, 70).to(dtype)
        options: dict[str, Any] = {"fill": fill, "interpolation": interpolation, "padding_mode": padding_mode}
        for value, row, column in itertools.product((float("nan"), float("inf"), -float("inf")), (0, 1), (0, 1, 2)):
            matrix = torch.eye(3)[None, :2].clone()
            matrix[0, row, column] = value
            assert torch.equal(affine_warp(images, matrix, **options)[0], expected)
        vanishing = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [0, 0, 0]]])  # w = 0
        assert torch.equal(affine_warp(images, vanishing, **options)[0], expected)


def test_threads_do_not_change_bits(isa_or_backend: str) -> None:
    images = random_images((3, 3, 61, 97))
    matrix = rotation(3, 61, 97)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for padding_mode in PADDING_MODES:
            results.append(affine_warp(images, matrix, size=(200, 210), padding_mode=padding_mode))
    torch.set_num_threads(before)
    for i, result in enumerate(results):
        assert torch.equal(result, results[i % len(PADDING_MODES)])


def test_batch_is_its_images(isa_or_backend: str) -> None:
    images, matrix = random_images((4, 3, 33, 35)), rotation(4, 33, 35)
    whole = affine_warp(images, matrix)
    for i in range(4):
        assert torch.equal(whole[i : i + 1], affine_warp(images[i : i + 1], matrix[i : i + 1]))
    one = affine_warp(images, matrix[:1])
    assert torch.equal(one, affine_warp(images, matrix[:1].expand(4, -1, -1)))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_large_results_are_those_of_small_ones(
    channels: int, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    """From 16 MiB on, whole lines of a result go around the caches: strips of 64 columns, cut off at the right and
    below, blocks of fill among them, rows of whole lines and others."""
    images = layout(random_images((2, channels, 48, 70)), "channels_last")
    height = 1341 * 6 // (channels * dtype.itemsize)
    options: dict[str, Any] = {"dtype": dtype, "memory_format": memory_format, "mean": 0.4, "std": 0.3, "fill": 7.0}
    for width in (1120, 1119):
        matrix = rotation(2, height, width, scale=10)
        matrix[:, :, 2] += torch.tensor([35 - width / 2, 24 - height / 2])
        for more in [{}, {"color_matrix": torch.eye(3, 4)[None] * 0.7 + 0.1}][: 2 if channels == 3 else 1]:
            large = affine_warp(images, matrix, size=(height, width), **options, **more)
            assert large.numel() * large.element_size() >= 16 << 20
            for i in range(2):
                one = affine_warp(images[i : i + 1], matrix[i : i + 1], size=(height, width), **options, **more)
                assert one.numel() * one.element_size() < 16 << 20
                assert torch.equal(large[i : i + 1], one)


def test_vanishing_w_at_a_corner(isa_or_backend: str) -> None:
    """Found by the property test: no bound on the touched pixels may come from a corner at infinity."""
    images = random_images((1, 1, 4, 4))
    matrix = torch.tensor([[[1.0, 1, 1], [1, 1, 1], [1, 0, 0]]])
    actual = affine_warp(images, matrix, size=(3, 2), fill=7, interpolation="nearest")
    expected = [[7, images[0, 0, 2, 2]], [7, images[0, 0, 3, 3]], [7, 7]]
    assert actual[0, 0].tolist() == expected


def test_large_images_keep_their_last_columns(isa_or_backend: str) -> None:
    """float32 coordinates without a base would be off by half a pixel at column 2^24."""
    width = (1 << 24) + 77
    images = (torch.arange(width) % 251).to(torch.uint8).view(1, 1, 1, width)
    assert torch.equal(affine_warp(images, torch.eye(3)[None]), images)


def test_minification_without_antialias(isa_or_backend: str) -> None:
    images = random_images((1, 3, 600, 700))
    matrix = torch.tensor([[[9.7, 0.3, 1.1], [-0.2, 8.9, 40.2]]])
    check(affine_warp(images, matrix, size=(60, 65)), oracle(images, matrix, size=(60, 65)))


def test_empty() -> None:
    assert affine_warp(torch.zeros(0, 3, 4, 5), torch.zeros(0, 2, 3)).shape == (0, 3, 4, 5)
    assert affine_warp(torch.zeros(2, 3, 4, 5), torch.zeros(1, 2, 3), size=(0, 9)).shape == (2, 3, 0, 9)
    assert affine_warp(torch.zeros(2, 0, 4, 5), torch.zeros(1, 2, 3)).shape == (2, 0, 4, 5)


# --- against other libraries ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize(
    ("padding_mode", "torch_mode", "align"),
    [
        ("constant", "zeros", False),
        ("edge", "border", False),
        ("symmetric", "reflection", False),
        ("reflect", "reflection", True),
    ],
)
def test_grid_sample(interpolation: str, padding_mode: str, torch_mode: str, align: bool) -> None:
    """torch in float64. Its bicubic clips and folds each tap, as ours does, so every mode agrees."""
    h, w, size = 19, 26, (31, 22)
    images = torch.rand(2, 3, h, w, dtype=torch.float64)
    matrix = rotation(2, h, w, degrees=20, scale=0.6)
    x, y = reference.coordinates(matrix, size)
    gx, gy = (2 * x / (w - 1) - 1, 2 * y / (h - 1) - 1) if align else ((2 * x + 1) / w - 1, (2 * y + 1) / h - 1)
    expected = F.grid_sample(images, torch.stack([gx, gy], -1), interpolation, torch_mode, align_corners=align)
    actual = affine_warp(images, matrix, size=size, interpolation=interpolation, padding_mode=padding_mode)
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)
    narrow = affine_warp(images.float(), matrix, size=size, interpolation=interpolation, padding_mode=padding_mode)
    torch.testing.assert_close(narrow.double(), expected, atol=3e-5, rtol=0)


@pytest.mark.parametrize(("order", "interpolation"), [(0, "nearest"), (1, "bilinear")])
@pytest.mark.parametrize(
    ("mode", "padding_mode"),
    [("grid-constant", "constant"), ("nearest", "edge"), ("mirror", "reflect"), ("reflect", "symmetric")],
)
def test_scipy(order: int, interpolation: str, mode: str, padding_mode: str) -> None:
    ndimage = optional("scipy.ndimage")
    image = np.random.default_rng(1).random((17, 24))
    m = rotation(1, 17, 24, degrees=-40, scale=0.7)[0].numpy()
    rows_first = np.array([[m[1, 1], m[1, 0]], [m[0, 1], m[0, 0]]])
    expected = ndimage.affine_transform(
        image, rows_first, m[::-1, 2], output_shape=(20, 30), order=order, mode=mode, cval=0.25
    )
    actual = affine_warp(
        torch.from_numpy(image)[None, None], torch.from_numpy(m)[None], size=(20, 30), interpolation=interpolation,
        padding_mode=padding_mode, fill=0.25,
    )  # fmt: skip
    np.testing.assert_allclose(actual[0, 0].numpy(), expected, atol=1e-10)


@pytest.mark.parametrize(("flag", "interpolation"), [("INTER_LINEAR", "bilinear"), ("INTER_CUBIC", "bicubic")])
@pytest.mark.parametrize(
    ("border", "padding_mode"),
    [("CONSTANT", "constant"), ("REPLICATE", "edge"), ("REFLECT_101", "reflect"), ("REFLECT", "symmetric")],
)
def test_opencv(flag: str, interpolation: str, border: str, padding_mode: str) -> None:
    """On a smooth image: the fixed-point paths of OpenCV place samples on a grid of 1/32 pixel."""
    cv2 = optional("cv2")
    y, x = np.mgrid[0:64, 0:80]
    image = np.stack([x * 2 + y, 255 - x - 2 * y, 100 + 50 * np.sin(x / 20)], -1).clip(0, 255).astype(np.uint8)
    m = rotation(1, 64, 80, degrees=25, scale=0.9)
    expected = cv2.warpAffine(
        image, m[0].numpy(), (90, 70), flags=getattr(cv2, flag) | cv2.WARP_INVERSE_MAP,
        borderMode=getattr(cv2, f"BORDER_{border}"), borderValue=(10, 20, 30),
    )  # fmt: skip
    images = torch.from_numpy(image).permute(2, 0, 1)[None]
    actual = affine_warp(
        images, m, size=(70, 90), interpolation=interpolation, padding_mode=padding_mode, fill=[10, 20, 30]
    )
    off = np.abs(actual[0].permute(1, 2, 0).numpy().astype(int) - expected.astype(int))
    steep = 4 if padding_mode == "constant" else 1  # 1/32 pixel of a step of up to 255 levels, on both axes
    inside = np.percentile(off, 97)
    assert inside <= 1, off.max()
    assert off.max() <= steep * 4, off.max()
