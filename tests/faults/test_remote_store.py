"""A store behind a URL, used by several machines: what is there stays there, and what is damaged is told apart."""

import json
from dataclasses import replace

import fsspec
import pytest
from tiny import put, row

from raysweep.errors import LostError
from raysweep.remote import Remote
from raysweep.runs import Run
from raysweep.store import Store


def objects(url: str) -> set[str]:
    """Names of all objects below a store's URL."""
    fs, root = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    return {path.removeprefix(root).strip("/") for path in fs.find(root)}


def overwrite(url: str, name: str, content: bytes) -> None:
    fs, root = fsspec.core.url_to_fs(url)
    fs.pipe_file(f"{root}/{name}", content)


@pytest.mark.parametrize("name", ["record.json", "sub/file"])
@pytest.mark.parametrize("content", [b"", b"WEIGHTS"])
def test_a_damaged_copy_on_this_machine_is_downloaded_again(machine, url, name, content, caplog):
    record = put(machine("one"))
    path = machine("one").folder("x-1") / name
    path.write_bytes(content)
    again = machine("one")
    assert (again.folder("x-1") / "sub" / "file").read_text() == "weights"
    assert again.get("x-1") == record
    assert machine("two").get("x-1") == record
    assert "copy of stage x-1 on this machine is damaged" in caplog.text
    assert not any(name.startswith("altered") for name in objects(url))


def test_a_copy_from_before_a_stage_was_made_anew_gives_way(machine, url):
    put(machine("one"), text="weights")
    machine("two").get("x-1")  # The record alone is in its cache.
    overwrite(url, "stages/x-1/sub/file", b"damaged")
    with pytest.raises(LostError, match="sub/file was altered"):
        machine("three").folder("x-1")
    put(machine("one"), text="again")
    assert (machine("two").folder("x-1") / "sub" / "file").read_text() == "again"


@pytest.mark.parametrize("name", ["record.json", "sub/file"])
def test_a_corrupt_object_is_set_aside_and_its_stage_made_again(machine, url, name, caplog):
    put(machine("one"))
    overwrite(url, f"stages/x-1/{name}", b"corrupt")
    store = machine("two")
    with pytest.raises(LostError):
        store.folder("x-1")
    assert store.get("x-1") is None
    assert "is not used and will be re-made" in caplog.text
    assert any(name.startswith("altered/x-1-") for name in objects(url))
    put(store)
    assert (machine("three").folder("x-1") / "sub" / "file").read_text() == "weights"


def test_of_two_machines_that_made_a_stage_the_first_stands(machine):
    first = put(machine("one"))
    second = machine("two")
    with second.claim("x-1"):
        out = second.work_dir("x-1")
        (out / "other").write_text("of no use")
        assert second.commit(replace(first, metrics={"m": 0.7}), out) == first
    assert (machine("three").folder("x-1") / "sub" / "file").read_text() == "weights"
    assert not out.exists()


@pytest.mark.parametrize("name", ["../../../outside", "{tmp}/outside", "sub/../../../outside"])
def test_a_record_cannot_name_a_file_outside_of_its_folder(machine, url, tmp_path, monkeypatch, name):
    record = put(machine("one"))
    [entry] = record.files.values()
    name = name.format(tmp=tmp_path)
    overwrite(url, "stages/x-1/record.json", replace(record, files={name: entry}).to_json().encode())
    monkeypatch.setattr(Remote, "get", _gives_anything(Remote.get))
    with pytest.raises(LostError):
        machine("two").folder("x-1")
    assert not list(tmp_path.rglob("outside"))


def _gives_anything(get):
    """A server that has an object of every name."""

    def gives(self, name, path):
        if name.endswith("record.json"):
            get(self, name, path)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"weights")

    return gives


def test_objects_of_a_run_cannot_lead_out_of_its_folder(machine, monkeypatch, tmp_path, caplog):
    run = Run.create(machine("one"), "r", sweep_text="x", identity="{}")
    run.publish()
    there = Remote.stamps
    monkeypatch.setattr(Remote, "stamps", lambda self, name: there(self, name) | {f"{name}/../../../../outside": "1"})
    assert Run.find(machine("two"), "r").sweep_text == "x"
    assert "leads out of its folder" in caplog.text
    assert not list(tmp_path.rglob("outside"))


def test_a_report_elsewhere_takes_nothing_back(machine):
    run = Run.create(machine("one"), "r", sweep_text="x", identity="{}")
    run.add_trial(row("t1"))
    run.publish()
    seen = Run.find(machine("two"), "r")
    run = Run.create(machine("one"), "r", sweep_text="x", identity="{}")
    run.add_trial(row("t2"))
    run.publish()
    machine("two")
    (seen.folder / "report.html").write_text("of one trial")
    seen.publish()
    assert [trial.trial for trial in Run.find(machine("three"), "r").trials()] == ["t1", "t2"]
    # And the machine that was behind gets what it lacked.
    again = Run.find(machine("two"), "r")
    assert [trial.trial for trial in again.trials()] == ["t1", "t2"]
    assert (Run.find(machine("one"), "r").folder / "report.html").read_text() == "of one trial"


def test_what_a_killed_run_had_not_sent_is_sent_by_the_next(machine):
    Run.create(machine("one"), "r", sweep_text="x", identity="{}").publish()
    killed = Run.create(machine("one"), "r", sweep_text="x", identity="{}")
    killed.add_trial(row("t1"))
    again = Run.create(machine("one"), "r", sweep_text="x", identity="{}")
    again.publish()
    assert [trial.trial for trial in Run.find(machine("two"), "r").trials()] == ["t1"]


def test_cleared_failures_leave_the_url_and_other_machines(machine, url):
    run = Run.create(machine("one"), "r", sweep_text="x", identity="{}")
    run.add_failure("x-1", kind="x", trial="t1", cause="c", log="l")
    run.publish()
    assert [failure["stage"] for failure in Run.find(machine("two"), "r").failures()] == ["x-1"]
    run = Run.create(machine("one"), "r", sweep_text="x", identity="{}")
    run.clear_failure("x-1")
    run.publish()
    assert "runs/r/failures/x-1.json" not in objects(url)
    assert Run.find(machine("two"), "r").failures() == []


def test_what_is_this_machines_own_stays_here(machine, url):
    run = Run.create(machine("one"), "r", sweep_text="x", identity="{}")
    (run.folder / ".lock").write_text("")
    run.publish()
    assert {name for name in objects(url) if "runs" in name} == {"runs/r/identity.json", "runs/r/sweep.yaml"}
    noted = json.loads((run.folder / ".mirror.json").read_text())
    assert noted.keys() == {"identity.json", "sweep.yaml"}


def test_a_damaged_note_of_what_is_alike_costs_a_download(machine):
    run = Run.create(machine("one"), "r", sweep_text="x", identity="{}")
    run.add_trial(row("t1"))
    run.publish()
    for content in ("", "[]", '{"a": 1}', '{"../x": ["s", 1, 2]}', json.dumps({"x" * 300: ["s", 1, 2]})):
        (run.folder / ".mirror.json").write_text(content)
        assert [trial.trial for trial in Run.find(Store(run.store.url), "r").trials()] == ["t1"]
