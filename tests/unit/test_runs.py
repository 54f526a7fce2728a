"""Runs: their names, and what becomes of damaged files of theirs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import TINY

from raysweep.cli import main
from raysweep.errors import StoreError
from raysweep.results import Results
from raysweep.run_files import StageRow, TrialRow
from raysweep.runs import Run, status
from raysweep.space import load
from raysweep.store import Store

DAMAGE = {
    "empty": b"",
    "bad byte": b'{"a\xff": 1}',
    "cut off": b'{"a": ',
    "nested": b"[" * 100_000,
    "list": b"[1]",
    "other": b'{"a": "b"}',
    "long number": b'{"a": ' + b"9" * 5000 + b"}",
}
BAD_NAMES = ["../../x", "/abs", ".", "..", "a/b", "", "x" * 300, "-x", ".x", "a b", "a\n", "ä", "a\0b"]


def row(trial: str) -> TrialRow:
    stage = StageRow(id="x-1", kind="x", step=None, checkpoint=None, task=None, inputs={})
    return TrialRow(trial=trial, variant=f"of-{trial}", point={"a": 1}, seed=0, stages=(stage,))


def test_a_run_that_is_refused_before_anything_is_begun_is_none(store, sweep_file, monkeypatch, capsys):
    monkeypatch.setenv("RAY_ADDRESS", "")  # What is set is undone.
    optuna = "search: {name: optuna, num_trials: 2, objectives: [{metric: sft/mean_score, mode: max}]}\n"
    for text, options, why in (
        (TINY, ["--address", "127.0.0.1:1"], "cannot be reached"),
        (TINY + optuna, ["--runner", "inline"], "needs Ray Tune"),
    ):
        command = ["run", str(sweep_file(text)), "--store", store.url, *options]
        assert main(command) == 2
        assert why in capsys.readouterr().err
        assert Run.all(store) == []
        assert list((store.root / "runs").iterdir()) == []
        # One that was there before stays.
        run = Run.create(store, load(Path(command[1])).run_name(), sweep_text="x", identity=load(command[1]).identity())
        assert main(command) == 2
        assert [each.name for each in Run.all(store)] == [run.name]
        run.remove()


@pytest.fixture
def run(store: Store) -> Run:
    run = Run.create(store, "r", sweep_text="x", identity='{"lr": 1}')
    run.add_trial(row("t1"))
    run.add_trial(row("t2"))
    run.add_failure("x-1", kind="x", trial="t1", cause="disk full", log="...")
    run.add_pruned("t1", 6)
    run.note_planned({"num_trials": 2, "stages": {"x": 1}})
    return run


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["failures/x-1.json", "pruned.json", "planned.json", "trials.jsonl", "identity.json"])
def test_a_damaged_file_is_named_and_made_again(run, caplog, name, damage):
    path = run.folder / name
    path.write_bytes(DAMAGE[damage])
    assert status(Run.find(run.store, "r"))["run"] == "r"
    if name == "identity.json" and damage == "other":
        with pytest.raises(StoreError, match="belongs to another sweep"):
            Run.create(run.store, "r", sweep_text="x", identity='{"lr": 1}')
        return
    again = Run.create(run.store, "r", sweep_text="x", identity='{"lr": 1}')
    again.start_attempt()
    # No trial is as good as a first one.
    assert (str(path) in caplog.text) != (name == "trials.jsonl" and damage == "empty")
    again.add_trial(row("t1"))
    again.add_failure("x-1", kind="x", trial="t1", cause="disk full", log="...")
    again.add_pruned("t1", 6)
    again.note_planned({"num_trials": 2, "stages": {"x": 1}})
    caplog.clear()
    assert status(again)["failures"][0]["cause"] == "disk full"
    assert again.pruned() == {"t1": 6}
    assert [found.trial for found in again.trials()][:1] == ["t1"]
    assert not caplog.text


def test_of_a_variant_under_one_seed_the_trial_started_last_counts(run):
    run.add_trial(replace(row("t1"), trial="t9"))
    assert [found.trial for found in run.trials()] == ["t9", "t2"]
    # As the program of before would go on with it.
    Run.find(run.store, "r").add_trial(row("t1"))
    assert [found.trial for found in run.trials()] == ["t1", "t2"]


def test_a_damaged_line_costs_its_trial_alone(run, caplog):
    path = run.folder / "trials.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[1], b'{"trial": "\xff', b'{"trial": "t9", "stages": [3]}', lines[-1]]))
    assert [found.trial for found in run.trials()] == ["t1", "t2"]
    assert [found.trial for found in run.trials()] == ["t1", "t2"]
    assert caplog.text.count("trials.jsonl:2: ") == caplog.text.count("trials.jsonl:3: ") == 1
    run.start_attempt()
    assert [json.loads(line)["trial"] for line in path.read_text().splitlines()] == ["t1", "t2"]


@pytest.mark.parametrize(("field", "value"), [("step", "6"), ("task", 3), ("checkpoint", []), ("inputs", None)])
def test_a_line_with_a_field_of_another_type_is_no_trial(run, caplog, field, value):
    path = run.folder / "trials.jsonl"
    row = json.loads(path.read_text().splitlines()[-1])
    row["stages"][-1][field] = value
    path.write_text(json.dumps(row) + "\n")
    assert Run(run.store, run.name).trials() == []
    assert "not the fields of a trial" in caplog.text
    assert status(Run(run.store, run.name))["num_trials"] == 0


def test_a_run_whose_identity_is_lost_is_not_taken_for_another_sweep(run):
    (run.folder / "identity.json").write_bytes(b"")
    with pytest.raises(StoreError, match=r"lost its identity\.json, and its sweep\.yaml is another"):
        Run.create(run.store, "r", sweep_text="y", identity='{"lr": 2}')
    Run.create(run.store, "r", sweep_text="x", identity='{"lr": 1}')
    with pytest.raises(StoreError, match="belongs to another sweep"):
        Run.create(run.store, "r", sweep_text="x", identity='{"lr": 2}')


def test_a_write_that_fails_leaves_the_file_as_it_was(run, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("raysweep.durable.sync", full)
    with pytest.raises(OSError, match="No space left"):
        run.add_pruned("t2", 12)
    assert run.pruned() == {"t1": 6}
    assert not [path for path in run.folder.iterdir() if path.name.startswith(".pruned")]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_is_none_is_refused_and_nothing_made(store, tmp_path, name):
    with pytest.raises(StoreError, match="a run is named with letters, digits"):
        Run.create(store, name, sweep_text="x", identity="{}")
    assert not store.root.exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["status", "rank", "report"])
@pytest.mark.parametrize("name", [".", "..", "", "x" * 300, "nothing/", "a\0b", "../..", "/"])
def test_no_such_run_is_one_line(store, capsys, command, name):
    Run.create(store, "mine", sweep_text="x", identity="{}")
    assert main([command, "--store", store.url, name]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "runs there: mine" in err


def test_a_name_too_long_for_any_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["rank", "x" * 300]) == 2
    assert "runs there: none yet" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_found_from_its_own_folder(run, monkeypatch):
    monkeypatch.chdir(run.folder)
    assert Results.open(".").run.name == "r"


def test_the_beginning_of_a_name_is_enough_where_it_is_the_only_one(store):
    for name in ("quick-1", "quick-2", "slow-1"):
        Run.create(store, name, sweep_text="x", identity="{}")
    assert Run.find(store, "slow").name == "slow-1"
    assert Run.find(store, "quick-1").name == "quick-1"
    assert Run.find(store, str(Path("somewhere") / "runs" / "slow-1")).name == "slow-1"
    with pytest.raises(StoreError, match=r"'quick' begins the names of several runs.*name one: quick-1, quick-2"):
        Run.find(store, "quick")
    with pytest.raises(StoreError, match="runs there: quick-1, quick-2, slow-1"):
        Run.find(store, "fast")
