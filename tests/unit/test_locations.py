"""Where a store may lie, and what is said where it may not: one line, and nothing made."""

import errno
import re
import shutil
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from tiny import TINY, put

from raysweep.cli import main
from raysweep.errors import StoreError, UnreachableError
from raysweep.plan import Stage
from raysweep.runners.gang import Failure
from raysweep.runs import Run
from raysweep.store import Store


class Buckets(MemoryFileSystem):
    """As object stores are: no folders, and a bucket that is there or not; asked for a folder they make the bucket."""

    protocol = "buckets"
    root_marker = ""
    store: ClassVar[dict] = {}
    made: ClassVar[set[str]] = {"mine"}

    @classmethod
    def _strip_protocol(cls, path):
        return path.removeprefix("buckets://").strip("/")

    def makedirs(self, path, exist_ok=False):
        self.made.add(path.split("/")[0])

    mkdir = makedirs

    def _need(self, path):
        if self._strip_protocol(path).split("/")[0] not in self.made:
            raise FileNotFoundError("The specified bucket does not exist")

    def pipe_file(self, path, value, **kwargs):
        self._need(path)
        self.store[self._strip_protocol(path)] = value

    def put_file(self, lpath, rpath, **kwargs):
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def get_file(self, rpath, lpath, **kwargs):
        try:
            Path(lpath).write_bytes(self.store[self._strip_protocol(rpath)])
        except KeyError:
            raise FileNotFoundError(rpath) from None

    def rm_file(self, path):
        self.store.pop(self._strip_protocol(path), None)

    def find(self, path, detail=False, **kwargs):
        """Tells nothing of an object but its size."""
        names = sorted(name for name in self.store if name.startswith(f"{self._strip_protocol(path)}/"))
        return {name: {"name": name, "size": len(self.store[name])} for name in names} if detail else names

    def ls(self, path, detail=False, **kwargs):
        base = f"{self._strip_protocol(path)}/"
        return sorted({base + name.removeprefix(base).split("/")[0] for name in self.find(path)})


class Down(Buckets):
    """An endpoint that refuses connections, with an error of the library's own."""

    protocol = "down"

    class EndpointError(Exception):
        pass

    def _refuse(self, *args, **kwargs):
        raise self.EndpointError('Could not connect to the endpoint URL: "http://127.0.0.1:1/"\nand more')

    put_file = pipe_file = get_file = rm_file = find = ls = makedirs = _refuse


@pytest.fixture(autouse=True)
def file_systems(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Buckets, "store", {})
    monkeypatch.setattr(Buckets, "made", {"mine"})
    for kind in (Buckets, Down):
        fsspec.register_implementation(kind.protocol, kind, clobber=True)


WRONG = {
    "{file}": "is a file; give a folder",
    "{file}/below": "cannot be written: Not a directory",
    "/proc/raysweep": "cannot be written: No such file or directory",
    "/proc": "cannot be written",
    "/sys/raysweep": "cannot be written",
    "{long}": "cannot be (read|written): File name too long",
    "zip://store": "cannot be opened: .*Is a directory",
    "zip://a::{file}": "cannot be opened: File is not a zip file",
    "nosuch://x": "cannot be opened: Protocol not known",
    "down://mine/store": "cannot be (listed|written|read): Could not connect to the endpoint URL",
    "buckets://mistyped/store": "The specified bucket does not exist; .*create the bucket 'mistyped' first",
}


@pytest.mark.parametrize("given", WRONG)
def test_a_wrong_place_is_one_line_and_nothing_is_made(given, sweep_file, tmp_path, capsys):
    path = sweep_file(TINY)
    file = tmp_path / "file"
    file.write_text("something")
    before = sorted(tmp_path.rglob("*"))
    url = given.format(file=file, long=tmp_path / ("x" * 300))
    assert main(["run", str(path), "--runner", "inline", "--store", url]) == 2
    # The board, and the error.
    [line] = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[0:00]")]
    assert re.search(rf"^(Store|Unreachable)Error: store .*{WRONG[given]}", line)
    assert sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts) == before
    assert Buckets.made == {"mine"}
    for command in (["plan", str(path)], ["status", "some-run"], ["rank", "some-run"]):
        assert main([*command, "--store", url]) in (0, 2)
        assert capsys.readouterr().err.count("\n") <= 1


def test_a_store_in_a_bucket(tmp_path):
    store = Store("buckets://mine/some/store")
    store.check_writable()
    record = put(store)
    assert Buckets.made == {"mine"}
    assert not [name for name in Buckets.store if "check" in name]
    assert {"mine/some/store/stages/x-1/record.json"} < set(Buckets.store)
    shutil.rmtree(tmp_path / "cache")
    again = Store("buckets://mine/some/store")
    assert again.finished_ids() == {"x-1"}
    assert again.get("x-1") == record
    assert (again.folder("x-1") / "sub" / "file").read_text() == "weights"


def test_a_run_where_nothing_tells_of_a_change_is_downloaded_anew(tmp_path, monkeypatch):
    run = Run.create(Store("buckets://mine/store"), "r", sweep_text="x", identity="{}")
    run.publish()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    other = Store("buckets://mine/store")
    assert Run.find(other, "r").sweep_text == "x"
    Buckets.store["mine/store/runs/r/sweep.yaml"] = b"y"
    assert Run.find(other, "r").sweep_text == "y"


def test_a_stage_that_met_an_endpoint_that_was_down_is_tried_again(tiny_space):
    stage: Stage = tiny_space.trial(next(iter(tiny_space.points())), 0).stages[0]
    with pytest.raises(UnreachableError) as met:
        Store("down://mine/store").get(stage.id)
    assert not Failure.of(stage, met.value).final
    assert Failure.of(stage, StoreError("altered")).final


def test_a_download_that_fails_leaves_nothing(tmp_path):
    store = Store("down://mine/store")
    with pytest.raises(UnreachableError, match="cannot be read"):
        store.get("x-1")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_a_store_that_can_only_be_read_is_read(store, monkeypatch, caplog):
    put(store)
    (store.root / "stages" / "x-1" / "sub" / "file").write_text("altered")

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("os.rename", refuse)
    assert Store(store.root).get("x-1") is None
    assert "is not used and will be re-made" in caplog.text


def test_a_store_in_memory_would_be_lost_with_the_command(sweep_file, capsys):
    assert main(["run", str(sweep_file(TINY)), "--runner", "inline", "--store", "memory://s"]) == 2
    assert "store 'memory://s' is gone when this command ends; give a folder" in capsys.readouterr().err
