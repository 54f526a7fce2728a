"""A disk that fills up, here or behind a URL: the run waits for room and goes on; a command later, where it cannot."""

import contextlib
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import LONGER, TINY, results_of

from raysweep.cli import main
from raysweep.errors import StoreError
from raysweep.runners import run_sweep
from raysweep.runs import Run
from raysweep.space import load
from raysweep.store import Store

AT_ONCE = TINY + "resources: {max_store_wait_seconds: 0}\n"


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


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """What opens files there may only read. A remount would not be allowed while files are open for writing."""
    view = folder.parent / "view"
    view.mkdir()
    for arguments in (["--bind", folder, view], ["-o", "remount,bind,ro", view], ["--bind", view, folder]):
        subprocess.run(["mount", *arguments], check=True)
    try:
        yield
    finally:
        for mounted in (folder, view):
            subprocess.run(["umount", "--lazy", mounted], check=True)


@pytest.mark.parametrize("size", ["16k", "600k"])
def test_a_full_disk_is_one_line_and_the_next_run_goes_on(size, small_disk, tiny_space, sweep_file, untouched, capsys):
    remount(small_disk, size)
    command = ["run", str(sweep_file(AT_ONCE)), "--runner", "inline", "--store", str(small_disk / "store"), "--run"]
    assert main([*command, "r"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    [line] = [line for line in err.splitlines() if line.startswith("StoreError: ")]
    assert "No space left on device" in line
    remount(small_disk, "40m")
    assert main([*command, "r"]) == 0
    assert results_of(Run.find(Store(small_disk / "store"), "r")) == untouched(tiny_space)


@pytest.mark.parametrize("size", ["200k", "300k"])
def test_a_full_disk_fails_the_stage_and_space_brings_it_back(size, small_disk, sweep_file):
    remount(small_disk, size)
    space, store = load(sweep_file(AT_ONCE)), Store(small_disk)
    run = run_sweep(space, store, runner="inline")
    assert any("No space left" in failure["cause"] for failure in run.failures())
    remount(small_disk, "50m")
    run = run_sweep(space, store, runner="inline")
    assert run.failures() == []
    results_of(run)


@pytest.mark.parametrize("place", ["{disk}/store", "local://{disk}/store"])
def test_a_run_waits_for_room_and_goes_on(place, small_disk, tiny_space, untouched, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    remount(small_disk, "256k")
    waits = {"store": "has no room: make some", "local": "trying again for up to"}[
        "local" if "://" in place else "store"
    ]
    made_room = threading.Event()

    def make_room() -> None:
        while waits not in caplog.text and not any(waits in note for note in notes):
            if made_room.wait(0.1):
                return
        remount(small_disk, "40m")

    notes: list[str] = []
    helper = threading.Thread(target=make_room)
    helper.start()
    try:
        run = run_sweep(
            tiny_space,
            Store(place.format(disk=small_disk)),
            runner="inline",
            show=lambda event: notes.append(event.message) if event.event == "note" else None,
        )
    finally:
        made_room.set()
        helper.join()
    assert sum(waits in text for text in [*notes, *caplog.messages]) == 1
    assert run.failures() == []
    assert len(run.trials()) == 2
    assert results_of(run) == untouched(tiny_space)


@pytest.fixture
def own_ray() -> Iterator[None]:
    """The Ray of this test alone: clusters of other tests and it would get into each other's way."""
    yield
    import ray

    ray.shutdown()


@pytest.mark.slow
@pytest.mark.ray
def test_a_gang_waits_for_room_and_goes_on_once_it_may_write(small_disk, sweep_file, undisturbed, caplog, own_ray):
    """Full as a checkpoint is to be written, and given room: the same run goes on. Then read-only: it ends in one line,
    and the same sweep goes on."""
    remount(small_disk, "40m")
    space, store = load(sweep_file(LONGER.replace("[1e-2, 3e-3]", "[1e-2]"))), Store(small_disk / "store")
    ballast, done = small_disk / "ballast", []

    def show(event) -> None:
        if event.event == "progress" and event.kind == "pretrain" and not done:
            done.append("full")
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(2**16))
        elif event.event == "note" and "has no room: make some" in event.message:
            done.append("given room")
            ballast.unlink()
        elif event.event == "started" and event.kind == "sft" and len(done) == 2:
            done.append("read-only")
            mounted.enter_context(read_only(small_disk))

    line = r"not even that .* failed: .*Read-only file system.*; once it can, the same command goes on"
    with contextlib.ExitStack() as mounted, pytest.raises(StoreError, match=line):
        run_sweep(space, store, show=show)
    assert done == ["full", "given room", "read-only"]
    assert caplog.text.count("event 'failed' not kept yet") < 20
    run = run_sweep(space, store)
    assert run.failures() == []
    assert results_of(run).items() <= undisturbed.items()
