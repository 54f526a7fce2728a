"""Few-shot scores of text tasks: their means by family, and how many prompts did not fit."""

import json
from statistics import fmean

import pytest

from raysweep.errors import SpaceError
from raysweep.results import Results
from raysweep.runners import run_sweep
from raysweep.space import load
from raysweep.spec import canonical

# A model of 64 positions: a question alone fits, not with nine solved ones.
SWEEP = """\
name: shots
pretrain:
  data: {name: text, domains: {notes: {train: notes.txt, valid: notes.txt}}, tokenizer: {name: bpe, vocab_size: 300}}
  model:
    name: transformers
    architecture: GPT2LMHeadModel
    fields: {n_embd: 16, n_layer: 1, n_head: 2, n_positions: 64}
  optimizer: {name: adamw, lr: 1e-2}
  steps: 4
  batch_sequences: 4
  sequence_length: 8
indicators: {kshot: 9}
sft:
  families: {ask: [first, second], pick: [third]}
  tasks:
    first: {form: qa, train: first.jsonl, test: test.jsonl, max_new_tokens: 4}
    second: {form: qa, train: second.jsonl, test: test.jsonl, max_new_tokens: 4}
    third: {form: multiple_choice, train: third.jsonl, test: picks.jsonl}
"""


def write(folder, name, lines):
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "notes.txt").write_text("Question: la si do re mi fa sol\nAnswer: la " * 200)
    for name in ("first", "second", "test"):
        write(tmp_path, f"{name}.jsonl", [{"question": f"{name} la {n}", "answers": ["la", "si"]} for n in range(20)])
    for name in ("third", "picks"):
        lines = [{"question": f"{name} la {n}", "choices": ["la", "si do"], "answer": n % 2} for n in range(20)]
        write(tmp_path, f"{name}.jsonl", lines)
    return tmp_path


def test_prompts_that_did_not_fit_are_counted_and_families_have_means(folder, sweep_file, store):
    text = SWEEP.replace("kshot: 9", "kshot: 9, kshot_by_task: {second: 1}")
    text += "  seeds: [0]\n  hyperparameters: {epochs: 1}\n"
    run = run_sweep(load(sweep_file(text)), store, runner="inline")
    [row] = Results(run).checkpoints.to_dict("records")
    for task in ("first", "second", "third"):
        assert row[f"indicators/{task}/zeroshot_num_cut"] == 0
        # A tenth of the 20 validate, and as many are left for indicators; with one solved question before it one fits.
        assert row[f"indicators/{task}/kshot_num_cut"] == (0 if task == "second" else 2)
    for name in ("zeroshot", "kshot", "zeroshot_log_likelihood", "kshot_log_likelihood"):
        members = [row[f"indicators/{task}/{name}"] for task in ("first", "second")]
        assert row[f"indicators/ask/{name}"] == pytest.approx(fmean(members), rel=1e-12)
        assert row[f"indicators/pick/{name}"] == row[f"indicators/third/{name}"]
    columns = {column.name: column.metric for column in run.columns()}
    assert columns["indicators/ask/kshot_log_likelihood"].direction == "max"
    assert columns["indicators/third/kshot_num_cut"].direction is None


def test_only_tasks_with_classes_have_the_version_of_their_scores(folder, sweep_file):
    """Results of others are what they were, and so are their ids."""
    for name in ("learn", "classes"):
        write(folder, f"{name}.jsonl", [{"text": f"{name} la {n}", "label": n % 2} for n in range(20)])
    told = "    fourth: {form: classification, train: learn.jsonl, test: classes.jsonl}\n"
    found = []
    for more in ("", told):
        space = load(sweep_file(SWEEP + more))
        trial = space.trial(next(iter(space.points())), 0)
        [spec] = [stage.spec for stage in trial.stages if stage.kind == "indicators"]
        found.append(canonical(spec).get("class_version"))
    assert found == [None, 2]


def test_shots_of_a_task_that_there_is_not_are_refused(folder, sweep_file):
    text = SWEEP.replace("kshot: 9", "kshot: 9, kshot_by_task: {secund: 1}")
    with pytest.raises(SpaceError, match=r"kshot_by_task\.secund: sft has no task 'secund', did you mean 'second'"):
        load(sweep_file(text))


@pytest.mark.parametrize(
    ("families", "words"),
    [
        ("{ask: [first, secund]}", r"sft\.families\.ask: sft has no task 'secund', did you mean 'second'"),
        ("{first: [first]}", r"sft\.families\.first: first is a task of sft"),
        ("{ask: [first, first]}", r"ask: \['first', 'first'\]: name one or more tasks, each once"),
        ("{a/b: [first]}", "family name 'a/b'"),
    ],
)
def test_families_of_tasks_that_there_are_not_are_refused(folder, sweep_file, families, words):
    text = SWEEP.replace("{ask: [first, second], pick: [third]}", families)
    with pytest.raises(SpaceError, match=words):
        load(sweep_file(text))
