"""A stage that runs out of memory for real is tried again with less, and its record says so."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tiny import TINY

from raysweep.runners.out_of_memory import is_out_of_memory, note_out_of_memory, times_out_of_memory
from raysweep.worker import StateDir, Worker

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
SCRIPT = """
import json, resource, sys
from raysweep import load
from raysweep.runners import run_sweep
from raysweep.store import Store

store = Store(sys.argv[1])
run_sweep(load(sys.argv[2]), store, runner="inline")  # So that all is imported.
held = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (held + 600 * 2**20, resource.RLIM_INFINITY))
events = []
run = run_sweep(load(sys.argv[3]), store, runner="inline", show=events.append)
stage = next(stage for trial in run.trials() for stage in trial.stages if stage.kind == "pretrain")
causes = [event["cause"] for event in events if event["event"] == "failed"]
print(json.dumps({"provenance": store.get(stage.id).provenance, "causes": causes}))
"""


def test_micro_batches_are_halved_where_they_do_not_fit(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY[: TINY.index("sweep:")].replace("[6, 12]", "[1]"))
    (tmp_path / "large.yaml").write_text(LARGE)
    files = [str(tmp_path / name) for name in ("store", "tiny.yaml", "large.yaml")]
    # So that the limit is of what is in use: by default the C library keeps freed blocks of these sizes.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
    ended = subprocess.run([sys.executable, "-c", SCRIPT, *files], capture_output=True, text=True, env=env)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout.splitlines()[-1])
    (cause,) = told["causes"]
    assert "DefaultCPUAllocator: can't allocate memory" in cause
    assert cause.endswith("if tried again, it trains in smaller micro-batches, or recomputes activations")
    assert (told["provenance"]["micro_batch_divisor"], told["provenance"]["gradient_checkpointing"]) == (2, False)


def test_each_time_it_takes_less(tmp_path):
    def ways(worker):
        tries = map(worker.saving_memory, range(4))
        return [(each.micro_batch_divisor, each.gradient_checkpointing) for each in tries]

    assert ways(Worker()) == [(1, False), (2, False), (2, True), (4, True)]
    assert ways(Worker(gradient_checkpointing=True)) == [(1, True), (2, True), (4, True), (8, True)]
    assert ways(Worker(micro_batch_sequences=1))[:2] == [(1, False), (1, True)]
    states = StateDir(tmp_path)
    for times in range(3):
        assert times_out_of_memory(states) == times
        note_out_of_memory(states, times)
        note_out_of_memory(states, times)  # Of another rank.


def test_what_is_lack_of_memory():
    with pytest.raises(RuntimeError) as ended:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(ended.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    outer = RuntimeError("step 3")
    outer.__cause__ = MemoryError()
    assert is_out_of_memory(outer)
    assert not is_out_of_memory(ValueError("memory"))
