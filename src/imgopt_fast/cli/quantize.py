"""`imgopt-fast quantize`: make a trained network int8."""

import argparse

from imgopt_fast.cli.train import add_following_parser, follow

EXAMPLES = """examples:
  imgopt-fast quantize runs/first
  imgopt-fast quantize runs/first --qat-epochs 0                  by calibration alone, in seconds
  imgopt-fast quantize runs/first --qat-epochs 4 --distill runs/large
  imgopt-fast quantize runs/first --quantize pow2                 power-of-two scales, for export to C and FPGAs
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    about = "Quantize the network of a finished run to int8, after epochs of training that simulate it."
    add_following_parser(subparsers, "quantize", help="make a trained network int8", about=about, examples=EXAMPLES)


def run(arguments: argparse.Namespace) -> int:
    return follow(
        arguments, pretrained=str(arguments.run_folder), epochs=0, prune_epochs=0, distill_epochs=0, quantize="int8"
    )
