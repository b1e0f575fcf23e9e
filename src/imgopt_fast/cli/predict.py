"""`imgopt-fast predict`: what a trained network sees in images."""

import argparse
import json
from pathlib import Path

EXAMPLES = """examples:
  imgopt-fast predict runs/first photo.jpg
  imgopt-fast predict runs/first *.png --json --top 1
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "predict",
        help="classify images with a trained network",
        description="Print the most probable classes of each image. What cannot be read is left out: exit code 2.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="classes per image (default: 5)")
    parser.add_argument("--json", action="store_true", help="one JSON object per line, for other programs")


def run(arguments: argparse.Namespace) -> int:
    import torch

    from imgopt_fast.cli import EXIT_OK, EXIT_USAGE, complain
    from imgopt_fast.data import decode
    from imgopt_fast.training import load_network

    if arguments.top < 1:
        raise ValueError(f"top: expected at least 1, got {arguments.top}")
    network = load_network(arguments.run_folder)
    card = network.card
    code = EXIT_OK
    for path in arguments.images:
        try:
            pixels = decode(path, card.height, card.width, card.channels)
        except (ValueError, OSError) as error:  # the others can still be told
            complain("predict", error)
            code = EXIT_USAGE
            continue
        image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
        chances, labels = network.probabilities(image)[0].topk(min(arguments.top, len(card.class_names)))
        names = [card.class_names[label] for label in labels.tolist()]
        found = dict(zip(names, chances.tolist(), strict=True))
        if arguments.json:
            print(json.dumps({"image": str(path), "probabilities": found}, ensure_ascii=False))
        else:
            print(f"{path}  " + "  ".join(f"{name} {chance:.1%}" for name, chance in found.items()))
    return code
