"""Models of a Hugging Face hub: taken as they are, trained on from, and made anew by their configuration."""

import json

import pytest
import torch
from hub_server import COMMIT, serving
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from raysweep.analysis.tables import checkpoint_table
from raysweep.errors import DataError
from raysweep.runners import run_sweep
from raysweep.space import load

TEXT = "The quick brown fox jumps over the lazy dog. " * 60
DATA = "data: {name: text, domains: {notes: {train: notes.txt, valid: notes.txt}}%s}"
TAKEN = f"""\
name: taken
pretrain:
  from: owner/model
  {DATA % ""}
  sequence_length: 16
flatness: {{num_sequences: 8, batch_sequences: 2, min_units: 4, max_units: 8}}
"""
TRAINED = f"""\
name: trained
pretrain:
  start: owner/model@{COMMIT}
  {DATA % ""}
  optimizer: {{name: sgd, lr: 1e-2}}
  steps: 2
  batch_sequences: 2
  sequence_length: 16
"""
MADE = TRAINED.replace(f"start: owner/model@{COMMIT}", "model: {name: transformers, config: owner/model}").replace(
    DATA % "", DATA % ", tokenizer: {name: bpe, vocab_size: 260}"
)


@pytest.fixture
def model(tmp_path):
    """The folder of the hub's one model, a GPT-2 that says it was trained as a prefix LM."""
    (tmp_path / "notes.txt").write_text(TEXT)
    folder = tmp_path / "model"
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT], 300, special_tokens=["<e>"])
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<e>").save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(folder)
    (folder / "objective.json").write_text(json.dumps({"name": "prefix_lm"}))
    return folder


@pytest.fixture
def hub(model, tmp_path, monkeypatch):
    """What the hub was asked for."""
    with serving({"owner/model": model}, monkeypatch, tmp_path / "cache") as asked:
        yield asked


def load_text(folder, text):
    (folder / "sweep.yaml").write_text(text)
    return load(folder / "sweep.yaml")


def test_a_model_of_the_hub_is_measured_by_the_objective_that_it_records(hub, tmp_path, store):
    run = run_sweep(load_text(tmp_path, TAKEN), store, runner="inline")
    assert run.failures() == []
    [row] = checkpoint_table(run).to_dict("records")
    assert row["perplexity_of"].startswith("prefix_lm")
    assert row["flatness_of"].startswith("prefix_lm")
    assert row["flatness/hessian_trace"] > 0


def test_a_model_that_records_none_is_asked_for_once(hub, model, tmp_path, monkeypatch):
    (model / "objective.json").unlink()
    text = TAKEN.replace("owner/model", f"owner/model@{COMMIT}")
    objective = load_text(tmp_path, text).declared.pretrain.objective
    assert objective.name == "causal_lm"
    # That a commit lacks a file is known from then on, without a network.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load_text(tmp_path, text).declared.pretrain.objective == objective


def test_what_cannot_be_asked_for_has_to_be_said(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text = TAKEN.replace("owner/model", f"owner/model@{COMMIT}")
    with pytest.raises(DataError, match=r"objective\.json cannot be had.*or say by pretrain\.objective"):
        load_text(tmp_path, text)
    said = text.replace("  sequence_length", "  objective: {name: prefix_lm}\n  sequence_length")
    assert load_text(tmp_path, said).declared.pretrain.objective.name == "prefix_lm"


def test_training_goes_on_from_a_model_of_the_hub(hub, model, tmp_path, store):
    space = load_text(tmp_path, TRAINED)
    run = run_sweep(space, store, runner="inline")
    assert run.failures() == []
    before = load_file(model / "model.safetensors")
    end = next(stage for stage in space.trial({}, 0).stages if stage.kind == "pretrain")
    after = load_file(store.folder(end.id) / "model.safetensors")
    assert before.keys() == after.keys()
    # Two steps of a clipped gradient at a rate of 0.01 or less, momentum 0.9: it began at these weights.
    moved = sum(float((after[name] - before[name]).square().sum()) for name in before) ** 0.5
    assert 0 < moved < 0.03


def test_a_model_is_made_anew_by_a_configuration_of_the_hub(hub, tmp_path, store):
    space = load_text(tmp_path, MADE)
    assert not any("safetensors" in each for each in hub), "no weight is read"
    stage = next(stage for stage in space.trial({}, 0).stages if stage.kind == "pretrain")
    assert stage.spec.recipe.model.architecture == "GPT2LMHeadModel"
    run = run_sweep(space, store, runner="inline")
    assert run.failures() == []
    config = json.loads((store.folder(stage.id) / "config.json").read_text())
    assert (config["n_embd"], config["n_layer"], config["n_head"]) == (16, 1, 2)
