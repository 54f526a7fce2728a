"""Checkpoints that raysweep did not make: taken in, measured, fine-tuned and ranked."""

import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from raysweep.analysis.ranking import rank
from raysweep.analysis.tables import checkpoint_table
from raysweep.cli import main
from raysweep.errors import DataError
from raysweep.runners import run_sweep
from raysweep.space import load

SWEEP = """\
name: theirs
pretrain:
  from: one
  data: {name: text, domains: {notes: {train: notes.txt, valid: notes.txt}}}
  sequence_length: 16
sweep:
  pretrain.from: {grid: [one, two]}
flatness: {num_sequences: 8, batch_sequences: 2, min_units: 4, max_units: 8}
indicators: {kshot: 1, max_sequences: 4, max_examples: 4}
sft:
  tasks: {quiz: {form: multiple_choice, train: quiz.jsonl, test: quiz.jsonl, max_test_examples: 6}}
  hyperparameters: {epochs: 1, batch_sequences: 4}
"""


@pytest.fixture
def folder(tmp_path):
    """Two GPT-2 style folders, text, a task and a sweep over them."""
    from tokenizers import ByteLevelBPETokenizer

    text = "The quick brown fox jumps over the lazy dog. " * 60
    (tmp_path / "notes.txt").write_text(text)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([text], 300, special_tokens=["<e>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<e>")
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        config = GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=64)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    lines = [{"question": f"fox {i}", "choices": ["dog", "fox"], "answer": i % 2} for i in range(24)]
    (tmp_path / "quiz.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "theirs.yaml").write_text(SWEEP)
    return tmp_path


def test_two_folders_are_ranked(folder, store):
    run = run_sweep(load(folder / "theirs.yaml"), store, runner="inline")
    assert run.failures() == []
    table = checkpoint_table(run)
    assert len(table) == 2
    assert table["sft/mean_score"].notna().all()
    assert table["flatness/hessian_trace"].nunique() == 2
    assert rank(table).best["point.pretrain.from"] in ("one", "two")


def test_identity_is_the_content_not_the_path(folder):
    before = [load(folder / "theirs.yaml").trial({"pretrain.from": name}, 0).id for name in ("one", "two")]
    (folder / "one").rename(folder / "spare")
    (folder / "two").rename(folder / "one")
    (folder / "spare").rename(folder / "two")
    after = [load(folder / "theirs.yaml").trial({"pretrain.from": name}, 0).id for name in ("one", "two")]
    assert after == before[::-1]


def test_pickled_weights_are_refused(folder):
    (folder / "one" / "model.safetensors").rename(folder / "one" / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"no \*\.safetensors.*never read: pytorch_model\.bin"):
        load(folder / "theirs.yaml")


def test_no_such_folder(folder):
    path = folder / "theirs.yaml"
    path.write_text(SWEEP.replace("from: one", "from: ./nowhere").replace("[one, two]", "[./nowhere]"))
    with pytest.raises(DataError, match="no folder here"):
        load(path)


def test_the_command_line_runs_ranks_and_reports(folder, capsys):
    store = str(folder / "store")
    sweep = str(folder / "theirs.yaml")
    assert main(["plan", sweep, "--store", store, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["num_variants"] == 2
    assert plan["num_stages_done"] == 0
    assert main(["run", sweep, "--store", store, "--runner", "inline", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["failures"] == []
    assert len(done["ranking"]["checkpoints"]) == 2
    assert main(["status", sweep, "--store", store, "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["stages"]["sft"]["done"] == 2
    assert main(["rank", done["folder"]]) == 0
    assert "sft/mean_score" in capsys.readouterr().out
    assert main(["plan", sweep, "--store", store, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_stages_to_do"] == 0


def test_the_command_line_says_what_to_mend(folder, capsys):
    path = folder / "theirs.yaml"
    path.write_text(SWEEP.replace("kshot", "kshots"))
    assert main(["plan", str(path)]) == 2
    assert "theirs.yaml:9: indicators.kshots: no field 'kshots', did you mean 'kshot'" in capsys.readouterr().err
    assert main(["rank", "nothing", "--store", str(folder / "store")]) == 2
    assert "no run 'nothing'" in capsys.readouterr().err
    assert main(["schema"]) == 0
    assert "properties" in json.loads(capsys.readouterr().out)
