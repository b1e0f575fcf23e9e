"""The command `imgopt-fast`: one file per verb, each with `add_parser(subparsers)` and `run(arguments)`.

A verb imports what it needs when it runs: `--help` answers in a tenth of a second, without torch.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module

import imgopt_fast

VERBS = ("train", "prune", "distill", "quantize", "eval", "predict", "export", "augment", "bench", "doctor")
EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. A mistake of the user's is one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser("imgopt-fast", description=imgopt_fast.__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"imgopt-fast {imgopt_fast.__version__}")
    verbs = parser.add_subparsers(title="verbs", dest="verb", required=True, metavar="VERB")
    modules = {verb: import_module(f"{__name__}.{verb}") for verb in VERBS}
    for module in modules.values():
        module.add_parser(verbs)
    parsed = parser.parse_args(arguments)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for `--model file:function` of the folder that the user works in
    logging.basicConfig(format="%(message)s")
    logging.getLogger("imgopt_fast").setLevel(logging.INFO)
    try:
        return int(modules[parsed.verb].run(parsed))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except (ValueError, OSError) as error:
        complain(parsed.verb, error)
        return EXIT_USAGE


def complain(verb: str, error: ValueError | OSError) -> None:
    """Say in one line on stderr what went wrong."""
    print(f"imgopt-fast {verb}: {' '.join(_explain(error).split())}", file=sys.stderr)


def _explain(error: ValueError | OSError) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)
