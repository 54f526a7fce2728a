"""A disk that fills up: one line says so, and the same run goes on when there is room."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import results_of

from raysweep.cli import main
from raysweep.runners import run_sweep
from raysweep.runs import Run
from raysweep.store import Store


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of a few pages; `remount` gives it room."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def remount(folder: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)


@pytest.mark.parametrize("size", ["16k", "600k"])
def test_a_full_disk_is_one_line_and_the_run_goes_on(size, small_disk, tiny_space, sweep_file, store, capsys):
    remount(small_disk, size)
    command = ["run", str(sweep_file()), "--runner", "inline", "--store", str(small_disk / "store"), "--run", "r"]
    assert main(command) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    [line] = [line for line in err.splitlines() if line.startswith("StoreError: ")]
    assert "No space left on device" in line
    remount(small_disk, "40m")
    assert main(command) == 0
    untouched = results_of(run_sweep(tiny_space, store, runner="inline"))
    assert results_of(Run.find(Store(small_disk / "store"), "r")) == untouched
