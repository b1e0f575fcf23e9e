"""`imgopt-fast eval`: the accuracy of a trained network on a class folder, or on the test images of its own data."""

import argparse
import sys
from pathlib import Path

IMAGES = 32  # that the layers are measured on
EXAMPLES = """examples:
  imgopt-fast eval runs/first                  the test images of the data it was trained on
  imgopt-fast eval runs/first ./new-photos     every image of a class folder
  imgopt-fast eval runs/first --layers         what each layer runs in, its time, and what int8 costs there
  imgopt-fast eval runs/first --stage pruned --layers    of the network before int8: density, kernel, break-even
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "eval",
        help="test a trained network",
        description="Print the accuracy of a trained network, and of each class.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("data", type=Path, nargs="?", metavar="DATA", help="class folder, all of whose images are used")
    parser.add_argument("--stage", metavar="NAME", help="network of an earlier stage: dense, pruned or distilled")
    parser.add_argument("--layers", action="store_true", help="a line for each layer; measured, some seconds")


def run(arguments: argparse.Namespace) -> int:
    from imgopt_fast.data import load_labelled
    from imgopt_fast.training import load_network
    from imgopt_fast.training.evaluate import predictions
    from imgopt_fast.training.layers import layer_table
    from imgopt_fast.training.network import last_float, test_images

    network = load_network(arguments.run_folder, arguments.stage)
    card = network.card
    if arguments.data is not None:
        images, skipped = load_labelled(arguments.data, card.class_names, (card.height, card.width), card.channels)
        for name, reason in skipped:
            print(f"left out {name}: {reason}", file=sys.stderr)
    else:
        images = test_images(arguments.run_folder)
    right = predictions(network.module, images, card.prepare()) == images.labels
    print(f"{int(right.sum()) / len(images):.2%} of {len(images):,} images")
    width = max(map(len, card.class_names))
    for label, name in enumerate(card.class_names):
        of_class = right[images.labels == label]
        share = f"{int(of_class.sum()) / len(of_class):7.2%} of {len(of_class):,}" if len(of_class) else "no images"
        print(f"  {name:{width}}  {share}")
    if arguments.layers:
        floating = last_float(arguments.run_folder) if card.stage == "int8" else None
        before = None if floating is None else floating.module
        sample = card.prepare()(images.sample(IMAGES).images)
        print()
        print(layer_table(network.module, sample, before, power_of_two=card.power_of_two))
    return 0
