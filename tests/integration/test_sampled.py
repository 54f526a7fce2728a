"""A sweep over text that a model writes: that of a folder, or a checkpoint of an earlier sweep."""

import pytest
from tiny import TINY, TRUNK

import raysweep
from raysweep.errors import SpaceError
from raysweep.space import load

TASKS = TINY[TINY.index("indicators:") :]
GRAMMAR = TINY[TINY.index("  data:") : TINY.index("  model:")]


def sweep(model: str, *, axis: str = "pretrain.optimizer.lr: {grid: [1e-2]}") -> str:
    """The tiny sweep, without its tasks, on 300 sequences that `model` writes."""
    written = f"  data: {{name: sampled, model: {model}, sequence_length: 5, num_train_sequences: 300}}\n"
    plain = TINY.replace(TASKS, "").replace(GRAMMAR, written)
    return plain.replace("pretrain.optimizer.lr: {grid: [1e-2, 3e-3]}", axis)


def test_a_checkpoint_of_a_sweep_writes_the_text_of_another(sweep_file, tmp_path):
    store = str(tmp_path / "store")
    first = raysweep.run(load(sweep_file(TINY.replace(TASKS, ""))), store=store, runner="inline")
    writer = first.checkpoints.iloc[-1]["location"]
    second = raysweep.run(load(sweep_file(sweep(writer))), store=store, runner="inline")
    trial = next(iter(second.run.trials()))
    assert [stage.kind for stage in trial.stages[:3]] == ["fetch", "tokenize", "pretrain"]
    assert trial.stages[1].inputs == {"sampler": trial.stages[0].id}
    gaps = second.checkpoints["heldout/entropy_gap_nats_per_token"]
    assert len(gaps) == 2
    assert ((gaps > 0) & (gaps < 2)).all()


def test_the_model_that_writes_is_no_axis(sweep_file, tmp_path):
    with pytest.raises(SpaceError, match=r"sweep\.pretrain\.data\.model: the model that writes the text cannot be"):
        load(sweep_file(sweep("x", axis="pretrain.data.model: {grid: [x, y]}")))


def test_a_model_that_is_not_there_is_what_is_told(sweep_file):
    """The vocabulary of its text, which phases are compared by, is not known then."""
    written = "  data: {name: sampled, model: ./nowhere, sequence_length: 5, num_train_sequences: 300}\n"
    phases = "  phases: [{name: first, steps: 2}, {name: second, steps: 2}]\n"
    with pytest.raises(SpaceError, match=r"tiny\.yaml:3: pretrain\.data\.model: .*nowhere"):
        load(sweep_file(TRUNK.replace(GRAMMAR, written) + phases))
