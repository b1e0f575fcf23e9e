"""`imgopt-fast doctor`: what this installation consists of, what it lacks, what that costs and how to get it.

Every operation is also run once on a tiny input and compared with its plain-torch reference, so that "everything is
fine" is more than a list of files.
"""

import argparse
import platform
from collections.abc import Callable, Iterator
from importlib import import_module

# What each optional package is for; none is needed to train, prune or quantize.
OPTIONAL = {
    "torchvision": "pretrained models and its transforms; nothing of ours needs it",
    "onnx": "export to ONNX",
    "onnxruntime": "checks of exported models; a peer in `imgopt-fast bench`",
    "openvino": "a peer in `imgopt-fast bench`",
    "cv2": "a peer in `imgopt-fast bench`",
    "kornia": "a peer in `imgopt-fast bench`",
    "albumentations": "a peer in `imgopt-fast bench`",
    "scipy": "a peer in `imgopt-fast bench`",
}
DISTRIBUTION = {"cv2": "opencv-python-headless"}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the verb."""
    subparsers.add_parser(
        "doctor",
        help="say what is installed, which kernels run here, and what is missing",
        description="Prints versions, processor features, the kernels in use per operation and what each missing "
        "piece costs. The exit code is 1 when something is broken; a missing optional piece is not.",
        epilog="examples:\n  imgopt-fast doctor",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run(args: argparse.Namespace) -> int:
    """0 unless something is broken."""
    import torch

    from imgopt_fast import __version__, _native
    from imgopt_fast.benchmarks import machine

    problems: list[str] = []
    print(f"imgopt_fast {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    print(f"torch       {torch.__version__}, {cuda_state()}")
    print(f"numpy       {machine.version_of('numpy')}, numba {machine.version_of('numba') or 'missing'}")
    print(f"processor   {machine.cpu_name()}, {machine.core_count()} cores: {' '.join(machine.cpu_features())}")
    try:
        print(f"backend     {_native.backend()}; {kernels_state()}")
        print(f"int8        {int8_state()}")
        print("operations")
        for name, check in operations().items():
            print(f"  {name:<14} {served_by(name, check, problems)}")
    except (ImportError, ValueError, OSError) as error:
        problems.append(str(error))
        print(f"backend     BROKEN: {error}")
    print("optional")
    for name, purpose in OPTIONAL.items():
        print(f"  {name:<14} {optional_state(name, purpose)}")
    for advice in missing():
        print(f"missing     {advice}")
    for problem in problems:
        print(f"BROKEN      {problem}")
    print("everything works" if not problems else "something is broken: see above")
    return 1 if problems else 0


def cuda_state() -> str:
    import torch

    if torch.version.cuda is None:
        return "built without CUDA"
    if not torch.cuda.is_available():
        return f"built for CUDA {torch.version.cuda}, no device"
    return f"CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}"


def kernels_state() -> str:
    from imgopt_fast import _native

    if _native.core() is None:
        return "no compiled kernels"
    have = _native.supported_isas()
    return f"instruction set {_native.active_isa()} (here: {', '.join(have)}; IMGOPT_ISA chooses)"


def int8_state() -> str:
    """What int8 can gain on this processor, measured: few people know beforehand, and no peer tells."""
    from imgopt_fast.benchmarks import machine

    rates = machine.measure()
    if rates is None:
        return "not faster than float32: there are no compiled kernels"
    gain = rates.int8_dot / rates.fma
    text = f"{rates.int8_dot / 1e9:.0f} GOP/s against {rates.fma / 1e9:.0f} GFLOP/s of float32 on one core: "
    if gain < 1.2:
        return text + "int8 makes models smaller here, not faster"
    return text + f"expect up to {gain:.1f}x on layers that compute, and up to 4x on those that wait for memory"


def operations() -> dict[str, Callable[[], bool]]:
    """A tiny call of each operation whose result is known."""
    import torch

    def affine_warp() -> bool:
        from imgopt_fast import affine_warp

        images = torch.arange(48, dtype=torch.uint8).reshape(1, 3, 4, 4)
        mirror = torch.tensor([[[-1.0, 0.0, 3.0], [0.0, 1.0, 0.0]]])
        warped: torch.Tensor = affine_warp(images, mirror)
        return torch.equal(warped, images.flip(3))

    def int8_conv2d() -> bool:
        from imgopt_fast import int8_conv2d

        image = torch.full((1, 4, 3, 3), 255, dtype=torch.uint8)
        weight = torch.full((1, 4, 3, 3), -127, dtype=torch.int8)
        sums = int8_conv2d(image, weight, input_scale=1.0, weight_scale=1.0)
        return float(sums) == -255 * 127 * 36

    def masked_matmul() -> bool:
        from imgopt_fast import masked_matmul

        x, weight = torch.arange(8.0).reshape(2, 4), torch.ones(3, 4)
        mask = torch.tensor([[True, False, False, True], [False] * 4, [True] * 4])
        return torch.equal(masked_matmul(x, weight, mask), torch.tensor([[3.0, 0.0, 6.0], [11.0, 0.0, 22.0]]))

    return {"affine_warp": affine_warp, "int8_conv2d": int8_conv2d, "masked_matmul": masked_matmul}


def served_by(name: str, check: Callable[[], bool], problems: list[str]) -> str:
    """Runs one operation and says which kernel the dispatcher has for it."""
    import torch

    try:
        right = check()
    except Exception as error:  # whatever it is, the reader has to see it
        problems.append(f"{name}: {type(error).__name__}: {error}")
        return f"BROKEN: {error}"
    if not right:
        problems.append(f"{name}: a wrong result")
        return "BROKEN: a wrong result"
    from imgopt_fast import _native
    from imgopt_fast.ops import registration

    state = []
    for key in ("CPU", "CUDA"):
        if key == "CUDA" and not torch.cuda.is_available():
            continue
        own = registration.has_kernel(name, key)
        if key == "CPU" and own:
            kernel = f"native, {_native.active_isa()}" if _native.backend() == "native" else "Numba"
        else:
            kernel = "native" if own else "plain torch"
        state.append(f"{key}: {kernel}")
    return "; ".join(state)


def optional_state(name: str, purpose: str) -> str:
    from imgopt_fast.benchmarks import machine

    distribution = DISTRIBUTION.get(name, name)
    version = machine.version_of(distribution)
    if version is None:
        return f"missing ({purpose}); pip install {distribution}{matching_index(name)}"
    try:
        import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        again = f"pip install --force-reinstall {distribution}{matching_index(name)}"
        return f"{version}, cannot be imported: {reason}; {again}"
    return version


def matching_index(name: str) -> str:
    """Where to get a torchvision that fits this torch: PyPI's does not load beside a CPU build."""
    import torch

    tag = torch.__version__.partition("+")[2]
    return f" (the build for +{tag}, from the index that torch came from)" if name == "torchvision" and tag else ""


def missing() -> Iterator[str]:
    """Pieces that would make this machine faster, what their absence costs, and how to get them."""
    import torch

    from imgopt_fast import _native

    if _native.core() is None:
        yield (
            "compiled kernels: Numba serves the operations, several times slower. Install a C++20 compiler, then "
            "reinstall with IMGOPT_REQUIRE_NATIVE=1, which shows why a build fails"
        )
        return
    isas = _native.supported_isas()
    if platform.machine() in ("x86_64", "AMD64") and not {"avxvnni", "avx512"} & set(isas):
        yield "VNNI: this processor multiplies int8 at half to a quarter of the rate of newer ones; nothing to install"
    if _native.active_isa() != isas[-1]:
        yield f"{isas[-1]}: IMGOPT_ISA={_native.active_isa()} holds the kernels below what the processor has; unset it"
    if torch.cuda.is_available() and _native.find_library("_torch_ops_cuda.so") is None:
        yield (
            "CUDA kernels: plain torch serves the operations on the GPU. Install a CUDA compiler (nvcc) of torch's "
            "version and reinstall with -C cmake.define.IMGOPT_CUDA=ON"
        )
