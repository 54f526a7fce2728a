"""`sft.lrs: auto` for real: a grid that begins too low grows until the best rate is inside, whatever comes between."""

import pytest
from tiny import TINY, results_of

from raysweep.analysis.tables import checkpoint_table
from raysweep.runners import run_sweep
from raysweep.runs import Run, status
from raysweep.scores import FinetuningRun, Result, pick
from raysweep.space import load
from raysweep.store import Store
from raysweep.train.methods import Full

AUTO = (
    TINY.replace("lrs: [1e-3, 1e-2]", "lrs: auto")
    .replace("{epochs: 1}", "{epochs: 2}")
    .replace("num_train: 40, num_valid: 20", "num_train: 200, num_valid: 200")
    .replace("checkpoints: [6, 12]", "checkpoints: [12]")
    .replace("flatness: {num_sequences: 16, batch_sequences: 2, min_units: 4, max_units: 8}\n", "")
)


def picked(run: Run, checkpoint: str):
    """By the records of a checkpoint's fine-tuning stages."""
    stages = {s.id for trial in run.trials() for s in trial.stages if s.kind == "sft" and s.checkpoint == checkpoint}
    records = [run.store.get(stage_id) for stage_id in sorted(stages)]
    return pick(
        FinetuningRun(r.spec["lr"], r.spec["seed"], r.status == "diverged", r.metrics.get("valid_score"), r.id)
        for r in records
    )


@pytest.mark.parametrize(
    ("recorded", "num_added"),
    [
        ({}, 0),  # By the 200 of the sweep file a standard error of 0.62 is 0.034.
        ({"num_valid_examples": 200.0}, 0),
        ({"num_valid_examples": 20.0}, 1),
        ({"a/num_valid_examples": 200.0, "b/num_valid_examples": 200.0}, 0),
        ({"a/num_valid_examples": 200.0, "b/num_valid_examples": 15.0}, 1),
    ],
)
def test_the_error_that_leaves_a_grid_open_is_of_the_examples_there_were(sweep_file, recorded, num_added):
    trial = load(sweep_file(AUTO)).trial({"pretrain.optimizer.lr": 0.01}, 0)
    scores = dict(zip(Full.first_lrs, (0.55, 0.62, 0.56), strict=True))
    results = {
        stage.id: Result(
            stage.id, "sft", "done", {"valid_score": scores[stage.spec.lr], **recorded}, stage.task, stage.spec.lr, 0
        )
        for stage in trial.stages
        if stage.kind == "sft"
    }
    assert len(trial.widened(results).added) == num_added


def test_rates_widen_until_the_best_is_inside_and_a_resumed_run_adds_nothing(sweep_file, store, tmp_path):
    space = load(sweep_file(AUTO))
    run = run_sweep(space, store, runner="inline")
    assert run.failures() == []
    table = checkpoint_table(run).set_index("checkpoint")
    assert len(table) == 2
    for checkpoint, row in table.iterrows():
        found = picked(run, checkpoint)
        assert found.edge is None
        assert row["sft/span/num_valid_examples"] == 200
        assert row["sft/span/lr"] == found.lr > Full.first_lrs[-1]
        assert row["sft/span/score"] == store.get(found.runs[0].id).metrics["score"]
    want = results_of(run)
    num = sum(stage_id.startswith("sft") for stage_id in want)
    counts = status(run)["stages"]["sft"]
    assert counts["done"] == sum(counts.values()) == num
    events = []
    again = run_sweep(space, store, runner="inline", show=events.append)
    assert results_of(again) == want
    assert not [event for event in events if event.event in ("started", "finished")]
    assert len((run.folder / "trials.jsonl").read_text().split()) == len(
        (again.folder / "trials.jsonl").read_text().split()
    )

    # Cut off when the first stage of a widened grid is to start.
    broken = Store(tmp_path / "broken")

    def cut(event):
        if event.event == "started" and event.kind == "sft":
            known = {stage.id for trial in Run.all(broken)[0].trials() for stage in trial.stages}
            if len(known) > len(space.trial({"pretrain.optimizer.lr": 0.01}, 0).stages):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(space, broken, runner="inline", show=cut)
    assert status(Run.all(broken)[0])["stages"]["sft"]["to_do"] > 0
    assert results_of(run_sweep(space, broken, runner="inline")) == want


@pytest.mark.slow
@pytest.mark.ray
def test_a_gang_on_ray_comes_by_the_same_rates(sweep_file, store, tmp_path):
    space = load(sweep_file(AUTO.replace("[1e-2, 3e-3]", "[1e-2]") + "resources: {workers: 2, zero_stage: 0}\n"))
    run = run_sweep(space, store)
    assert run.failures() == []
    events = []
    run_sweep(space, store, show=events.append)
    assert not [event for event in events if event.event == "started"]
    for checkpoint in checkpoint_table(run)["checkpoint"]:
        assert picked(run, checkpoint).edge is None
