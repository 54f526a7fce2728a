"""Pretraining that goes on: phases of a trajectory, to the bit, computed once; and from a checkpoint that exists."""

import json

import pytest
import torch
from safetensors.torch import load_file

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


def test_phases_that_change_nothing_are_one_run_to_the_bit(run_of, store):
    whole, whole_metrics = last_checkpoint(run_of(WHOLE, store))
    phased, metrics = last_checkpoint(run_of(PHASED, store))
    ours, theirs = load_file(whole / "model.safetensors"), load_file(phased / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    curves = [
        [json.loads(line) for line in (each / "curve.jsonl").read_text().splitlines()] for each in (whole, phased)
    ]
    assert curves[0] == curves[1]
    assert [line["step"] for line in curves[1]] == list(range(1, 17))
    assert metrics == whole_metrics
