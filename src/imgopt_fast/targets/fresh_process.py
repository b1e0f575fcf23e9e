"""Engines in processes of their own: where one crashes, the export fails with its name, and the caller lives on.

Arrays go through pipes as .npz. Run by its path, this file serves an ONNX model through OpenVINO, which has crashed on
a model of three nodes (2026.4); it then imports numpy and openvino only, and starts in half the time of torch.
"""

import io
import signal
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import numpy as np

Arrays = list[np.ndarray[Any, Any]]
LEAST_SECONDS = 0.2  # per latency: a few hundred calls of a small network


class FreshProcess:
    """A process that answers arrays with arrays, as `serve` does; `name` is for the message when it dies."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        weakref.finalize(self, _stop, self._process)

    def __call__(self, *arrays: Any) -> Arrays:
        """The answer. Raises ValueError where the process has died; what it said is on stderr."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            _send(self._process.stdin, arrays)
            return _receive(self._process.stdout)
        except (EOFError, BrokenPipeError):
            code = self._process.wait()
            end = f"crashed ({signal.Signals(-code).name})" if code < 0 else "stopped, for the reason above,"
            raise ValueError(
                f"{self.name}: {end} while it ran the exported network; --no-verify (verify=False) leaves it out"
            ) from None


def serve(run: Callable[[Arrays], Arrays]) -> None:
    """Answer what comes in on stdin by what `run` gives, until nothing comes any more."""
    given, taken = sys.stdin.buffer, sys.stdout.buffer
    while True:
        try:
            arrays = _receive(given)
        except EOFError:
            return
        _send(taken, run(arrays))


def median_seconds(call: Callable[[], object]) -> float:
    """Median time of a call, warm."""
    for _ in range(2):
        call()
    seconds: list[float] = []
    while len(seconds) < 5 or sum(seconds) < LEAST_SECONDS:
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def openvino(path: Path, shown: Sequence[str], threads: int) -> FreshProcess:
    """OpenVINO on the ONNX file `path`: (images, 0) to its outputs, (images, 1) to the tensors `shown`, (image, 2) to
    the seconds that it takes."""
    script = [sys.executable, "-P", __file__, str(path), str(threads), *shown]
    return FreshProcess("openvino", script)


def _openvino(path: str, threads: str, *shown: str) -> Callable[[Arrays], Arrays]:
    ov: Any = import_module("openvino")

    # bfloat16 would be its default where the processor has it.
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": int(threads),
    }
    core = ov.Core()
    plain = core.compile_model(core.read_model(path), "CPU", settings)

    def inspected(images: np.ndarray[Any, Any]) -> Arrays:
        model = core.read_model(path)
        model.add_outputs(list(shown))
        results = core.compile_model(model, "CPU", settings)(images)
        return [np.array(results[name]) for name in shown]

    def run(given: Arrays) -> Arrays:
        images, wish = given
        if wish == 2:
            return [np.array(median_seconds(lambda: plain(images)))]
        return inspected(images) if wish == 1 else [np.array(result) for result in plain(images).values()]

    return run


def _stop(process: "subprocess.Popen[bytes]") -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):  # of what it did not live to read
                pipe.close()
    process.wait()


def _send(pipe: IO[bytes], arrays: Sequence[Any]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, *arrays)
    pipe.write(len(buffer.getvalue()).to_bytes(8, "little") + buffer.getvalue())
    pipe.flush()


def _receive(pipe: IO[bytes]) -> Arrays:
    size = pipe.read(8)
    if len(size) < 8:
        raise EOFError
    return list(np.load(io.BytesIO(pipe.read(int.from_bytes(size, "little")))).values())


if __name__ == "__main__":
    serve(_openvino(*sys.argv[1:]))
