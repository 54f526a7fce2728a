"""Peak resident memory of stages beside what the plan says: `python tests/benchmarks/memory.py [WORDS OF A ROW]`.

Each stage runs in processes of its own, one a worker. Measured is the peak of a worker's resident memory above what it
held after the same stage of a tiny model, with all that is imported for it; of several workers that of the one with
most.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from raysweep.estimates import size_of
from raysweep.resources import Resources
from raysweep.runners.processes import LOOPBACK, join_process_group, leave_process_group, make_worker
from raysweep.space import load
from raysweep.worker import StateDir

SWEEP = """\
name: memory
pretrain:
  data: {{name: pcfg, vocabulary: {vocabulary}, num_nonterminals: 8, num_rules: 4, num_words: 16,
         sentence_length: {length}, num_train_sentences: 100, num_valid_sentences: 16}}
  model: {model}
  objective: {objective}
  optimizer: {{name: adamw, lr: 1e-3}}
  steps: 2
  batch_sequences: {sequences}
  sequence_length: {rows}
flatness: {flatness}
sft:
  tasks: {{span: {{form: pcfg_span, span: 2, num_train: 16, num_valid: 8, num_test: 8}}}}
  lrs: [1e-5]
  hyperparameters: {{epochs: 1, batch_sequences: 8}}
"""
LLAMA = "{name: llama, hidden_size: 384, num_layers: 8, num_heads: 6}"
SMALL = "{name: llama, hidden_size: 256, num_layers: 4, num_heads: 4}"
BERT = "{name: bert, hidden_size: 384, num_layers: 8, num_heads: 6, num_positions: 1024}"
GPT2 = (
    "{name: transformers, architecture: GPT2LMHeadModel, fields: {n_embd: 384, n_layer: 8, n_head: 6, "
    "resid_pdrop: 0.0, embd_pdrop: 0.0, attn_pdrop: 0.0}}"
)

# Of each, one that takes nothing.
TINY = {model: model.replace("384", "12").replace("256", "8") for model in (LLAMA, SMALL, BERT, GPT2)}


@dataclass(frozen=True)
class Case:
    """A stage of a sweep, on one gang."""

    name: str
    kind: str = "pretrain"
    model: str = LLAMA
    sequences: int = 8
    length: int = 128
    vocabulary: int = 4096
    objective: str = "{name: causal_lm}"
    flatness: str = "{num_sequences: 8, min_units: 2, max_units: 2}"
    resources: Resources = field(default_factory=Resources)

    @property
    def sweep(self) -> str:
        """The sweep file."""
        given = {name: getattr(self, name) for name in ("vocabulary", "model", "objective", "sequences", "flatness")}
        return SWEEP.format(**given, length=self.length, rows=self.length + 1)


def _flat(products: str) -> str:
    return f"{{num_sequences: 8, batch_sequences: 2, min_units: 2, max_units: 2, products: {products}}}"


CASES = (
    Case("Llama"),
    Case("Llama, gradient checkpointing", resources=Resources(gradient_checkpointing=True)),
    Case("Llama, micro-batches of 2", resources=Resources(micro_batch_sequences=2)),
    Case("Llama, 2 sequences of 512", sequences=2, length=512),
    Case("small Llama, 16,384 words", model=SMALL, vocabulary=16384, sequences=4),
    Case("BERT, masked_lm", model=BERT, objective="{name: masked_lm}"),
    Case("GPT-2", model=GPT2),
    Case("Llama, 2 workers, no ZeRO", resources=Resources(workers=2)),
    Case("Llama, 2 workers, ZeRO-1", resources=Resources(workers=2, zero_stage=1)),
    Case("Llama, 2 workers, ZeRO-2", resources=Resources(workers=2, zero_stage=2)),
    Case("Llama, 2 workers, ZeRO-3", resources=Resources(workers=2, zero_stage=3)),
    Case("Llama, 2 workers, ZeRO-2, micro-batches of 2",
         resources=Resources(workers=2, zero_stage=2, micro_batch_sequences=2)),
    Case("Llama", kind="sft"),
    Case("Llama", kind="heldout"),
    Case("Llama, logit differences", kind="flatness", flatness=_flat("logit_differences")),
    Case("Llama, gradient differences", kind="flatness", flatness=_flat("gradient_differences")),
    Case("Llama, exact", kind="flatness", flatness=_flat("exact")),
)  # fmt: skip


def main(wanted: str = "") -> Iterator[tuple[str, str]]:
    """A row of each case whose row has these words."""
    for case in CASES:
        what = f"{case.kind}: {case.name}"
        if wanted in what:
            measured, planned = _measured(case)
            yield what, f"{measured / 2**20:.0f} | {planned / 2**20:.0f} | {planned / measured - 1:+.0%}"


def _measured(case: Case) -> tuple[int, int]:
    """Bytes of the worker that takes most, and the plan's."""
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / "tiny", Path(name) / "whole"]
        for folder, each in zip(folders, (replace(case, model=TINY[case.model], sequences=2), case), strict=True):
            folder.mkdir()
            (folder / "memory.yaml").write_text(each.sweep)
            trial = load(folder / "memory.yaml").trial({}, 0)
            stage = next(stage for stage in trial.stages if stage.kind == case.kind)
            needed = [stage]
            for before in reversed(trial.stages):
                if any(before.id in later.inputs.values() for later in needed):
                    needed.append(before)
            for before in reversed(needed[1:]):
                _run([folder], before.kind, Resources())
        peak = _run(folders, case.kind, case.resources)
        size = size_of(trial)
        assert size
        return peak, stage.spec.memory_bytes(size, case.resources)


def _run(folders: list[Path], kind: str, resources: Resources) -> int:
    """Run the stages of a kind on one gang; the peak in bytes, in the last, of the worker that takes most."""
    with socket.create_server((LOOPBACK, 0)) as free:
        port = free.getsockname()[1]
    given = {"folders": list(map(str, folders)), "kind": kind, "resources": resources.model_dump_json(), "port": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, "--rank", json.dumps({**given, "rank": rank})],
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(resources.workers)
    ]
    answers = [rank.communicate()[0] for rank in ranks]
    assert not any(rank.returncode for rank in ranks), kind
    return max(int(answer.splitlines()[-1]) for answer in answers)


def rank_main(given: dict[str, Any]) -> None:
    """One worker: runs the stage in each folder, and prints the last one's peak in bytes."""
    resources = Resources.model_validate_json(given["resources"])
    worker = make_worker(resources, rank=given["rank"], world_size=resources.workers)
    join_process_group(worker, resources, LOOPBACK, given["port"])
    for folder in map(Path, given["folders"]):
        trial = load(folder / "memory.yaml").trial({}, 0)
        stage = next(stage for stage in trial.stages if stage.kind == given["kind"])
        inputs = {role: folder / stage_id for role, stage_id in stage.inputs.items()}
        out = folder / stage.id
        out.mkdir(exist_ok=True)
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # Begins to count the peak anew.
        stage.spec.run(inputs, out, replace(worker, state_dir=StateDir(folder / "state")))
    print(_resident("VmHWM") - before)
    leave_process_group()


def _resident(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank_main(json.loads(sys.argv[2]))
    else:
        print("| stage, on 2 cores | measured, MiB | planned, MiB | |\n| --- | --- | --- | --- |")
        for what, result in main(" ".join(sys.argv[1:])):
            print(f"| {what} | {result} |", flush=True)
