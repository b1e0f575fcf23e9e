"""`imgopt-fast train`: train, prune, quantize and test a classifier."""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from imgopt_fast.training.config import TrainConfig

if TYPE_CHECKING:
    from imgopt_fast.training import Report

EXAMPLES = """examples:
  imgopt-fast train                                 the embedded Fashion-MNIST subset, a minute or two
  imgopt-fast train ./flowers --img-size 96         a folder with one folder of images per class
  imgopt-fast train --model resnet20 --epochs 30 --sparsity 0.9
  imgopt-fast train --config runs/first/config.yaml --experiment second --seed 1
  imgopt-fast train --resume runs/first             after Ctrl-C, or anything worse
  imgopt-fast train ./flowers --distill runs/large --sparsity 0.9 --quantize int8
  imgopt-fast train ./birds --pretrained runs/flowers --transfer features      a new last layer, in seconds
  imgopt-fast train ./flowers --model nets.py:small          your own: def small(num_classes, in_channels)
  torchrun --nproc-per-node 2 -m imgopt_fast train ./flowers                   two processes, one network
"""

# Where `--help` begins a new paragraph: the first field of each, in TrainConfig's order.
GROUPS = {
    "data": "data",
    "model": "network",
    "epochs": "learning",
    "crop_scale": "augmentation",
    "sparsity": "pruning and distillation",
    "quantize": "quantization",
    "seed": "arithmetic and machine",
    "output": "run folder",
}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "train",
        usage="imgopt-fast train [OPTION ...] [DATA]",  # an error is not to be looked for behind sixty options
        help="train, prune, quantize and test a classifier",
        description="Train a classifier, prune it, quantize it to int8, test each of them, and write a run folder.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # a flag that is not given leaves the value of --config alone
    )
    parser.add_argument("folder", nargs="?", metavar="DATA", help="the same as --data")
    parser.add_argument("--config", type=Path, help="config.yaml of a run to repeat; the other flags override it")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="run folder of a stopped training to continue")
    add_options(parser)


def run(arguments: argparse.Namespace) -> int:
    values = {name: value for name, value in vars(arguments).items() if name != "verb"}
    from imgopt_fast.training import resume, train

    if "resume" in values:
        path = _only(values, "resume")
        return launch("train", lambda: resume(path))
    config = _config(values)
    return launch("train", lambda: train(config))


def add_options(parser: argparse.ArgumentParser) -> None:
    """A flag for every field of TrainConfig."""
    types = get_type_hints(TrainConfig)
    group: argparse._ActionsContainer = parser
    for field in dataclasses.fields(TrainConfig):
        if field.name in GROUPS:
            group = parser.add_argument_group(GROUPS[field.name])
        _add_flag(group, field, types[field.name])
        if field.name == "torchcompile":
            group.add_argument(
                "--compile", dest="torchcompile", action="store_const", const="inductor", default=argparse.SUPPRESS,
                help="the same as --torchcompile inductor",
            )  # fmt: skip


def add_following_parser(
    subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]",
    verb: str,
    *,
    help: str,
    about: str,
    examples: str,
) -> None:
    """The parser of a verb that goes on from a finished run, with all options of a training."""
    parser = subparsers.add_parser(
        verb,
        usage=f"imgopt-fast {verb} RUN [OPTION ...] [DATA]",
        help=help,
        description=f"{about} Every option that is not given is that of the run.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("folder", nargs="?", metavar="DATA", help="the same as --data")
    parser.add_argument("--config", type=Path, help="config.yaml to take the options from instead of the run's")
    add_options(parser)


def follow(arguments: argparse.Namespace, **changes: Any) -> int:
    """Train with the configuration of the run, `changes`, and the flags that were given, in a new folder beside it."""
    values, path = dict(vars(arguments)), arguments.run_folder
    verb = values.pop("verb")
    values.pop("run_folder")
    values.setdefault("config", path / "config.yaml")
    beside = {"output": str(path.parent), "experiment": f"{path.resolve().name}-{verb}"}
    config = _config(beside | changes | values)
    from imgopt_fast.training import train

    return launch(verb, lambda: train(config))


def launch(verb: str, training: "Callable[[], Report]") -> int:
    """Run a training and print its table; what stops it is one line."""
    from imgopt_fast.training import DivergedError, InterruptedTrainingError

    try:
        report = training()
    except DivergedError as error:
        print(f"imgopt-fast {verb}: {error}", file=sys.stderr)
        return 1
    except InterruptedTrainingError as stopped:
        print(f"imgopt-fast {verb}: stopped; continue with --resume {stopped}", file=sys.stderr)
        return 130
    if report.stages:  # of several processes the first one has them
        print(report.table())
    return 0


def _config(values: dict[str, Any]) -> TrainConfig:
    """The configuration of --config, or the default one, with the flags that were given."""
    if "folder" in values:
        values["data"] = values.pop("folder")
    config = TrainConfig.load(values.pop("config")) if "config" in values else TrainConfig()
    return dataclasses.replace(config, **values)


def _only(values: dict[str, Any], name: str) -> Any:
    others = [other for other in values if other != name]
    if others:
        raise ValueError(f"--{name} repeats the run's own config.yaml and goes with no other flag, got {others[0]}")
    return values[name]


def _add_flag(parser: argparse._ActionsContainer, field: "dataclasses.Field[Any]", kind: Any) -> None:
    flags = field.metadata["flags"] or (f"--{field.name.replace('_', '-')}",)
    if isinstance(kind, UnionType):
        kind = get_args(kind)[0]
    default = "" if field.default in (None, "") else f" (default: {_text(field.default)})"
    options: dict[str, Any] = {"dest": field.name, "help": field.metadata["help"] + default}
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif get_origin(kind) is tuple:
        options |= {"type": get_args(kind)[0], "nargs": 2, "metavar": ("LOW", "HIGH"), "action": _StoreTuple}
    else:
        options["type"] = kind
        if field.metadata["choices"]:
            options["choices"] = field.metadata["choices"]
        else:
            options["metavar"] = {int: "N", float: "X", str: "TEXT"}[kind]
    parser.add_argument(*flags, **options)


class _StoreTuple(argparse.Action):
    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, tuple(values))


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
