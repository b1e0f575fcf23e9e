"""The floors of the house: imports go down only, and no room has a name that says nothing."""

import ast
from pathlib import Path

import imgopt_fast

PACKAGE = next(Path(folder) for folder in imgopt_fast.__path__ if (Path(folder) / "__init__.py").is_file())

# A module may import from its own floor's package and from the floors below.
FLOORS = [
    {"_native", "_parallel", "_arguments", "_mask_blocks", "_prepared"},
    {"ops"},
    {"nn", "numpy", "jax"},
    {"data", "models", "augment", "compress"},
    {"training", "targets"},
    {"benchmarks"},
    {"cli"},
    {"__main__"},
]
FLOOR_OF = {name: level for level, names in enumerate(FLOORS) for name in names}
EMPTY_NAMES = {"utils", "util", "common", "core", "misc", "helpers", "legacy", "v2"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        rooms |= {name.split(".")[1] for name in names if name.startswith("imgopt_fast.")}
    return rooms


def test_imports_go_down_only() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        room = room_of(path)
        if room == "__init__":
            continue
        assert room in FLOOR_OF, f"{path}: a room that the house does not have"
        for other in (imported_rooms(path) & FLOOR_OF.keys()) - {room}:
            assert FLOOR_OF[other] < FLOOR_OF[room], f"{path.relative_to(PACKAGE)} ({room}) imports {other}"


def test_no_empty_names() -> None:
    names = {part.removesuffix(".py") for path in PACKAGE.rglob("*.py") for part in path.relative_to(PACKAGE).parts}
    assert not names & EMPTY_NAMES


def test_every_public_name_resolves_and_is_documented() -> None:
    for name in imgopt_fast.__all__:
        value = getattr(imgopt_fast, name)
        assert name == "__version__" or value.__doc__, name
