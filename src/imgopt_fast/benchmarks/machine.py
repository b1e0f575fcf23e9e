"""The machine that a benchmark runs on: what it is, what one core of it can do, and which cores are used.

The rates are measured in the same run as the benchmark (0.15 s), because virtual machines and laptops differ from
their data sheets and from themselves an hour ago.
"""

import os
import platform
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module, metadata
from pathlib import Path

import torch

from imgopt_fast import __version__, _native

# Where the system does not tell: small enough for any processor that has the vector units of this library.
DEFAULT_CACHES = {2: 512 << 10, 3: 8 << 20}

PRODUCT_ROUNDS = 1 << 18  # half a millisecond of vpdpbusd

PEERS = {  # import name: distribution
    "cv2": "opencv-python-headless",
    "kornia": "kornia",
    "albumentations": "albumentations",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "scipy": "scipy",
}


# A missing package, a library that its wheel does not find, an operator that does not register: a peer may fail to
# load in all three ways.
PEER_FAILURES = (ImportError, OSError, RuntimeError)


@dataclass(frozen=True)
class Rates:
    """What one core does under one instruction set: operations (a multiply-add is two) or bytes per second."""

    fma: float
    int8_dot: float
    read_l2: float
    copy_l2: float
    read_l3: float
    copy_l3: float
    read_dram: float
    copy_dram: float

    def memory(self, footprint: float) -> tuple[float, float]:
        """Read and copy rates of the smallest level that holds `footprint` bytes from one call to the next."""
        if footprint <= cache_bytes(2):
            return self.read_l2, self.copy_l2
        if footprint <= cache_bytes(3):
            return self.read_l3, self.copy_l3
        return self.read_dram, self.copy_dram


@cache
def measure(isa: str | None = None) -> Rates | None:
    """The rates under `isa` (default: the active one), measured once per process; None without compiled kernels."""
    core = _native.core()
    if core is None:
        return None
    before = core.active_isa()
    core.set_isa(isa or before)
    try:
        return Rates(**core.measure_rates(l2_bytes=cache_bytes(2), l3_bytes=cache_bytes(3)))
    finally:
        core.set_isa(before)


def int8_loop() -> tuple[Callable[[], int], float] | None:
    """The loop behind `Rates.int8_dot` and the operations of a call; None without compiled kernels.

    A case whose share of this rate is its goal takes turns with it. The clock wanders by some 3 % within a second, the
    rate is the best of eight runs, and medians of loops at the same rate came to 95 to 97 % of it.
    """
    core = _native.core()
    if core is None:
        return None
    return lambda: core.int8_products(PRODUCT_ROUNDS), 2.0 * core.int8_products(PRODUCT_ROUNDS)


@cache
def cache_bytes(level: int) -> int:
    """Size of the cache of this level that core 0 uses (Linux tells it), or a small common one."""
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            if (index / "level").read_text().strip() == str(level):
                return int((index / "size").read_text().strip().removesuffix("K")) << 10
        except (OSError, ValueError):
            continue
    return DEFAULT_CACHES[level]


def cpu_name() -> str:
    """The processor as it names itself."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Those features that decide which kernels run and how fast, of what the processor and the system offer."""
    x86 = ["avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vbmi", "avx512_vnni", "avx512_bf16"]
    wanted = [*x86, "amx_int8", "asimd", "asimddp", "i8mm", "sve"]
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    have = {word for line in text.splitlines() if line.startswith(("flags", "Features")) for word in line.split()}
    return [name for name in wanted if name in have]


def available_cores() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def core_count() -> int:
    """How many cores the process had before use_threads() narrowed them."""
    return len(_cores or available_cores())


def pin(cores: list[int]) -> None:
    """Let the process use these cores only: this thread, those of the peers' pools, and all that they start."""
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), cores)


def seconds_without_core() -> float:
    """For how long the threads of this process have been ready to run without a core to run on (Linux tells it)."""
    waited = 0
    with suppress(OSError, ValueError, IndexError):
        for thread in Path("/proc/self/task").iterdir():
            waited += int((thread / "schedstat").read_text().split()[1])
    return waited * 1e-9


def use_threads(threads: int) -> None:
    """Give torch, the kernels and OpenCV `threads` threads each, and the process as many cores.

    Peers that take the number when they are built (onnxruntime, OpenVINO) read torch.get_num_threads().
    """
    global _cores
    if _cores is None:
        _cores = available_cores()
        # The threads of OpenVINO (TBB) keep to the cores that they find when they are first needed: asked after the
        # process was narrowed to one core, it computed on one for ever, whatever number of threads it was given.
        with suppress(*PEER_FAILURES):
            import_module("openvino").Core().get_property("CPU", "FULL_DEVICE_NAME")
    if hasattr(os, "sched_setaffinity"):
        pin(_cores[-threads:] if threads <= len(_cores) else _cores)
    torch.set_num_threads(threads)
    with suppress(*PEER_FAILURES):
        import_module("cv2").setNumThreads(threads)


_cores: list[int] | None = None  # what the process had before use_threads() narrowed it


def version_of(package: str) -> str | None:
    """Version of an installed distribution, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe() -> dict[str, object]:
    """Everything that a reader needs to place a figure."""
    rates = measure()
    return {
        "cpu": cpu_name(),
        "cores": core_count(),
        "features": cpu_features(),
        "l2_bytes": cache_bytes(2),
        "l3_bytes": cache_bytes(3),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "backend": _native.backend(),
        "isa": _native.active_isa(),
        "threads": torch.get_num_threads(),
        "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
        "versions": {
            "imgopt_fast": __version__,
            "torch": torch.__version__,
            "numpy": version_of("numpy"),
            **{name: version_of(distribution) for name, distribution in PEERS.items()},
        },
        "peer_isa": peer_isa(),
        "rates": None if rates is None else asdict(rates),
    }


def peer_isa() -> dict[str, str]:
    """The instruction set that each peer says it uses, where it can be asked: a generic wheel may run less."""
    found = {"torch": torch.backends.cpu.get_cpu_capability()}
    with suppress(*PEER_FAILURES, IndexError):
        # The baseline unmarked, dispatched levels with a star, as far as this processor has them.
        found["cv2"] = import_module("cv2").getCPUFeaturesLine().split()[-1].lstrip("*")
    with suppress(*PEER_FAILURES):
        capabilities = import_module("openvino").Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        found["openvino"] = " ".join(sorted(capabilities))
    return found
