"""`imgopt-fast prune`: remove weights of a trained network."""

import argparse

from imgopt_fast.cli.train import add_following_parser, follow

EXAMPLES = """examples:
  imgopt-fast prune runs/first --sparsity 0.9
  imgopt-fast prune runs/first --sparsity 0.95 --prune-epochs 10 --distill runs/large
  imgopt-fast prune runs/first --experiment small --quantize int8
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    about = "Prune the network of a finished run, gradually, while it learns from itself as it was."
    add_following_parser(
        subparsers, "prune", help="remove weights of a trained network", about=about, examples=EXAMPLES
    )


def run(arguments: argparse.Namespace) -> int:
    return follow(arguments, pretrained=str(arguments.run_folder), epochs=0, quantize="none")
