"""Pretraining that goes on: phases of a trajectory, to the bit, computed once; and from a checkpoint that exists."""

import json
import os
import signal
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from raysweep.analysis.sections import cost_table
from raysweep.analysis.tables import checkpoint_table, stage_table
from raysweep.runners import run_sweep
from raysweep.runs import Run
from raysweep.space import load
from raysweep.store import Store

BASE = """\
name: phases
pretrain:
  data: {name: pcfg, vocabulary: 16, num_nonterminals: 4, num_rules: 2, num_words: 3, sentence_length: 4,
         num_train_sentences: 90, num_valid_sentences: 20}
  model: {name: llama, hidden_size: 16, num_layers: 1, num_heads: 2}
  optimizer: {name: adamw, lr: 1e-2}
  batch_sequences: 8
  sequence_length: 5
"""
WHOLE = BASE + "  schedule: {name: constant, warmup: 0.125}\n  steps: 16\n"
PHASED = (
    BASE
    + """\
  schedule: {name: constant, warmup: 0.25}
  phases:
    - {name: trunk, steps: 8, checkpoints: [4]}
    - {name: middle, steps: 5}
    - {name: end, steps: 3}
"""
)
DECAYS = (
    BASE
    + """\
  schedule: {name: constant}
  phases:
    - {name: trunk, steps: 20}
    - {name: decay, steps: 2, schedule: {name: wsd, decay: 1.0}}
sweep:
  pretrain.phases.decay.optimizer.lr: {grid: [1e-2, 3e-3, 1e-3, 3e-4]}
"""
)


@pytest.fixture
def run_of(tmp_path):
    """Runs a sweep inline on one store."""

    def run(text: str, store: Store, **given) -> Run:
        path = tmp_path / "sweep.yaml"
        path.write_text(text)
        made = run_sweep(load(path), store, **({"runner": "inline"} | given))
        assert made.failures() == []
        return made

    return run


def last_checkpoint(run: Run):
    """The folder of the last checkpoint of the only trial, and its metrics."""
    (trial,) = run.trials()
    stage = [stage for stage in trial.stages if stage.kind == "pretrain"][-1]
    return run.store.folder(stage.id), run.store.get(stage.id).metrics


def same(left: Path, right: Path) -> bool:
    ours, theirs = load_file(left / "model.safetensors"), load_file(right / "model.safetensors")
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_phases_that_change_nothing_are_one_run_to_the_bit(run_of, store):
    whole, whole_metrics = last_checkpoint(run_of(WHOLE, store))
    phased, metrics = last_checkpoint(run_of(PHASED, store))
    assert same(whole, phased)
    curves = [
        [json.loads(line) for line in (each / "curve.jsonl").read_text().splitlines()] for each in (whole, phased)
    ]
    assert curves[0] == curves[1]
    assert [line["step"] for line in curves[1]] == list(range(1, 17))
    assert metrics == whole_metrics


def test_trials_share_a_trunk_over_sweeps_and_a_measured_one_is_one_checkpoint(run_of, store):
    text = DECAYS.replace("steps: 20", "steps: 20, checkpoints: [10]")
    told: list[dict] = []
    run = run_of(text, store, show=told.append)
    table = checkpoint_table(run)
    assert sorted(table["step"]) == [10, 22, 22, 22, 22]
    shared = table[table["step"] == 10].iloc[0]
    assert pd.isna(shared["point.pretrain.phases.decay.optimizer.lr"]), "it is of a later phase"
    assert table.loc[table["step"] == 22, "point.pretrain.phases.decay.optimizer.lr"].nunique() == 4
    assert steps_computed(told) == 20 + 4 * 2
    costs = {row.cells[0].text: row.cells[5].sort for row in cost_table(stage_table(run)).rows}
    assert costs["pretrain"] == (20 + 4 * 2) * 40
    told.clear()
    run_of(text.replace("3e-4]", "3e-4, 1e-4]"), store, show=told.append)
    assert steps_computed(told) == 2, "of the new decay alone"


def steps_computed(events: list[dict]) -> int:
    """Steps of 8 sequences of 5 tokens, by what the stages told last."""
    tokens = {event["stage"]: event["num_tokens"] for event in events if "num_tokens" in event}
    return sum(tokens.values()) // 40


def run_and_die(path: str, store: str, told: Path, kinds: list[tuple[str, str]]) -> None:
    """Runs a sweep inline, and is killed at the first event of one of these kinds; notes what stages tell."""

    def show(event) -> None:
        if "num_tokens" in event:
            with told.open("a") as file:
                file.write(json.dumps([event["stage"], event["num_tokens"]]) + "\n")
        if (event["event"], event.get("kind")) in kinds:
            os.kill(os.getpid(), signal.SIGKILL)

    run_sweep(load(path), Store(store), runner="inline", show=show)


def test_a_kill_between_stages_loses_nothing(run_of, store, tmp_path):
    whole, _ = last_checkpoint(run_of(WHOLE, Store(tmp_path / "whole")))
    path, told = tmp_path / "phased.yaml", tmp_path / "told.jsonl"
    path.write_text(PHASED)
    deaths = [("finished", "pretrain"), ("finished", "pretrain"), ("finished", "optimizer_state")]
    deaths += [("finished", "pretrain"), ("started", "optimizer_state")]
    for death in deaths:
        process = get_context("spawn").Process(target=run_and_die, args=(str(path), store.url, told, [death]))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, death
    phased, _ = last_checkpoint(run_of(PHASED, store))
    assert same(whole, phased)
    lines = [json.loads(line) for line in told.read_text().splitlines()]
    assert sum(num for _, num in lines) <= 16 * 40, "no step was taken twice"
