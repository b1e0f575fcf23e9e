"""`imgopt-fast distill`: teach a smaller network."""

import argparse

from imgopt_fast.cli.train import add_following_parser, follow

EXAMPLES = """examples:
  imgopt-fast distill runs/large --model resnet8
  imgopt-fast distill runs/large --model resnet8 --kd-hint-weight 1 --kd-temperature 2
  imgopt-fast distill runs/large --pretrained runs/pruned --epochs 0 --distill-epochs 5    a pruned student
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    about = "Train a network that learns from the one of a finished run, its teacher, as well as from the labels."
    add_following_parser(subparsers, "distill", help="teach a smaller network", about=about, examples=EXAMPLES)


def run(arguments: argparse.Namespace) -> int:
    return follow(arguments, distill=str(arguments.run_folder), prune_epochs=0, quantize="none")
