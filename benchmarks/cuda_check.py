"""Everything that a machine with a GPU can tell, in one call: build, test, time. Needs no network.

    python3 benchmarks/cuda_check.py OUT                 build into OUT/site, run the CUDA tests, time; results in OUT
    python3 benchmarks/cuda_check.py OUT --skip build    again, with what OUT/site holds

OUT/results.json has the device, the versions, the command, the ceilings that were measured (copy bandwidth, bfloat16
product) and every case: median and quartiles of the time in microseconds, the peer's, and the share of the floor.
OUT/build.log and OUT/tests.log have the rest. The build environment is the machine's own: torch with CUDA, nvcc, CMake,
ninja, scikit-build-core and pybind11 must be there.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
ROUNDS, WARM_UP = 60, 5
Call = Callable[[], Any]


# --- build and test -------------------------------------------------------------------------------------------------


def build(out: Path) -> None:
    major, minor = torch.cuda.get_device_capability()
    architecture = f"{major}{minor}a" if major == 9 else f"{major}{minor}"  # wgmma is sm_90a's, not sm_90's
    command = [
        sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-index", "--no-deps", "--upgrade",
        "--target", str(out / "site"), "-C", "cmake.define.IMGOPT_CUDA=ON",
        "-C", f"cmake.define.CMAKE_CUDA_ARCHITECTURES={architecture}-real", "-v", str(ROOT),
    ]  # fmt: skip
    run(command, out / "build.log", IMGOPT_REQUIRE_NATIVE="1")


def test(out: Path) -> None:
    files = [path for path in sorted(ROOT.glob("tests/test_cuda*.py")) if path.stem != "test_cuda_emulated"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files)]
    run(command, out / "tests.log", IMGOPT_REQUIRE_CUDA="1", PYTHONPATH=str(out / "site"))


def run(command: list[str], log: Path, **env: str) -> None:
    with log.open("w") as file:
        code = subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, stdout=file, stderr=file).returncode
    print(f"{log.name}: exit {code}", flush=True)
    if code:
        print(log.read_text()[-6000:])


# --- time -----------------------------------------------------------------------------------------------------------


def microseconds(call: Call) -> dict[str, float]:
    """Median and quartiles of ROUNDS replays of a graph of the call, between device events."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(ROUNDS)]
    for _ in range(WARM_UP):
        graph.replay()
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = sorted(1e3 * start.elapsed_time(end) for start, end in events)
    return {"median": times[ROUNDS // 2], "low": times[ROUNDS // 4], "high": times[3 * ROUNDS // 4]}


def ceilings() -> dict[str, float]:
    source = torch.randint(0, 256, (2 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.numel() / microseconds(lambda: target.copy_(source))["median"] * 1e6
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product = 2 * 8192**3 / microseconds(lambda: a @ b)["median"] * 1e6
    return {"copy bytes/s": copied, "bfloat16 flop/s": product}


class Report:
    """Collects cases and prints a line for each."""

    def __init__(self, rates: dict[str, float]) -> None:
        self.rates, self.cases = rates, []

    def add(self, name: str, ours: Call, peers: dict[str, Call], *, moved: int = 0, operations: int = 0) -> None:
        """`moved`: bytes read once and written once; `operations` at the rate of the bfloat16 product."""
        case: dict[str, Any] = {"case": name}
        try:
            case["ours"] = microseconds(ours)
            floor = 1e6 * max(moved / self.rates["copy bytes/s"], operations / self.rates["bfloat16 flop/s"])
            case["floor"], case["floor_share"] = floor, floor / case["ours"]["median"]
        except RuntimeError as error:
            case["error"] = str(error)
            torch.cuda.synchronize()
        for peer, call in peers.items():
            try:
                case[peer] = microseconds(call)
                if "ours" in case:
                    case[f"ratio to {peer}"] = case[peer]["median"] / case["ours"]["median"]
            except RuntimeError as error:
                case[peer] = {"error": str(error)}
        self.cases.append(case)
        ratios = "  ".join(f"{k[9:]} {v:.2f}x" for k, v in case.items() if k.startswith("ratio to "))
        time = case.get("error", "")
        if "ours" in case:
            middle, low, high = (case["ours"][key] for key in ("median", "low", "high"))
            time = f"{middle:9.1f} us ({low:.1f}-{high:.1f})  {case['floor_share']:6.1%}"
        print(f"{name:56} {time}  {ratios}", flush=True)


def warp_cases(report: Report) -> None:
    from imgopt_fast import affine_warp

    n, side = 256, 224
    angle = torch.linspace(-0.5, 0.5, n, dtype=torch.float64)
    scale, middle = torch.linspace(0.8, 1.2, n, dtype=torch.float64), (side - 1) / 2
    c, s = angle.cos() / scale, angle.sin() / scale
    rows = [c, s, middle * (1 - c - s), -s, c, middle * (1 + s - c)]
    matrix = torch.stack(rows, 1).view(n, 2, 3).cuda()
    levels = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, device="cuda")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    mean_t, std_t = (torch.tensor(t, device="cuda").view(1, 3, 1, 1) for t in (mean, std))
    theta = torch.stack([c, s, 0 * c, -s, c, 0 * c], 1).view(n, 2, 3).float().cuda()

    def chain(images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        warped = F.grid_sample(images.float() / 255, grid, align_corners=False)
        return ((warped - mean_t) / std_t).to(dtype)

    for layout in (torch.channels_last, torch.contiguous_format):
        images = levels.contiguous(memory_format=layout)
        name = "NHWC" if layout == torch.channels_last else "NCHW"
        for dtype, size in ((torch.bfloat16, 2), (torch.float32, 4)):
            report.add(
                f"warp 256 x 224^2 uint8 {name} -> normalised {str(dtype)[6:]} NCHW",
                lambda images=images, dtype=dtype: affine_warp(
                    images, matrix, mean=mean, std=std, dtype=dtype, memory_format=torch.contiguous_format
                ),
                {"torch chain": lambda images=images, dtype=dtype: chain(images, dtype)},
                moved=levels.numel() * (1 + size),
            )
    images = levels.contiguous(memory_format=torch.channels_last)
    for options in ({"interpolation": "nearest"}, {"interpolation": "bicubic"}, {"padding_mode": "reflect"}, {}):
        label = " ".join(options.values()) or "bilinear"
        call = lambda options=options: affine_warp(images, matrix, **options)  # noqa: E731
        report.add(f"warp 256 x 224^2 uint8 -> uint8 NHWC {label}", call, {}, moved=2 * levels.numel())
    floats = levels[:64].float() / 255
    grad = torch.randn_like(floats)
    for padding_mode in ("constant", "reflect"):
        call = partial(
            torch.ops.imgopt_fast.affine_warp_backward, grad, floats, matrix[:64], "bilinear", padding_mode, [0.0] * 3,
            False, None, [], True, True,
        )  # fmt: skip
        report.add(f"warp backward 64 x 224^2 float32 {padding_mode}", call, {}, moved=12 * floats.numel())


def conv_cases(report: Report) -> None:
    torch.backends.cudnn.benchmark = True
    layers = [
        (64, 56, 64, 3, 1, 1), (128, 28, 128, 3, 1, 1), (256, 14, 256, 3, 1, 1), (512, 7, 512, 3, 1, 1),
        (128, 56, 128, 3, 2, 1), (256, 56, 64, 1, 1, 1), (64, 56, 256, 1, 1, 1), (64, 56, 64, 1, 1, 1),
        (512, 28, 128, 1, 1, 1), (128, 28, 512, 1, 1, 1), (1024, 14, 256, 1, 1, 1), (256, 14, 1024, 1, 1, 1),
        (2048, 7, 512, 1, 1, 1), (512, 7, 2048, 1, 1, 1), (256, 56, 512, 1, 2, 1), (1024, 14, 2048, 1, 2, 1),
        (3, 224, 64, 7, 2, 1), (96, 112, 96, 3, 2, 96), (384, 14, 384, 3, 1, 384), (240, 28, 240, 5, 1, 240),
        (128, 56, 128, 3, 1, 32), (256, 28, 256, 3, 1, 32),
    ]  # fmt: skip
    for layer in layers:
        conv_case(report, *layer)


def conv_case(report: Report, channels: int, side: int, outputs: int, kernel: int, stride: int, groups: int) -> None:
    from imgopt_fast import int8_conv2d, pack_int8_weight

    n, padding = 128, kernel // 2
    x = torch.randint(0, 256, (n, channels, side, side), dtype=torch.uint8, device="cuda")
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randint(-127, 128, (outputs, channels // groups, kernel, kernel), dtype=torch.int8).cuda()
    layer = pack_int8_weight(weight, 0.01, input_scale=0.02, groups=groups)
    floats = x.to(torch.bfloat16)
    kernels = weight.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    out_side = (side + 2 * padding - kernel) // stride + 1
    report.add(
        f"conv {channels}->{outputs} {kernel}x{kernel} /{stride} groups {groups}, {side}^2, N = {n}",
        lambda: int8_conv2d(x, layer, stride=stride, padding=padding, output_scale=1.0, output_min=0.0),
        {"bfloat16 cuDNN": lambda: F.conv2d(floats, kernels, None, stride, padding, 1, groups)},
        moved=x.numel() // (stride**2 if kernel == 1 else 1) + n * out_side**2 * outputs,
        operations=n * out_side**2 * outputs * weight[0].numel(),  # two per product, at twice the rate of bfloat16
    )


def network_cases(report: Report) -> None:
    try:
        from torchvision.models import resnet50
    except ImportError as error:
        print(f"ResNet-50: {error}")
        return
    from torch.fx.experimental.optimization import fuse

    from imgopt_fast.compress import quantize

    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    model = resnet50(weights=None).eval()
    int8 = quantize(model, [torch.randn(8, 3, 224, 224)]).cuda()
    folded = fuse(model).cuda().to(torch.bfloat16, memory_format=torch.channels_last)
    floats = model.cuda().to(torch.bfloat16, memory_format=torch.channels_last)
    for n in (1, 128):
        x = torch.randn(n, 3, 224, 224, device="cuda").contiguous(memory_format=torch.channels_last)
        half = x.to(torch.bfloat16)
        peers = {"bfloat16": lambda half=half: floats(half), "bfloat16 folded": lambda half=half: folded(half)}
        report.add(f"ResNet-50, N = {n}", lambda x=x: int8(x), peers)


def masked_cases(report: Report) -> None:
    """Every form that can serve a mask, and 2:4; ops/masked_matmul/cuda.py chooses between them by these figures."""
    from imgopt_fast.ops.masked_matmul import cuda

    chosen = dict(cuda.LARGEST_DENSITY)
    side = 4096
    for form, block, dtype in (("packed 16", 16, torch.bfloat16), ("packed 32", 32, torch.bfloat16),
                               ("blocks", 16, torch.bfloat16), ("quads", 1, torch.float32)):  # fmt: skip
        cuda.LARGEST_DENSITY = {(form, dtype): 1.0}
        for sparsity in (0.5, 0.8, 0.9, 0.95, 0.99):
            tiles = torch.rand(side // block, side // block, device="cuda") >= sparsity
            mask = tiles.repeat_interleave(block, 0).repeat_interleave(block, 1)
            masked_case(report, f"blocks of {block}, {sparsity:.0%} sparse: {form}", mask, dtype)
    cuda.LARGEST_DENSITY = {}
    mask = torch.tensor([True, False, False, True], device="cuda").repeat(side, side // 4)
    masked_case(report, "2:4", mask, torch.bfloat16)
    cuda.LARGEST_DENSITY = chosen


def masked_case(report: Report, name: str, mask: torch.Tensor, dtype: torch.dtype) -> None:
    from imgopt_fast import masked_matmul, pack_masked_weight

    side = len(mask)
    x, weight = (torch.randn(side, side, device="cuda", dtype=dtype) for _ in range(2))
    packed, dense, kept = pack_masked_weight(weight, mask), torch.where(mask, weight, 0), int(mask.sum())
    report.add(
        f"masked {side}^3 {str(dtype)[6:]}, {name}",
        lambda: masked_matmul(x, packed),
        {"dense": lambda: F.linear(x, dense)},
        moved=2 * x.numel() * x.element_size() + kept * x.element_size(),
        operations=2 * side * kept,
    )


# --- all of it ------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the build, the logs and results.json")
    parser.add_argument("--skip", action="append", default=[], choices=("build", "test", "time"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "no CUDA device: nothing here can be measured\n")
    arguments.out.mkdir(parents=True, exist_ok=True)
    if "build" not in arguments.skip:
        build(arguments.out)
    if "test" not in arguments.skip:
        test(arguments.out)
    if "time" in arguments.skip:
        return
    sys.path.insert(0, str(arguments.out / "site"))
    rates = ceilings()
    print({name: f"{rate:.3g}" for name, rate in rates.items()}, flush=True)
    report = Report(rates)
    with torch.no_grad():
        for cases in (warp_cases, conv_cases, network_cases, masked_cases):
            cases(report)
    facts = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "python": platform.python_version(), "command": sys.argv, "ceilings": rates, "cases": report.cases,
    }  # fmt: skip
    (arguments.out / "results.json").write_text(json.dumps(facts, indent=1, default=str))


if __name__ == "__main__":
    main()
