"""The store: whole or not at all, verified on reading, on disk and on a URL."""

import errno
import fcntl
import json
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from tiny import put, row

from raysweep.errors import StoreError
from raysweep.runs import Run
from raysweep.store import Store
from raysweep.train.deepspeed_ops import alone


@pytest.fixture(params=["local", "memory"])
def any_store(request, tmp_path, monkeypatch) -> Store:
    """A local store and one on an object store's interface."""
    if request.param == "local":
        return Store(tmp_path / "store")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Store(f"memory://{tmp_path.name}")


def test_what_is_put_is_found(any_store):
    assert any_store.get("x-1") is None
    record = put(any_store)
    assert any_store.get("x-1") == record
    assert (any_store.folder("x-1") / "sub" / "file").read_text() == "weights"
    assert any_store.finished_ids() == {"x-1"}
    assert [found.id for found in any_store.records()] == ["x-1"]


def test_another_machine_finds_it_too(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    record = put(Store(f"memory://shared-{tmp_path.name}"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
    other = Store(f"memory://shared-{tmp_path.name}")
    assert other.get("x-1") == record
    assert (other.folder("x-1") / "sub" / "file").read_text() == "weights"


@pytest.mark.parametrize("damage", ["truncate", "alter", "delete"])
def test_damaged_file_is_named_and_not_used(store, caplog, damage):
    put(store)
    path = store.folder("x-1") / "sub" / "file"
    if damage == "truncate":
        path.write_text("weig")
    elif damage == "alter":
        path.write_text("weighty")
    else:
        path.unlink()
    assert store.get("x-1") is None
    assert "sub/file" in caplog.text
    with pytest.raises(StoreError, match="run its sweep again"):
        store.folder("x-1")
    put(store)
    assert store.folder("x-1").joinpath("sub/file").read_text() == "weights"


def test_alteration_of_same_size_and_time_is_seen_by_a_fresh_process(store):
    put(store)
    path = store.folder("x-1") / "sub" / "file"
    stat = path.stat()
    path.write_text("WEIGHTS")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert Store(store.url).get("x-1") is None


def test_altered_record_is_not_used(store, caplog):
    put(store)
    path = store.root / "stages" / "x-1" / "record.json"
    body = json.loads(path.read_text())
    body["metrics"]["m"] = 0.9
    path.write_text(json.dumps(body))
    assert store.get("x-1") is None
    assert "checksum" in caplog.text


def test_the_record_of_another_stage_is_not_used(store, caplog):
    put(store, "x-1")
    put(store, "x-2", text="other")
    shutil.copy(store.folder("x-2") / "record.json", store.root / "stages" / "x-1" / "record.json")
    assert Store(store.root).get("x-1") is None
    assert "its record.json is that of x-2" in caplog.text
    assert put(store, "x-1").id == "x-1"
    assert store.get("x-2") is not None


def test_a_record_of_another_spec_is_an_error_that_shows_the_difference(any_store):
    put(any_store)
    assert any_store.get("x-1", asked={"a": 1}) is not None
    with pytest.raises(StoreError, match=r'made from another spec: - "a": 1; \+ "a": 2'):
        any_store.get("x-1", asked={"a": 2})


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"[" * 100_000, b'{"id": "x-1"}', b"9" * 5000])
def test_a_damaged_record_is_moved_aside(store, caplog, content):
    put(store)
    (store.root / "stages" / "x-1" / "record.json").write_bytes(content)
    assert Store(store.root).get("x-1") is None
    assert "stages/x-1 is not used and will be re-made" in caplog.text
    put(store)
    assert Store(store.root).get("x-1") is not None


def test_a_folder_that_lost_its_record_is_made_again(store, caplog):
    put(store)
    (store.folder("x-1") / "record.json").unlink()
    fresh = Store(store.root)
    assert fresh.get("x-1") is None
    record = put(fresh, text="again")
    assert Store(store.root).get("x-1") == record
    assert (fresh.folder("x-1") / "sub" / "file").read_text() == "again"
    assert "has lost record.json" in caplog.text
    assert list((store.root / "altered").iterdir())


def test_unfinished_work_is_invisible(store):
    with store.claim("x-1"):
        (store.work_dir("x-1") / "file").write_text("half")
    assert store.get("x-1") is None
    assert store.finished_ids() == set()


def use_all_locks(store: Store) -> None:
    with store.unused():
        pass
    with store.in_use(), store.claim("x-1"):
        run = Run.create(store, "r", sweep_text="x", identity="{}")
        with run.held():
            assert Run(store, "r").is_held
        assert not run.is_held
        run.publish()


@pytest.mark.parametrize("scheme", ["", "local://"])
def test_locks_are_of_files_that_are_open_as_nfs_asks(tmp_path, monkeypatch, scheme):
    """There a shared lock is one of bytes to read, and an exclusive one of bytes to write."""
    asked, flock = set(), fcntl.flock

    def as_nfs(file, how: int) -> None:
        mode = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE
        kind = how & ~fcntl.LOCK_NB
        if mode not in ({fcntl.LOCK_SH: os.O_RDONLY, fcntl.LOCK_EX: os.O_WRONLY}[kind], os.O_RDWR):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        asked.add(kind)
        flock(file, how)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fcntl, "flock", as_nfs)
    use_all_locks(Store(f"{scheme}{tmp_path}/store"))
    assert asked == {fcntl.LOCK_SH, fcntl.LOCK_EX}


def test_a_file_system_without_locks_is_told_in_a_line(store, monkeypatch):
    def no_locks(file, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    run = Run.create(store, "r", sweep_text="x", identity="{}")
    (run.folder / ".lock").touch()
    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert not run.is_held
    operator = partial(alone, store.root / "operator", print)
    for hold in (store.unused, store.in_use, run.held, lambda: store.claim("x-1"), operator):
        with pytest.raises(StoreError, match=r"\S cannot be locked: No locks available; .* \(flock\)$"), hold():
            pass


def test_a_relative_store_is_the_same_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = Store("store")
    put(made)
    monkeypatch.chdir("/")
    assert Store(made.url).get("x-1") is not None


def test_no_store_at_an_unknown_url():
    with pytest.raises(StoreError, match="nosuch"):
        Store("nosuch://bucket")


def test_run_keeps_trials_once_and_survives_a_cut_line(store):
    run = Run.create(store, "r", sweep_text="x", identity="{}")
    run.add_trial(row("t1"))
    run.add_trial(row("t1"))
    with (run.folder / "trials.jsonl").open("a") as file:
        file.write('{"trial": "t2", "var')
    again = Run.create(store, "r", sweep_text="x", identity="{}")
    again.add_trial(row("t3"))
    assert [found.trial for found in again.trials()] == ["t1", "t3"]


def test_a_trial_that_got_further_stages_replaces_itself(store):
    run = Run.create(store, "r", sweep_text="x", identity="{}")
    first = row("t1")
    wider = replace(first, stages=(*first.stages, replace(first.stages[0], id="x-2")))
    for told in (first, row("t2"), wider, first):
        run.add_trial(told)
        again = Run(store, "r")  # As a resumed run sees it.
        again.add_trial(first)
    assert Run(store, "r").trials() == [wider, row("t2")]


def test_run_of_another_sweep_is_refused(store):
    Run.create(store, "r", sweep_text="x", identity='{"lr": 1}')
    with pytest.raises(StoreError, match="belongs to another sweep"):
        Run.create(store, "r", sweep_text="y", identity='{"lr": 2}')


def test_unknown_run_lists_those_there_are(store):
    Run.create(store, "mine", sweep_text="x", identity="{}")
    with pytest.raises(StoreError, match="runs there: mine"):
        Run.find(store, "yours")
    assert Run.find(store, str(Path("somewhere") / "mine")).name == "mine"


def test_failures_are_kept_until_the_stage_is_done(store):
    run = Run.create(store, "r", sweep_text="x", identity="{}")
    for _ in range(2):
        run.add_failure("x-1", kind="x", trial="t1", cause="disk full", log="...")
    assert [(f["stage"], f["attempts"]) for f in run.failures()] == [("x-1", 2)]
    run.clear_failure("x-1")
    assert run.failures() == []


def test_run_on_a_url_is_found_from_another_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    run = Run.create(Store(f"memory://runs-{tmp_path.name}"), "r", sweep_text="x", identity="{}")
    run.add_trial(row("t1"))
    run.add_failure("x-1", kind="x", trial="t1", cause="c", log="l")
    run.publish()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
    other = Store(f"memory://runs-{tmp_path.name}")
    assert [found.name for found in Run.all(other)] == ["r"]
    found = Run.find(other, "r")
    assert [trial.trial for trial in found.trials()] == ["t1"]
    assert found.failures()[0]["cause"] == "c"
    assert found.sweep_text == "x"
