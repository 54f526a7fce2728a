"""Pretraining that goes on: phases of a trajectory, to the bit, computed once; and from a checkpoint that exists."""

import json
import os
import signal
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import torch
from ranks import forked
from safetensors.torch import load_file
from tiny import TRUNK, results_of
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from raysweep.analysis.sections import cost_table
from raysweep.analysis.tables import checkpoint_table, stage_table
from raysweep.data.packing import Tokens
from raysweep.data.tokenizers import load_tokenizer
from raysweep.errors import RaysweepError
from raysweep.events import Event, StageEvent, StageProgress
from raysweep.runners import run_sweep
from raysweep.runs import Run
from raysweep.space import load
from raysweep.store import Store

# Few sentences: a phase begins within an epoch of them and ends in another.
BASE = TRUNK.replace(
    "num_train_sentences: 400, num_valid_sentences: 40", "num_train_sentences: 90, num_valid_sentences: 20"
)
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
    text = DECAYS.replace("steps: 20", "steps: 20, checkpoints: [10]") + "curve: {part: 1.0}\n"
    told: list[Event] = []
    run = run_of(text, store, show=told.append)
    table = checkpoint_table(run)
    assert sorted(table["step"]) == [10, 22, 22, 22, 22]
    shared = table[table["step"] == 10].iloc[0]
    assert pd.isna(shared["point.pretrain.phases.decay.optimizer.lr"]), "it is of a later phase"
    ends = table[table["step"] == 22]
    assert ends["point.pretrain.phases.decay.optimizer.lr"].nunique() == 4
    # Each went on from that one; and of the curve two steps are of the second phase, too few for a slope.
    assert set(ends["heldout/earlier_loss_nats_per_token"]) == {shared["heldout/loss_nats_per_token"]}
    assert pd.isna(shared["heldout/earlier_loss_nats_per_token"])
    assert ends["curve/slope"].isna().all()
    assert shared["curve/slope"] < 0 < shared["curve/slope_stderr"]
    assert steps_computed(told) == 20 + 4 * 2
    costs = {row.cells[0].text: row.cells[5].sort for row in cost_table(stage_table(run)).rows}
    assert costs["pretrain"] == (20 + 4 * 2) * 40
    told.clear()
    run_of(text.replace("3e-4]", "3e-4, 1e-4]"), store, show=told.append)
    assert steps_computed(told) == 2, "of the new decay alone"


def steps_computed(events: list[Event]) -> int:
    """Steps of 8 sequences of 5 tokens, by what the stages told last."""
    progress = [event for event in events if isinstance(event, StageProgress) and event.at.num_tokens]
    tokens = {event.stage: event.at.num_tokens for event in progress}
    return sum(tokens.values()) // 40


def test_a_later_phase_goes_on_from_its_own_saved_state(run_of, store):
    told: list[Event] = []
    whole, _ = last_checkpoint(run_of(WHOLE, store))
    text = PHASED.replace("{name: middle, steps: 5}", "{name: middle, steps: 5, checkpoints: [2, 4]}")
    phased, _ = last_checkpoint(run_of(text, store, show=told.append))
    assert same(whole, phased)
    assert steps_computed(told) == 16, "each checkpoint goes on from the one before"


def test_what_is_trained_once_more_is_told_as_it_happens(run_of, store, caplog):
    """A finished run keeps no optimizer's state unless it is asked to; a phase that wants it trains it again."""
    trunk = BASE + "  schedule: {name: constant, warmup: 0.25}\n  steps: 8\n"
    run_of(trunk, store)
    run_of(trunk + "  phases: [{name: end, steps: 3}]\n", store)
    assert "8 steps are trained once more: a finished run's optimizer state was not kept" in caplog.text


def run_and_die(path: str, store: str, told: Path, kinds: list[tuple[str, str]]) -> None:
    """Runs a sweep inline, and is killed at the first event of one of these kinds; notes what stages tell."""

    def show(event) -> None:
        if isinstance(event, StageProgress) and event.at.num_tokens:
            with told.open("a") as file:
                file.write(json.dumps([event.stage, event.at.num_tokens]) + "\n")
        if isinstance(event, StageEvent) and (event.event, event.kind) in kinds:
            os.kill(os.getpid(), signal.SIGKILL)

    run_sweep(load(path), Store(store), runner="inline", show=show)


def test_a_kill_between_stages_loses_nothing(run_of, store, tmp_path):
    whole, _ = last_checkpoint(run_of(WHOLE, Store(tmp_path / "whole")))
    path, told = tmp_path / "phased.yaml", tmp_path / "told.jsonl"
    path.write_text(PHASED)
    deaths = [("finished", "pretrain"), ("finished", "pretrain"), ("finished", "optimizer_state")]
    deaths += [("finished", "pretrain"), ("started", "optimizer_state")]
    for death in deaths:
        process = forked.Process(target=run_and_die, args=(str(path), store.url, told, [death]))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, death
    phased, _ = last_checkpoint(run_of(PHASED, store))
    assert same(whole, phased)
    lines = [json.loads(line) for line in told.read_text().splitlines()]
    assert sum(num for _, num in lines) <= 16 * 40, "no step was taken twice"


@pytest.mark.slow
@pytest.mark.ray
def test_on_ray_a_trunk_is_begun_once_and_no_gang_waits_for_it(run_of, store, tmp_path):
    told: list[Event] = []
    run = run_of(DECAYS + "resources: {workers: 1, max_concurrent: 2}\n", store, runner="tune", show=told.append)
    assert steps_computed(told) == 20 + 4 * 2
    begun = Counter(event.stage for event in told if event.event == "started" and event.kind == "pretrain")
    assert set(begun.values()) == {1}, "a trial that waits in its gang would have begun it, too"
    inline = run_of(DECAYS, Store(tmp_path / "inline"))
    assert results_of(run) == results_of(inline)


ONWARDS = """\
name: onwards
pretrain:
  start: one
  data: {name: text, domains: {notes: {train: notes.txt, valid: notes.txt}}}
  optimizer: {name: adamw, lr: 1e-3}
  steps: 4
  batch_sequences: 4
  sequence_length: 16
"""


@pytest.fixture
def models(tmp_path) -> Path:
    """A folder with two small GPT-2 and text."""
    text = "The quick brown fox jumps over the lazy dog. " * 60
    (tmp_path / "notes.txt").write_text(text)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([text], 300, special_tokens=["<e>"])
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        config = GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=64, resid_pdrop=0.0)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<e>")
        tokenizer.save_pretrained(tmp_path / name)
    return tmp_path


def test_training_goes_on_from_a_checkpoint_that_exists(run_of, models, store):
    run = run_of(ONWARDS.replace("steps: 4", "steps: 4\n  phases: [{name: more, steps: 2}]"), store)
    (trial,) = run.trials()
    ids = {stage.kind: stage.id for stage in trial.stages}
    tokens = Tokens(store.folder(ids["tokenize"]))
    first = torch.tensor(tokens.batches({"notes": 1.0}, sequence_length=16, seed=0).batch(0, 4))
    folder, metrics = last_checkpoint(run)
    model = AutoModelForCausalLM.from_pretrained(models / "one").eval()
    with torch.no_grad():
        expected = float(model(input_ids=first, labels=first).loss)
    curve = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    # In training GPT-2 drops a tenth of its embeddings and attention: the loss of 60 tokens moves by a few hundredths.
    assert curve[0]["loss_nats_per_token"] == pytest.approx(expected, abs=0.1)
    assert [line["step"] for line in curve] == [1, 2, 3, 4, 5, 6]
    assert metrics["num_tokens"] == 6 * 64
    names = [json.loads((each / "tokenizer.json").read_text())["model"] for each in (models / "one", folder)]
    assert names[0] == names[1]
    assert not same(models / "one", folder)


def test_checkpoints_to_start_from_are_an_axis(run_of, models, store):
    run = run_of(ONWARDS + "sweep:\n  pretrain.start: {grid: [one, two]}\n", store)
    table = checkpoint_table(run)
    assert list(table["point.pretrain.start"]) == ["one", "two"] or list(table["point.pretrain.start"]) == [
        "two",
        "one",
    ]
    assert table["heldout/ppl"].nunique() == 2
    moved = models / "elsewhere"
    (models / "one").rename(moved)
    again = load_text(models, ONWARDS.replace("start: one", f"start: {moved}"))
    assert again.trial({}, 0).stages[-2].id in {stage.id for trial in run.trials() for stage in trial.stages}


def load_text(folder: Path, text: str):
    (folder / "again.yaml").write_text(text)
    return load(folder / "again.yaml")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("start: one", "start: three", "'three' is no folder here, and cannot be looked up as a hub id"),
        ("steps: 4", "steps: 4\n  model: {name: llama}", "start 'one' has an architecture of its own; remove model"),
    ],
)
def test_a_start_that_cannot_be_is_named(models, monkeypatch, old, new, said):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RaysweepError, match=said):
        load_text(models, ONWARDS.replace(old, new))


def test_more_positions_than_a_start_has_are_named(models, store, tmp_path):
    space = load_text(models, ONWARDS.replace("sequence_length: 16", "sequence_length: 128"))
    run = run_sweep(space, store, runner="inline")
    (failure,) = run.failures()
    assert (
        "sequence_length 128 takes 128 positions, and the checkpoint that training starts from has 64"
        in failure["cause"]
    )


def test_another_objective_and_optimizer_finish_a_run(run_of, store):
    """UL2 behind a causal trunk: its tokens are new rows; then AdamW's state is kept, with zeros for them."""
    text = PHASED.replace("{name: middle, steps: 5}", "{name: middle, steps: 5, objective: {name: ul2}}").replace(
        "{name: end, steps: 3}", "{name: end, steps: 3, optimizer: {name: sgd, lr: 0.1}, optimizer_state: fresh}"
    )
    run = run_of(text, store)
    folders = {stage.step: store.folder(stage.id) for stage in run.trials()[0].stages if stage.kind == "pretrain"}
    rows = {
        step: load_file(folder / "model.safetensors")["model.embed_tokens.weight"] for step, folder in folders.items()
    }
    assert len(rows[16]) > len(rows[4]) == 17
    _, metrics = last_checkpoint(run)
    assert metrics["num_parameters"] > 0


CURRICULUM = """\
name: curriculum
pretrain:
  data: {name: text, domains: {notes: {train: notes.txt, valid: notes.txt}}, tokenizer: {name: bpe, vocab_size: 300}}
  model: {name: llama, hidden_size: 16, num_layers: 1, num_heads: 2}
  optimizer: {name: adamw, lr: 1e-2}
  schedule: {name: constant}
  batch_sequences: 4
  sequence_length: 16
  phases:
    - {name: plain, steps: 3}
    - {name: both, steps: 3, data: {domains: {tales: {train: tales.txt, valid: tales.txt}}}}
    - {name: tales, steps: 3, sequence_length: 32, data: {mix: {notes: 0.1, tales: 0.9}}}
"""


def test_a_phase_may_tag_documents_where_the_first_has_rows_for_the_tags(run_of, models, store):
    tagged = CURRICULUM.replace("train: tales.txt", 'tag: "<|tale|>", train: tales.txt')
    (models / "tales.txt").write_text("Once upon a time a dog and a fox met. " * 60)
    with pytest.raises(RaysweepError, match="text with a vocabulary of 301 cannot follow text with 300"):
        load_text(models, tagged)
    run = run_of(tagged.replace("vocab_size: 300}", 'vocab_size: 300}, later_tags: ["<|tale|>"]'), store)
    (trial,) = run.trials()
    ends = [store.folder(stage.id) for stage in trial.stages if stage.kind == "pretrain"]
    assert {len(load_file(end / "model.safetensors")["model.embed_tokens.weight"]) for end in ends} == {301}
    *_, last = (Tokens(store.folder(stage.id)) for stage in trial.stages if stage.kind == "tokenize")
    tag = load_tokenizer(last.tokenizer_dir).convert_tokens_to_ids("<|tale|>")
    assert tag in last.sequences("tales", "train", 16)


def test_a_phase_of_other_text_is_read_by_the_tokenizer_of_the_first(run_of, models, store):
    (models / "tales.txt").write_text("Once upon a time a dog and a fox met. " * 60)
    run = run_of(CURRICULUM, store)
    (trial,) = run.trials()
    tokens = [store.folder(stage.id) for stage in trial.stages if stage.kind == "tokenize"]
    assert len(tokens) == 2, "of the text of the first phase, and of both"
    texts = [(folder / "tokenizer/tokenizer.json").read_text() for folder in tokens]
    assert texts[0] == texts[1]
    folder, metrics = last_checkpoint(run)
    assert metrics["num_tokens"] == (3 + 3) * 64 + 3 * 128
    assert (folder / "tokenizer.json").read_text() == texts[0]
    heldout = next(store.get(stage.id) for stage in trial.stages if stage.kind == "heldout")
    assert {"ppl_notes", "ppl_tales"} <= heldout.metrics.keys()


def test_data_of_a_phase_is_an_axis(models):
    (models / "tales.txt").write_text("Once upon a time a dog and a fox met. " * 60)
    axis = """\
sweep:
  pretrain.phases.tales.data:
    grid:
      less: {mix: {notes: 0.9, tales: 0.1}}
      other: {domains: {more: {train: tales.txt, valid: notes.txt}}, mix: {notes: 0, tales: 0, more: 1}}
"""
    space = load_text(models, CURRICULUM + axis)
    trials = [space.trial(point, 0) for point in space.points()]
    recipes = [[stage.spec.recipe for stage in trial.stages if stage.kind == "pretrain"] for trial in trials]
    assert recipes[0][:2] == recipes[1][:2]
    assert [last.data.mix for *_, last in recipes] == [{"notes": 0.9, "tales": 0.1}, {"more": 1.0}]
    assert all(domain.fingerprint for *_, last in recipes for domain in last.data.domains_.values())
