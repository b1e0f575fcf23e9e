"""`imgopt-fast export`: a trained network out of PyTorch, checked where it goes."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imgopt_fast.data import Split
    from imgopt_fast.targets import ExportReport
    from imgopt_fast.training.network import Network

# Where a format is written in the run folder.
PLACES = {
    "onnx": "model.onnx",
    "c": "model_c",
    "qonnx": "model_qonnx.onnx",
    "stablehlo": "model_stablehlo",
    "pt2": "model.pt2",
}
POWER_OF_TWO = ("c", "qonnx")
REPORT = "export.md"

FORMATS = """formats, what each needs, and the engine that checks it:
  onnx       QDQ, or integer operators with --qlinear          'imgopt-fast[onnx]': onnx; onnxruntime, openvino check
  c          C99 folder, integers and shifts only              nothing; a C compiler checks ($CC, cc or gcc)
  qonnx      QONNX, which hls4ml reads                          'imgopt-fast[fpga]': onnx, qonnx; qonnx checks
  stablehlo  StableHLO for tpu, cuda and cpu, by jax.export    'imgopt-fast[jax]': jax; XLA on the CPU checks
  pt2        torch.export with our operations, and AOTInductor  nothing; a fresh process checks (AOTI: a C++ compiler)

c and qonnx take power-of-two scales: a run with --quantize pow2 is exported as it is; of another the float network is
quantized again with them, on the run's calibration images. --no-verify needs no checking engine.

examples:
  imgopt-fast export runs/first --format onnx
  imgopt-fast export runs/first --format onnx c stablehlo pt2      one table, also in runs/first/export.md
  imgopt-fast export runs/first --format c --output firmware/net --no-verify
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "export",
        help="write a trained network for ONNX, C, FPGA, XLA or torch.export, and check it there",
        description="Write a trained network in other formats, run each there, and compare.",
        epilog=FORMATS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument(
        "--format", nargs="+", choices=list(PLACES), required=True, metavar="FORMAT", help="one or more; see below"
    )
    parser.add_argument(
        "--output", type=Path, metavar="PATH", help="file or folder to write, of one format (default: in RUN)"
    )
    parser.add_argument("--verify", action=argparse.BooleanOptionalAction, default=True, help="run what was written")
    parser.add_argument("--aoti", action="store_true", help="pt2: compile with AOTInductor, for this machine")
    parser.add_argument("--qlinear", action="store_true", help="onnx: QLinearConv and other integer operators")


def run(arguments: argparse.Namespace) -> int:
    from imgopt_fast.data import DataError
    from imgopt_fast.targets import ExportReport
    from imgopt_fast.targets.verification import table
    from imgopt_fast.training import load_network
    from imgopt_fast.training.network import test_images
    from imgopt_fast.training.run_folder import RunFolder

    folder, formats = arguments.run_folder, list(dict.fromkeys(arguments.format))
    if arguments.output is not None and len(formats) > 1:
        raise ValueError("output: goes with one format; several are written into the run folder")
    for flag, format in (("qlinear", "onnx"), ("aoti", "pt2")):
        if getattr(arguments, flag) and format not in formats:
            raise ValueError(f"{flag}: goes with --format {format}")
    network = load_network(folder)
    images, notes = None, []
    if arguments.verify:
        try:
            images = test_images(folder)
        except DataError as error:
            notes.append(f"checked on random images, without accuracy: {error}")
    reports: list[ExportReport] = []
    for name in formats:
        place = arguments.output or folder / PLACES[name]
        reports.append(_export(network, name, place, images, folder, arguments))
        for note in reports[-1].notes:
            print(f"{name}: {note}")
        print(f"{name}: written to {place}")
    for note in notes:
        print(note)
    print(table(reports))
    RunFolder(folder).write(REPORT, lambda path: path.write_text(_markdown(reports, notes)))
    return 0


def _export(
    network: "Network", format: Any, place: Path, images: "Split | None", folder: Path, arguments: argparse.Namespace
) -> "ExportReport":
    from imgopt_fast.compress import Int8Config
    from imgopt_fast.targets import export
    from imgopt_fast.training.network import requantize

    card, options = network.card, dict[str, Any]()
    if format in POWER_OF_TWO and not (card.stage == "int8" and card.power_of_two):
        network = requantize(folder, Int8Config(power_of_two=True))
    if format == "c":
        options = {"mean": card.mean, "std": card.std}
    elif format == "onnx" and arguments.qlinear:
        options = {"form": "qlinear"}
    elif format == "pt2" and arguments.aoti:
        options = {"aoti": True}
    prepared = labels = None
    if images is not None:
        prepared, labels = card.prepare()(images.images), images.labels
    try:
        report: ExportReport = export(
            network.module, format, place, images=prepared, labels=labels, verify=arguments.verify, **options
        )
    except ImportError as error:
        raise ValueError(str(error)) from error
    return report


def _markdown(reports: "list[ExportReport]", notes: list[str]) -> str:
    from imgopt_fast.targets.verification import table

    lines = ["# Exports", "", "```", table(reports), "```", ""]
    lines += [
        "- *outputs*: how far the engine's are from the network's own. *same class*: share of the images. *accuracy*: "
        "on the test images.",
        "- *latency*: median at batch 1; the line *imgopt_fast* is the exported network in PyTorch, on our kernels.",
    ]
    for report in reports:
        lines += [f"- {report.format}, {check.engine}: {check.tensors}" for check in report.checks if check.tensors]
        lines += [f"- {report.format}: {note}" for note in report.notes]
    lines += [f"- {note}" for note in notes]
    details = [f"\n## {report.format}\n\n{report.details}" for report in reports if report.details]
    return "\n".join([*lines, *details]) + "\n"
