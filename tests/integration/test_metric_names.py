"""What stages say they report, against what they report: a metric that is not declared cannot be searched for."""

import json

import pytest
from tiny import TINY

from raysweep.runners.chain import run_chain
from raysweep.runners.gang import Gang
from raysweep.space import load

GRAMMAR = TINY.replace(
    "max_units: 8}",
    "max_units: 8, own_samples: 4, parts: true, num_blocks: 2, rescaled: true, "
    "shape: {num_steps: 4, num_eigenvalues: 2}}\n"
    "probes: {num_labels: [8, 20], num_draws: 2, layers: [0, 1]}\n"
    "noise: {num_draws: 2, per_row: [0.1]}\n"
    "updates: {batch_sequences: 8, num_batches: 2, hyperparameters: {max_examples: 16}}\n"
    "early_sft: {hyperparameters: {max_examples: 16}}\n"
    "span_loss: {}\n"
    "gradient_noise: {num_batches: 4}\n"
    "quantization: {}\n"
    "curve: {}\n"
    "features: {}",
).replace("sft:\n", "sft:\n  forgetting: true\n")
TEXT = """\
name: text
pretrain:
  data:
    name: text
    domains: {a: {train: a.txt, valid: a.txt}, b: {train: b.txt, valid: b.txt}}
    mix: {a: 1.0}
    tokenizer: {name: bpe, vocab_size: 300}
  model: {name: llama, hidden_size: 16, num_layers: 1, num_heads: 2}
  optimizer: {name: adamw, lr: 1e-2}
  steps: 2
  batch_sequences: 4
  sequence_length: 16
indicators: {kshot: 1, max_examples: 4}
updates: {batch_sequences: 4, num_batches: 2, hyperparameters: {max_examples: 4}}
early_sft: {hyperparameters: {epochs: 1, max_examples: 4}}
other_text: {texts: {b: {files: b.txt}, both: {files: ["a.txt", "b.txt"]}}}
sft:
  forgetting: true
  tasks:
    quiz: {form: multiple_choice, train: quiz.jsonl, test: quiz.test.jsonl, max_test_examples: 6}
    ask: {form: qa, train: ask.jsonl, test: ask.test.jsonl, max_test_examples: 4, max_new_tokens: 4}
  hyperparameters: {epochs: 1, batch_sequences: 4}
"""


@pytest.fixture
def folder(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"The quick {name} fox jumps over the lazy dog. " * 60)
    quiz = [{"question": f"fox {i}", "choices": ["dog", "fox"], "answer": i % 2} for i in range(36)]
    ask = [{"question": f"who {i}", "answers": ["fox", "a fox"]} for i in range(36)]
    for name, lines in (("quiz", quiz), ("ask", ask)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines[12:])))
        (tmp_path / f"{name}.test.jsonl").write_text("\n".join(map(json.dumps, lines[:12])))
    return tmp_path


def declared_and_reported(path, store) -> set[str]:
    """Checks each stage of the base trial, and each checkpoint's columns; returns the kinds of stage seen."""
    space = load(path)
    trial = space.trial({}, 0)
    gang = Gang(store, space.resources.default, report=lambda event: None)
    legs = list(run_chain(trial, gang, max_retries=0, report=lambda event: None))
    gang.close()
    corpus = trial.stages[0].spec.corpus if trial.stages[0].kind == "tokenize" else trial.stages[1].spec.corpus
    for stage in trial.stages:
        record = store.get(stage.id)
        assert record is not None, f"{stage.kind} failed"
        assert sorted(metric.name for metric in stage.spec.metrics(corpus)) == sorted(record.metrics), stage.kind
        # Beside what a record holds of every stage, how it went by this stage's own clock.
        own = {name for name in record.provenance if name.endswith(("_per_second", "_seconds"))} - {"wall_seconds"}
        assert own == {metric.name for metric in stage.spec.timings}, stage.kind
    for leg in legs:
        assert sorted(leg.metrics) == sorted(column.name for column in trial.columns_at(leg.step))
    return {stage.kind for stage in trial.stages}


def test_every_stage_reports_what_it_declares(sweep_file, folder, store):
    kinds = declared_and_reported(sweep_file(GRAMMAR), store)
    assert kinds == {
        "tokenize",
        "pretrain",
        "heldout",
        "probe",
        "sft",
        *load(sweep_file(GRAMMAR)).declared.measurements,
    }
    kinds = declared_and_reported(sweep_file(TEXT), store)
    assert kinds == {"tokenize", "pretrain", "heldout", "indicators", "updates", "early_sft", "other_text", "sft"}


def test_phases_report_what_they_declare(sweep_file, store):
    phases = "phases: [{name: on, steps: 2}, {name: off, steps: 1}]"
    text = TINY[: TINY.index("indicators:")].replace("steps: 12", phases).replace("  checkpoints: [6, 12]\n", "")
    assert "optimizer_state" in declared_and_reported(sweep_file(text), store)


def test_a_checkpoint_that_exists_reports_what_it_declares(sweep_file, folder, store):
    space = load(sweep_file(TEXT))
    trial = space.trial({}, 0)
    gang = Gang(store, space.resources.default, report=lambda event: None)
    next(run_chain(trial, gang, max_retries=0, report=lambda event: None))
    gang.close()
    checkpoint = store.folder(next(stage.id for stage in trial.stages if stage.kind == "pretrain"))
    text = f"""\
name: theirs
pretrain:
  from: {checkpoint}
  data: {{name: text, domains: {{a: {{train: a.txt, valid: a.txt}}}}}}
  sequence_length: 16
"""
    kinds = declared_and_reported(sweep_file(text + TEXT[TEXT.index("indicators:") :]), store)
    assert kinds == {"fetch", "tokenize", "heldout", "indicators", "updates", "early_sft", "other_text", "sft"}
