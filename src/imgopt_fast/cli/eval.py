"""`imgopt-fast eval`: the accuracy of a trained network on a class folder, or on the test images of its own data."""

import argparse
import sys
from pathlib import Path

EXAMPLES = """examples:
  imgopt-fast eval runs/first                  the test images of the data it was trained on
  imgopt-fast eval runs/first ./new-photos     every image of a class folder
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


def run(arguments: argparse.Namespace) -> int:
    from imgopt_fast.data import load_labelled
    from imgopt_fast.training import load_network
    from imgopt_fast.training.evaluate import predictions
    from imgopt_fast.training.network import test_images

    network = load_network(arguments.run_folder)
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
    return 0
