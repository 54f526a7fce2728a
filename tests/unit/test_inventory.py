"""Runs of a store, and what of it may go."""

import json
import threading
import time
from dataclasses import replace

import pytest
from tiny import EMPTY, TRUNK, put

from raysweep.cli import main
from raysweep.errors import StoreError
from raysweep.inventory import find_garbage, free, held_runs, list_runs
from raysweep.lease import Holder
from raysweep.run_files import UNKNOWN, StageRow, TrialRow
from raysweep.runners import run_sweep
from raysweep.runs import Run
from raysweep.space import load
from raysweep.store import Store


def stage(stage_id: str, *inputs: str, state_key: str | None = None) -> StageRow:
    kind = stage_id.split("-")[0]
    return StageRow(stage_id, kind, 1, None, None, {str(n): name for n, name in enumerate(inputs)}, state_key)


def start(store: Store, name: str, *stages: StageRow, trial: str = "t") -> Run:
    run = Run.create(store, name, sweep_text=name, identity=json.dumps({"name": name}))
    run.note_planned({"num_trials": 1, "stages": {}})
    run.add_trial(TrialRow(trial=f"{trial}-{name}", variant=f"of-{trial}-{name}", point={}, seed=0, stages=stages))
    return run


def garbage(store: Store, **how) -> dict[str, str]:
    with held_runs(store) as runs:
        return {each.name: each.kind for each in find_garbage(store, runs, **how)}


@pytest.fixture(params=["folder", "url"])
def any_store(request, tmp_path, monkeypatch) -> Store:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "store"
    return Store(root) if request.param == "folder" else Store(f"local://{root}")


def test_runs_are_listed_with_how_far_they_are(any_store):
    put(any_store, "tokenize-1")
    put(any_store, "pretrain-1", text="w" * 1000)
    start(any_store, "whole", stage("tokenize-1"), stage("pretrain-1", "tokenize-1")).publish()
    begun = start(any_store, "begun", stage("tokenize-1"), stage("pretrain-2", "tokenize-1"))
    begun.publish()
    rows = {row.name: row for row in list_runs(any_store)}
    assert (rows["whole"].state, rows["whole"].num_trials_done, rows["whole"].num_trials) == ("done", 1, 1)
    assert (rows["begun"].state, rows["begun"].num_trials_done) == ("unfinished", 0)
    assert rows["whole"].num_bytes > 1000 > rows["begun"].num_bytes
    begun.add_failure("pretrain-2", kind="pretrain", trial="t", cause="c", log="l")
    with begun.held():
        assert {row.name: row.state for row in list_runs(any_store)} == {"whole": "done", "begun": "under way"}
    assert {row.name: row.state for row in list_runs(any_store)}["begun"] == "failed"


def test_a_trial_that_diverged_waits_for_nothing(store):
    put(store, "tokenize-1")
    out = store.work_dir("pretrain-1")
    store.commit(replace(EMPTY, id="pretrain-1", status="diverged"), out)
    later = stage("pretrain-2", "tokenize-1", state_key="trajectory-a")
    first = replace(later, id="pretrain-1")
    start(store, "r", stage("tokenize-1"), first, later, stage("sft-1", "pretrain-2"))
    assert list_runs(store)[0].state == "done"


def test_only_what_no_run_refers_to_goes(any_store):
    for name in ("tokenize-1", "pretrain-1", "pretrain-2", "sft-9"):
        put(any_store, name)
    start(any_store, "a", stage("tokenize-1"), stage("pretrain-1", "tokenize-1")).publish()
    start(any_store, "b", stage("tokenize-1"), stage("pretrain-2", "tokenize-1")).publish()
    stages = {name: kind for name, kind in garbage(any_store).items() if kind == "stage"}
    assert stages == {"sft-9": "stage"}
    found = garbage(any_store, forget=["b"])
    assert {name for name, kind in found.items() if kind == "stage"} == {"sft-9", "pretrain-2"}
    with held_runs(any_store) as runs:
        assert free(any_store, runs, find_garbage(any_store, runs, forget=["b"])) > 0
    assert any_store.finished_ids() == {"tokenize-1", "pretrain-1"}
    assert [run.name for run in Run.all(any_store)] == ["a"]
    # What is left is whole, in the cache or fetched again.
    assert (any_store.folder("pretrain-1") / "sub" / "file").read_text() == "weights"


def test_state_stays_as_long_as_a_trajectory_is_unfinished(store):
    put(store, "tokenize-1")
    put(store, "pretrain-1")
    for key in ("trajectory-a", "trajectory-b", "sft-1", "sft-2"):
        (store.state_dir(key).path / "step").write_text("x")
    (store.partial_dir("pretrain-1")).mkdir(parents=True)
    open_trial = [stage("pretrain-1", state_key="trajectory-a"), stage("pretrain-2", state_key="trajectory-a")]
    run = start(store, "r", *open_trial, stage("sft-1", "pretrain-2"))
    states = {name for name, kind in garbage(store).items() if kind == "state"}
    assert states == {"trajectory-b.state", "sft-2.state"}
    assert garbage(store)["pretrain-1.out"] == "attempt"
    assert garbage(store)["2 lock files"] == "locks"
    # Stopped by a scheduler before the stage that is missing: nobody goes on from it.
    run.add_pruned("t-r", 0)
    assert garbage(store)["trajectory-a.state"] == "state"


def test_state_behind_a_url_goes_whatever_machine_has_left_it(tmp_path, monkeypatch):
    url = f"local://{tmp_path}/url"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "there"))
    states = Store(url).state_dir("trajectory-a")
    (states.path / "step").write_text("x")
    states.send("step")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    here = Store(url)
    assert garbage(here) == {"trajectory-a.state": "state"}
    with held_runs(here) as runs:
        assert free(here, runs, find_garbage(here, runs)) == 1
    assert here.state_dir("trajectory-a").names() == set()


def test_state_stays_where_it_is_not_known_whose_it_is(store):
    (store.state_dir("trajectory-a").path / "step").write_text("x")
    start(store, "r", stage("pretrain-2", state_key=UNKNOWN))
    assert "trajectory-a.state" not in garbage(store)


def test_nothing_goes_while_a_run_is_under_way_or_cannot_be_read(store):
    put(store, "sft-9")
    run = start(store, "r", stage("tokenize-1"))
    with run.held(), pytest.raises(StoreError, match="under way"):
        garbage(store)
    (run.folder / "trials.jsonl").open("a").write('{"trial": "cut o')
    with pytest.raises(StoreError, match="damaged, so what it refers to is not known"):
        garbage(store)


def test_a_run_that_has_lost_its_sweep_file_keeps_all_that_it_refers_to(any_store):
    put(any_store, "pretrain-1")
    run = start(any_store, "r", stage("pretrain-1"))
    run.publish()
    (run.folder / "sweep.yaml").unlink()
    run.publish()
    with pytest.raises(StoreError, match=r"'r' has lost its sweep\.yaml.* --run r, .*or delete the folder .*/runs/r$"):
        garbage(any_store)
    Run.create(any_store, "r", sweep_text="r", identity=json.dumps({"name": "r"})).publish()
    assert not {"stage", "run"} & set(garbage(any_store).values())


def test_a_run_starts_only_when_what_is_garbage_is_gone(store, sweep_file, caplog):
    """A run of finished stages, started between the look and the deletion, makes them again, and keeps them."""
    space = load(sweep_file(TRUNK + "  steps: 2\n"))
    run = run_sweep(space, store, runner="inline")
    made = store.finished_ids()
    assert made
    with held_runs(store) as runs:
        found = find_garbage(store, runs, forget=[run.name])
        assert {each.name for each in found if each.kind == "stage"} == made
        begun = threading.Thread(target=run_sweep, args=(space, store), kwargs={"runner": "inline"})
        begun.start()
        while "waiting for a `raysweep gc` of" not in caplog.text:
            time.sleep(0.01)
        assert begun.is_alive()
        free(store, runs, found)
        assert store.finished_ids() == set()
        assert store.run_names() == []
    begun.join()
    assert store.run_names() == [run.name]
    assert store.finished_ids() == made
    assert "stage" not in garbage(store).values()


def test_nothing_goes_while_a_run_that_began_meanwhile_is_under_way(store):
    put(store, "sft-9")
    with store.in_use(), pytest.raises(StoreError, match="a run, or another `raysweep gc`, is under way"):
        garbage(store)
    assert "sft-9" in garbage(store)


def test_a_run_that_began_on_another_machine_keeps_what_it_may_refer_to(tmp_path, monkeypatch):
    url = f"local://{tmp_path}/url"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "there"))
    there = Store(url)
    put(there, "pretrain-1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    here = Store(url)
    with held_runs(here) as runs:
        found = find_garbage(here, runs)
        begun = start(there, "r", stage("pretrain-1"))
        with begun.held(), pytest.raises(StoreError, match="run 'r' is noted as under way"):
            free(here, runs, found)
        begun.publish()
    assert here.finished_ids() == {"pretrain-1"}
    assert "stage" not in garbage(here).values()


def test_a_run_whose_notes_are_not_all_there_yet_is_not_to_be_deleted(tmp_path, monkeypatch):
    """Its driver's first upload is under way; killed before that, its lease can be deleted as it is said."""
    url = f"local://{tmp_path}/url"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "there"))
    there = Store(url)
    begun = start(there, "r", stage("pretrain-1"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    here = Store(url)
    said = rf"run 'r' is noted as under way, .* or delete {url}/partial/run-r\.held$"
    holder = Holder("there", 1, "lock")
    with there.lease("run-r", holder, what="run 'r'", renewed=lambda: None, lost=print):
        with pytest.raises(StoreError, match=said):
            garbage(here)
        (begun.folder / "sweep.yaml").unlink()
        there.push(begun.folder)
        with pytest.raises(StoreError, match=said):
            garbage(here)
    with pytest.raises(StoreError, match=r"'r' has lost its sweep\.yaml"):
        garbage(here)


def test_a_store_that_cannot_be_written_is_told_in_a_line(capsys):
    assert main(["gc", "--store", "/proc"]) == 2
    assert "store '/proc' cannot be written: " in capsys.readouterr().err


def test_gc_deletes_with_yes_alone(store, capsys):
    put(store, "sft-9")
    start(store, "r", stage("tokenize-1"))
    assert main(["gc", "--store", store.url]) == 0
    said = capsys.readouterr()
    assert "sft-9: no run refers to it" in said.out
    assert "--yes" in said.err
    assert store.finished_ids() == {"sft-9"}
    assert main(["gc", "--store", store.url, "--json", "--yes"]) == 0
    assert json.loads(capsys.readouterr().out)["deleted"]
    assert store.finished_ids() == set()
    assert main(["gc", "--store", store.url]) == 0
    assert "nothing to free" in capsys.readouterr().out
    assert main(["ls", "--store", store.url]) == 0
    assert "0/1" in capsys.readouterr().out
