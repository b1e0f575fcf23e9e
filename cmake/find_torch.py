"""Print `include_dir;ON|OFF` (has it CUDA?) for an installed torch >= 2.10, or exit 1.

Looks where the running interpreter would import from, then in the environment that pip installs into: under build
isolation the interpreter does not see that one, but sysconfig still names it. Reads version.py instead of importing
torch, which would cost seconds and need its libraries.
"""

import importlib.util
import re
import sys
import sysconfig
from pathlib import Path


def candidates() -> list[Path]:
    found = []
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        found.append(Path(spec.origin).parent)
    found += [Path(sysconfig.get_path(scheme)) / "torch" for scheme in ("platlib", "purelib")]
    return found


def main() -> int:
    for torch in candidates():
        version_file = torch / "version.py"
        if not (torch / "include").is_dir() or not version_file.is_file():
            continue
        text = version_file.read_text()
        version = re.search(r"__version__ *= *['\"](\d+)\.(\d+)", text)
        if version is None or (int(version[1]), int(version[2])) < (2, 10):
            continue
        cuda = re.search(r"^cuda.*= *['\"]", text, re.MULTILINE)
        print(f"{torch / 'include'};{'ON' if cuda else 'OFF'}")
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
