"""The C99 export, compiled with every warning and the undefined-behaviour sanitizer, bit by bit."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import require
from test_onnx import Everything, Gated, images
from torch import nn

from imgopt_fast import export
from imgopt_fast.compress import Int8Config, PruneConfig, prune, quantize

FLAGS = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "-fno-sanitize-recover", "-O1"]
SHIFTS = Int8Config(power_of_two=True)


def compile_and_run(folder: Path, model: nn.Module, x: torch.Tensor) -> np.ndarray:
    """The outputs of the folder's program as int32, after its golden vectors; x as the network takes it."""
    require(shutil.which("gcc") is not None, "gcc")
    program = folder.parent / "program"
    files = [str(folder / name) for name in ("model.c", "weights.c", "main.c")]
    subprocess.run(["gcc", *FLAGS, *files, "-o", str(program)], check=True)
    golden = subprocess.run([program], capture_output=True, text=True)
    assert golden.returncode == 0, golden.stdout + golden.stderr
    segment = model.network.segment_0
    name = next(step.name for step in segment.steps if step.kind == "quantize")
    scale, zero = segment.get_buffer(f"{name}_scale").item(), int(segment.get_buffer(f"{name}_zero_point"))
    stored = (torch.round(x / scale) + zero).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    found = subprocess.run([program, "-"], input=stored.numpy().tobytes(), capture_output=True, check=True)
    return np.frombuffer(found.stdout, np.int32).reshape(len(x), -1)


def exponent(folder: Path) -> int:
    text = (folder / "model.h").read_text()
    return int(text.split("_OUTPUT_EXPONENT ")[-1].split()[0])


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("network", ["everything", "inverted"])
def test_every_bit_agrees(network: str, pruned: bool, tmp_path: Path, inverted_bottlenecks: nn.Module) -> None:
    model = Everything().eval() if network == "everything" else inverted_bottlenecks
    x = images(24, 3, 14, 12) if network == "everything" else images(24, 3, 24, 24)
    if pruned:
        prune(model, PruneConfig(sparsity=0.8, end_step=1)).step()
    int8 = quantize(model, [x[:8]], SHIFTS)
    folder = tmp_path / "net"
    report = export(int8, "c", folder, images=x)
    assert report.checks[0].outputs == "bit-equal"
    if pruned:
        assert "_gaps[" in (folder / "weights.c").read_text()
    sums = compile_and_run(folder, int8, 3 * x)  # inputs that saturate, too
    assert np.array_equal((sums * 2.0 ** -exponent(folder)).astype(np.float32), int8(3 * x).numpy())


def test_the_code_keeps_its_word(tmp_path: Path, inverted_bottlenecks: nn.Module) -> None:
    """No floating point, no allocation; the sizes in the header are those of the object files."""
    int8 = quantize(inverted_bottlenecks, [images(8, 3, 24, 24)], SHIFTS)
    folder = tmp_path / "net"
    export(int8, "c", folder, verify=False, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3), name="tiny")
    code = "".join((folder / name).read_text() for name in ("model.h", "model.c", "weights.c", "main.c", "golden.h"))
    for word in ("float ", "double", "malloc", "calloc", "alloca(", "e-", "0."):
        assert word not in code, word
    require(shutil.which("gcc") is not None, "gcc")
    for name in ("model", "weights"):
        subprocess.run(
            ["gcc", "-std=c99", "-Os", "-c", str(folder / f"{name}.c"), "-o", str(tmp_path / f"{name}.o")], check=True
        )
    sizes = subprocess.run(["size", "-A", tmp_path / "model.o"], capture_output=True, text=True, check=True).stdout
    arena = int(code.split("TINY_ARENA_SIZE ")[1].split()[0])
    static = sum(int(line.split()[1]) for line in sizes.splitlines() if line.startswith((".bss", ".data ")))
    assert arena <= static < arena + 64
    disassembly = subprocess.run(["objdump", "-d", tmp_path / "model.o"], capture_output=True, text=True, check=True)
    assert "ss " not in disassembly.stdout.replace("class ", "")  # no scalar float instruction
    assert "tiny_prepare" in code
    # The table is what Normalize and the quantization do to a pixel.
    table = np.array(code.split("tiny_pixels[768] = {")[1].split("}")[0].split(","), int).reshape(3, 256)
    step = 2.0 ** -int(code.split("TINY_INPUT_EXPONENT ")[1].split()[0])
    zero = int(code.split("TINY_INPUT_ZERO_POINT ")[1].split()[0])
    real = (np.arange(256) / 255 - np.array([[0.5], [0.4], [0.3]])) / np.array([[0.2], [0.2], [0.3]])
    expected = np.clip(np.round(real / step) + zero, 0, 255)
    assert np.abs(table - expected).max() <= 1
    assert (table == expected).mean() > 0.99


def test_refusals_name_the_layer_and_leave_nothing(tmp_path: Path) -> None:
    x = images(4, 3, 20, 20)
    with pytest.raises(ValueError, match=r"silu.*c cannot carry it.*--format onnx"):
        export(quantize(Gated().eval(), [x], SHIFTS), "c", tmp_path / "net")
    with pytest.raises(ValueError, match=r"power_of_two=True"):
        export(quantize(nn.Sequential(nn.Conv2d(3, 4, 3)), [x]), "c", tmp_path / "net")
    assert list(tmp_path.iterdir()) == []
