"""The folder of a run: files that are whole, on the disk, or not there; and the memory that a training keeps."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from imgopt_fast.training.run_folder import RunFolder


def test_run_folder_files_are_whole_or_not_there(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with RunFolder.create(tmp_path / "a" / "run") as run:
        run.write("file.txt", lambda path: path.write_text("whole"))
        with pytest.raises(OSError, match=r"No space left on device.*file\.txt"):
            run.write("file.txt", fail)
        assert [path.name for path in run.path.iterdir()] == ["file.txt"]
        assert (run.path / "file.txt").read_text() == "whole"
    with pytest.raises(ValueError, match="exists already"), RunFolder.create(tmp_path / "a" / "run"):
        pass


def test_run_folder_files_and_their_names_reach_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file before it gets its name, then the folder that holds the name: a power cut leaves it there, and whole."""
    seen: list[tuple[str, list[str]]] = []
    flush = os.fsync

    def note(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        seen.append((path.name, sorted(file.name for file in (tmp_path / "a" / "run").iterdir())))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    with RunFolder.create(tmp_path / "a" / "run") as run:
        run.write("file.txt", lambda path: path.write_text("whole"))
    assert seen == [
        ("a", []),
        (tmp_path.name, []),
        (".partial-file.txt", [".partial-file.txt"]),
        ("run", ["file.txt"]),
    ]


def test_memory_that_a_step_frees_is_kept_for_the_next() -> None:
    """Fresh pages are page faults: what is as large as this, glibc asks the system for every time."""
    if sys.platform != "linux":
        pytest.skip("glibc's malloc")
    code = """if True:
        import resource
        from imgopt_fast.training.allocator import freed_memory_kept
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            bytearray(64 << 20)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        with freed_memory_kept():
            faults()
            print(faults())
        print(faults())
    """
    alone = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=alone)
    kept, given_back = map(int, result.stdout.split())
    pages = (64 << 20) // resource.getpagesize()
    assert kept < pages / 10
    assert given_back > pages / 2


def test_a_full_disk_names_the_way_on_where_there_is_one(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left on device") as caught:
        RunFolder(tmp_path).write("summary.csv", fail)
    assert caught.value.strerror == "No space left on device"
    with pytest.raises(OSError, match=f"No space left on device; when .* mended, continue with --resume {tmp_path}"):
        RunFolder(tmp_path, keep=True).write("summary.csv", fail)


def test_an_empty_folder_is_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".partial-config.yaml").write_text("killed while it was written")
    with RunFolder.create(tmp_path / "run") as run:
        run.write("config.yaml", lambda path: path.write_text("whole"))
    with pytest.raises(ValueError, match="exists already"), RunFolder.create(tmp_path / "run"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="exists already"), RunFolder.create(tmp_path / "file"):
        pass


def fill_and_fail(path: Path, keep: bool) -> None:
    with RunFolder.create(path) as run:
        run.write("file.txt", lambda path: path.write_text("whole"))
        run.keep = keep
        raise RuntimeError


def test_run_folder_leaves_nothing_when_nothing_was_worth_keeping(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        fill_and_fail(tmp_path / "a" / "b" / "run", keep=False)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError):
        fill_and_fail(tmp_path / "a" / "b" / "run", keep=True)
    assert (tmp_path / "a" / "b" / "run" / "file.txt").exists()
