"""A sweep that takes seconds, its stages one by one, and what of a run must not depend on how it went."""

import socket
from dataclasses import replace
from pathlib import Path

from raysweep.data.corpora import Corpus
from raysweep.data.pcfg import PCFG
from raysweep.record import Record
from raysweep.run_files import StageRow, TrialRow
from raysweep.runners.room import Gangs, Shape, View
from raysweep.runs import Run
from raysweep.stages.pretrain import Pretrain, Recipe
from raysweep.stages.tokenize import Tokenize
from raysweep.store import Store
from raysweep.train.models import Llama
from raysweep.train.optimizers import AdamW
from raysweep.worker import StateDir, Worker

GRAMMAR = PCFG(
    num_words_total=16,
    num_nonterminals=4,
    num_rules=2,
    num_words=3,
    sentence_length=4,
    num_train_sentences=400,
    num_valid_sentences=40,
)
TINY = """\
name: tiny
pretrain:
  data: {name: pcfg, vocabulary: 16, num_nonterminals: 4, num_rules: 2, num_words: 3, sentence_length: 4,
         num_train_sentences: 400, num_valid_sentences: 40}
  model: {name: llama, hidden_size: 16, num_layers: 1, num_heads: 2}
  optimizer: {name: adamw, lr: 1e-2}
  steps: 12
  batch_sequences: 8
  sequence_length: 5
  checkpoints: [6, 12]
sweep:
  pretrain.optimizer.lr: {grid: [1e-2, 3e-3]}
flatness: {num_sequences: 16, batch_sequences: 2, min_units: 4, max_units: 8}
indicators: {kshot: 2, max_examples: 20}
sft:
  tasks:
    span: {form: pcfg_span, span: 2, num_train: 40, num_valid: 20, num_test: 20}
  lrs: [1e-3, 1e-2]
  hyperparameters: {epochs: 1}
"""

LONGER = TINY.replace("steps: 12", "steps: 240").replace("[6, 12]", "[120, 240]")
LONGER += "resources: {workers: 2, zero_stage: 2, max_retries: 2}\n"
"""In gangs of two, with time for something to happen to them; see `undisturbed`."""

# A training step of 256 sequences at once takes about 0.75 GB for activations, and one of 128 half of that.
LARGE = """\
name: large
pretrain:
  data: {name: pcfg, vocabulary: 16, num_nonterminals: 4, num_rules: 2, num_words: 3, sentence_length: 128,
         num_train_sentences: 300, num_valid_sentences: 8}
  model: {name: llama, hidden_size: 32, num_layers: 8, num_heads: 1}
  optimizer: {name: adamw, lr: 1e-3}
  steps: 1
  batch_sequences: 256
  sequence_length: 129
"""

NOTES = """\
name: notes
pretrain:
  data: {name: text, domains: {notes: {train: notes.txt, valid: notes.txt}}, tokenizer: {name: bpe, vocab_size: 300}}
  model: {name: llama, hidden_size: 16, num_layers: 1, num_heads: 2}
  optimizer: {name: adamw, lr: 1e-2}
  steps: 4
  batch_sequences: 4
  sequence_length: 8
"""
"""A pretraining on the text of a file, notes.txt, that lies beside the sweep file."""

TRUNK = TINY[: TINY.index("  steps:")] + TINY[TINY.index("  batch_sequences:") : TINY.index("  checkpoints:")]
"""Of it what is pretrained, without a number of steps."""


def recipe_of(corpus: Corpus, **changes: object) -> Recipe:
    """A recipe of seconds, for sentences of four words."""
    given = {
        "data": corpus,
        "model": Llama(hidden_size=16, num_layers=2, num_heads=2),
        "optimizer": AdamW(lr=1e-2),
        "steps": 12,
        "batch_sequences": 6,
        "sequence_length": 5,
    }
    return Recipe(**(given | changes))


def tokens_of(corpus: Corpus, folder: Path) -> Path:
    """A new tokens folder."""
    folder.mkdir()
    Tokenize(corpus=corpus).run({}, folder, Worker())
    return folder


def pretrain(
    recipe: Recipe, tokens: Path, out: Path, *, step: int, state: Path | None = None, worker: Worker | None = None
) -> dict[str, float]:
    """The stage's metrics; the checkpoint is in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    worker = replace(worker or Worker(), state_dir=state and StateDir(state))
    return Pretrain(recipe=recipe, seed=0, step=step).run({"tokens": tokens}, out, worker)


def results_of(run: Run) -> dict[str, object]:
    """All that must not depend on how a run went: metrics and files of every finished stage."""
    ids = {stage.id for trial in run.trials() for stage in trial.stages}
    found = {}
    for stage_id in sorted(ids):
        record = run.store.get(stage_id)
        assert record is not None, f"{stage_id} is not finished"
        files = {name: entry["sha256"] for name, entry in record.files.items()}
        found[stage_id] = (dict(record.metrics), files)
    return found


EMPTY = Record(id="x-1", kind="x", status="done", spec={"a": 1}, inputs={}, metrics={"m": 0.5}, provenance={}, files={})


def put(store: Store, stage_id: str = "x-1", text: str = "weights") -> Record:
    """A finished stage of one file."""
    with store.claim(stage_id):
        out = store.work_dir(stage_id)
        (out / "sub").mkdir()
        (out / "sub" / "file").write_text(text)
        return store.commit(replace(EMPTY, id=stage_id), out)


def row(trial: str) -> TrialRow:
    """A started trial of one stage."""
    stage = StageRow(id="x-1", kind="x", step=None, checkpoint=None, task=None, inputs={})
    return TrialRow(trial=trial, variant=f"of-{trial}", point={"a": 1}, seed=0, stages=(stage,))


ONE_CPU = Shape(workers=1, cpus=1, gpus=0)


def roomy(max_concurrent: int | None = None) -> Gangs:
    """A cluster with room for 64 gangs of `ONE_CPU`."""
    return Gangs(lambda: View({"node": {"CPU": 64.0}}, {}), max_concurrent=max_concurrent, may_grow=False)


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
