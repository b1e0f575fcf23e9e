"""affine_warp as torch's machinery, careless callers and NumPy see it."""

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BACKEND
from warp_problems import backward_op, op, random_images, rotation

import imgopt_fast.numpy
from imgopt_fast import _native, affine_warp

pytestmark = pytest.mark.usefixtures("one_thread")


# --- torch's machinery ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch 2.14's opcheck looks at one
def test_opcheck() -> None:
    images = torch.rand(2, 3, 6, 7, requires_grad=True)
    matrix = rotation(2, 6, 7).float().requires_grad_()
    colors = torch.rand(2, 3, 4)
    arguments = ([4, 9], "bilinear", "edge", [0.1, 0.2, 0.3], True, None, colors, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    torch.library.opcheck(op, (images, matrix, *arguments, torch.float32, torch.channels_last))
    table = torch.randint(0, 256, (1, 3, 256), dtype=torch.uint8)
    levels = random_images((2, 3, 6, 7))
    torch.library.opcheck(
        op, (levels, matrix.detach(), [4, 9], "nearest", "reflect", [1.0, 2.0, 3.0], False, table, None, [], [], None,
             torch.contiguous_format),
    )  # fmt: skip
    torch.library.opcheck(
        backward_op, (torch.rand(2, 3, 4, 9), images.detach(), matrix.detach(), "bicubic", "symmetric",
                      [0.1, 0.2, 0.3], False, colors, [0.4, 0.5, 0.6], True, True),
    )  # fmt: skip


def test_compile_and_export() -> None:
    def normalised(images: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        return affine_warp(images, matrix, size=(8, 9), mean=0.4, std=0.3, dtype=torch.float32)

    compiled = torch.compile(normalised, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (2, 3, 5):
        images, matrix = random_images((n, 3, 10, 12)), rotation(n, 10, 12)
        assert torch.equal(compiled(images, matrix), normalised(images, matrix))

    class Module(torch.nn.Module):
        def forward(self, images: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
            return normalised(images, matrix)

    batch = torch.export.Dim("batch", min=2, max=64)
    images, matrix = random_images((4, 3, 10, 12)), rotation(4, 10, 12)
    exported = torch.export.export(Module(), (images, matrix), dynamic_shapes=({0: batch}, {0: batch}))
    images, matrix = random_images((7, 3, 10, 12)), rotation(7, 10, 12)
    assert torch.equal(exported.module()(images, matrix), normalised(images, matrix))


def test_autocast() -> None:
    matrix = rotation(1, 6, 7).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert affine_warp(torch.rand(1, 3, 6, 7), matrix).dtype == torch.bfloat16
        assert affine_warp(torch.rand(1, 3, 6, 7), matrix, dtype=torch.float32).dtype == torch.float32
        assert affine_warp(torch.rand(1, 3, 6, 7), matrix.bfloat16()).dtype == torch.bfloat16
        assert affine_warp(random_images((1, 3, 6, 7)), matrix).dtype == torch.uint8
        images = torch.rand(1, 3, 6, 7, requires_grad=True)
        affine_warp(images, matrix).sum().backward()
    assert images.grad is not None
    assert images.grad.dtype == torch.float32


def test_memory_format_follows_the_input() -> None:
    images, matrix = torch.rand(2, 3, 6, 7), rotation(2, 6, 7)
    assert affine_warp(images, matrix).is_contiguous()
    last = images.contiguous(memory_format=torch.channels_last)
    assert affine_warp(last, matrix).is_contiguous(memory_format=torch.channels_last)


# --- bad input -----------------------------------------------------------------------------------------------------

U8, EYE = torch.zeros(2, 3, 4, 5, dtype=torch.uint8), torch.eye(3)[None]


@pytest.mark.parametrize(
    ("error", "name", "call"),
    [
        (TypeError, "images", lambda: affine_warp([1], EYE)),  # type: ignore[arg-type]
        (ValueError, "images", lambda: affine_warp(U8[0], EYE)),
        (TypeError, "images", lambda: affine_warp(U8.int(), EYE)),
        (ValueError, "images", lambda: affine_warp(U8[:, :, :0], EYE, size=(2, 2))),
        (TypeError, "matrix", lambda: affine_warp(U8, None)),  # type: ignore[arg-type]
        (TypeError, "matrix", lambda: affine_warp(U8, EYE.half())),
        (ValueError, "matrix", lambda: affine_warp(U8, EYE[0])),
        (ValueError, "matrix", lambda: affine_warp(U8, EYE.repeat(3, 1, 1))),
        (ValueError, "matrix", lambda: affine_warp(U8, EYE.clone().requires_grad_())),
        (ValueError, "matrix", lambda: affine_warp(U8, EYE.to("meta"))),
        (ValueError, "size", lambda: affine_warp(U8, EYE, size=3)),  # type: ignore[arg-type]
        (ValueError, "size", lambda: affine_warp(U8, EYE, size=(3, -1))),
        (ValueError, "size", lambda: affine_warp(U8, EYE, size=(3.5, 4))),  # type: ignore[arg-type]
        (ValueError, "size", lambda: affine_warp(U8, EYE, size="34")),  # type: ignore[arg-type]
        (TypeError, "images", lambda: affine_warp(U8.to_sparse(), EYE)),
        (ValueError, "size", lambda: affine_warp(U8, EYE, size=(3, 1 << 30))),
        (ValueError, "interpolation", lambda: affine_warp(U8, EYE, interpolation="linear")),
        (ValueError, "padding_mode", lambda: affine_warp(U8, EYE, padding_mode="zeros")),
        (ValueError, "fill", lambda: affine_warp(U8, EYE, fill=256)),
        (ValueError, "fill", lambda: affine_warp(U8, EYE, fill=float("nan"))),
        (ValueError, "fill", lambda: affine_warp(U8, EYE, fill=[1, 2])),
        (TypeError, "fill", lambda: affine_warp(U8, EYE, fill="black")),  # type: ignore[arg-type]
        (ValueError, "mean, std", lambda: affine_warp(U8, EYE, mean=0.5)),
        (ValueError, "std", lambda: affine_warp(U8, EYE, std=0.0, dtype=torch.float32)),
        (ValueError, "std", lambda: affine_warp(U8, EYE, std=[1, 2], dtype=torch.float32)),
        (ValueError, "mean", lambda: affine_warp(U8, EYE, mean=float("nan"), dtype=torch.float32)),
        (TypeError, "dtype", lambda: affine_warp(U8, EYE, dtype=torch.int64)),
        (TypeError, "table", lambda: affine_warp(U8.float(), EYE, table=torch.zeros(1, 3, 256, dtype=torch.uint8))),
        (TypeError, "table", lambda: affine_warp(U8, EYE, table=torch.zeros(1, 3, 256))),
        (ValueError, "table", lambda: affine_warp(U8, EYE, table=torch.zeros(1, 2, 256, dtype=torch.uint8))),
        (ValueError, "color_matrix", lambda: affine_warp(U8[:, :2], EYE, color_matrix=torch.zeros(1, 3, 4))),
        (ValueError, "color_matrix", lambda: affine_warp(U8, EYE, color_matrix=torch.zeros(1, 4, 4))),
        (TypeError, "color_matrix", lambda: affine_warp(U8, EYE, color_matrix=torch.zeros(1, 3, 4).half())),
        (ValueError, "color_matrix", lambda: affine_warp(U8, EYE, color_matrix=torch.zeros(1, 3, 4).requires_grad_())),
        (ValueError, "memory_format", lambda: affine_warp(U8, EYE, memory_format=torch.preserve_format)),
    ],
)  # fmt: skip
def test_bad_input(error: type[Exception], name: str, call: Any) -> None:
    with pytest.raises(error, match=rf"^{name}: "):
        call()


# --- the NumPy face ------------------------------------------------------------------------------------------------


def test_numpy_equals_torch() -> None:
    images, matrix = random_images((2, 3, 20, 31)), rotation(2, 20, 31)
    last = images.permute(0, 2, 3, 1).numpy()
    options: dict[str, Any] = {"size": (25, 19), "padding_mode": "reflect", "interpolation": "bicubic"}
    assert np.array_equal(
        imgopt_fast.numpy.affine_warp(last, matrix.numpy(), **options),
        affine_warp(images, matrix, **options).permute(0, 2, 3, 1).numpy(),
    )
    table = torch.randint(0, 256, (2, 3, 256), dtype=torch.uint8)
    colors = torch.rand(1, 3, 4)
    options |= {"fill": [1, 2, 3], "mean": 0.4, "std": [0.1, 0.2, 0.3], "antialias": True}
    expected = affine_warp(
        images, matrix[:1], table=table, color_matrix=colors, dtype=torch.float16, **options
    ).numpy()  # fmt: skip
    arrays = {"table": table.numpy(), "color_matrix": colors.numpy(), "dtype": np.float16}
    assert np.array_equal(
        imgopt_fast.numpy.affine_warp(last, matrix[0].numpy(), channels_first=True, **options, **arrays), expected
    )
    one = imgopt_fast.numpy.affine_warp(last[1], matrix[0].numpy(), **options, **(arrays | {"table": table[1].numpy()}))
    assert np.array_equal(one, expected[1].transpose(1, 2, 0))


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64])
def test_numpy_strides(dtype: Any) -> None:
    images = np.random.default_rng(0).integers(0, 255, (2, 12, 15, 3)).astype(dtype)
    eye = np.eye(3)
    for view in (images[::-1, :, ::-1], images[:, 2:9, 1:12:3, ::2], images.transpose(0, 2, 1, 3)):
        assert np.array_equal(imgopt_fast.numpy.affine_warp(view, eye), view)
    raw = np.zeros(images.nbytes + 1, np.uint8)[1:].view(dtype).reshape(images.shape)  # not aligned
    raw[:] = images
    assert np.array_equal(imgopt_fast.numpy.affine_warp(raw, eye), images)


IMAGE = np.zeros((4, 5, 3), np.uint8)
OTHER_ENDIAN = np.dtype(np.float32).newbyteorder()


@pytest.mark.parametrize(
    ("error", "name", "call"),
    [
        (TypeError, "images", lambda f: f([1], np.eye(3))),
        (ValueError, "images", lambda f: f(IMAGE[0], np.eye(3))),
        (TypeError, "images", lambda f: f(IMAGE.astype(int), np.eye(3))),
        (TypeError, "images", lambda f: f(IMAGE.astype(OTHER_ENDIAN), np.eye(3))),
        (TypeError, "dtype", lambda f: f(IMAGE, np.eye(3), dtype=OTHER_ENDIAN)),
        (ValueError, "images", lambda f: f(IMAGE[:0], np.eye(3))),
        (ValueError, "matrix", lambda f: f(IMAGE, np.eye(4))),
        (ValueError, "matrix", lambda f: f(IMAGE, np.full((2, 3), np.nan))),
        (TypeError, "matrix", lambda f: f(IMAGE, np.eye(3, dtype=int))),
        (ValueError, "size", lambda f: f(IMAGE, np.eye(3), size=(1, -2))),
        (ValueError, "size", lambda f: f(IMAGE, np.eye(3), size=(3.7, 3))),
        (TypeError, "dtype", lambda f: f(IMAGE, np.eye(3), dtype="nonsense")),
        (ValueError, "fill", lambda f: f(IMAGE, np.eye(3), fill=-1)),
        (ValueError, "mean, std", lambda f: f(IMAGE, np.eye(3), std=2)),
        (TypeError, "dtype", lambda f: f(IMAGE, np.eye(3), dtype=np.int32)),
        (ValueError, "table", lambda f: f(IMAGE, np.eye(3), table=np.zeros((2, 256), np.uint8))),
        (ValueError, "color_matrix", lambda f: f(IMAGE, np.eye(3), color_matrix=np.eye(3))),
    ],
)
def test_numpy_bad_input(error: type[Exception], name: str, call: Any) -> None:
    with pytest.raises(error, match=rf"^{name}: "):
        call(imgopt_fast.numpy.affine_warp)


def test_numbers_of_numpy_are_numbers() -> None:
    expected = affine_warp(U8, EYE, size=(4, 5), fill=3, mean=0.5, std=0.25, dtype=torch.float32)
    numbers: dict[str, Any] = {"fill": np.uint8(3), "mean": np.float32(0.5), "std": np.float64(0.25)}
    assert torch.equal(affine_warp(U8, EYE, size=np.array([4, 5]), dtype=torch.float32, **numbers), expected)


@pytest.mark.parametrize("width", [1024, 1023])
def test_nothing_is_written_between_the_rows_of_a_large_result(width: int) -> None:
    """Rows of whole lines go around the caches, in whole lines; others, in rows as far apart, must not."""
    core = _native.core()
    if core is None:
        pytest.skip("the compiled kernels write into any view")
    images = np.random.default_rng(0).integers(0, 256, (1, 3, 40, 50), np.uint8)
    matrix = np.array([[[0.03, 0.01, 2], [-0.01, 0.02, 20], [0, 0, 1]]])
    whole = np.full((1, 3, 1500, 1040 + 16), 7, np.float32)
    start = -whole.ctypes.data % 64 // 4
    output = whole[..., start : start + width]
    assert output.nbytes >= 16 << 20
    core.affine_warp(images, output, matrix, "bilinear", "constant", [0.0] * 3, False, None, None, [], [])
    assert (whole[..., :start] == 7).all()
    assert (whole[..., start + width :] == 7).all()
    small = np.full((1, 3, 1500, 500), 7, np.float32)
    core.affine_warp(images, small, matrix, "bilinear", "constant", [0.0] * 3, False, None, None, [], [])
    assert (output[..., :500] == small).all()


def test_a_child_process_does_not_wait_for_the_threads_of_its_parent() -> None:
    """The parent's threads are torch's; the child is the first to use ours."""
    if BACKEND != "native" or not hasattr(os, "fork"):
        pytest.skip("the compiled kernels' threads, where processes fork")
    code = (
        "import os, sys, numpy as np, torch, imgopt_fast.numpy as f\n"
        "torch.set_num_threads(2); torch.rand(1 << 20).exp_()\n"
        "child = os.fork()\n"
        "if child: sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "f.affine_warp(np.ones((512, 512, 3), np.uint8), np.eye(3)); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_numpy_needs_no_torch() -> None:
    if BACKEND != "native":
        pytest.skip(f"the {BACKEND} backend runs through torch")
    code = (
        "import sys, numpy as np, imgopt_fast.numpy as f; x = np.ones((4, 5, 3), np.uint8); "
        "assert (f.affine_warp(x, np.eye(3)) == x).all(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
