"""A stage that runs out of memory for real is tried again with less, and its record says so."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hosts import shared_extensions
from tiny import LARGE, TINY, free_port

from raysweep.runners.attempts import make
from raysweep.runners.out_of_memory import is_out_of_memory, note_out_of_memory, times_out_of_memory
from raysweep.space import load
from raysweep.store import Store
from raysweep.worker import StateDir, Worker

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
causes = [event.cause for event in events if event.event == "failed"]
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


RANK = """
import json, os, resource, sys
from raysweep.plan import Stage
from raysweep.resources import Resources
from raysweep.runners.attempts import attempt, fetch_inputs
from raysweep.runners.processes import join_process_group, make_worker
from raysweep.stages.pretrain import Pretrain
from raysweep.store import Store

rank, port, url, *stages = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
resources, store = Resources(workers=2, zero_stage=2), Store(url)
worker = make_worker(resources, rank=rank, world_size=2)
join_process_group(worker, resources, "127.0.0.1", port)
given = map(json.loads, stages)
small, large = (Stage(Pretrain.model_validate_json(spec), {"tokens": tokens}) for spec, tokens in given)
for stage in (small, large):  # The first so that all is imported.
    if rank == 0:
        store.work_dir(stage.id)
    assert fetch_inputs(stage, store) is None
    worker.barrier()
    if rank == 1 and stage is large:
        held = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmSize"))
        # Of its activations, 380 MB of half the batch and 190 MB of a quarter, the former do not fit.
        resource.setrlimit(resource.RLIMIT_AS, (held + 280 * 2**20, resource.RLIM_INFINITY))
    outcome = attempt(stage, store, worker)
print(getattr(outcome, "cause", "done"), flush=True)
os._exit(0)  # A gang that cannot go on is ended so, too.
"""


def run_gang(url, caches, stages, env) -> list[str]:
    """A gang of two tries the last stage; what came of it on rank 1, and on rank 0 where that is not stuck then."""
    written = [json.dumps([stage.spec.model_dump_json(by_alias=True), stage.inputs["tokens"]]) for stage in stages]
    command, port = [sys.executable, "-W", "ignore", "-c", RANK], str(free_port())
    ranks = [
        subprocess.Popen(
            [*command, str(rank), port, url, *written],
            env=env | {"XDG_CACHE_HOME": str(cache)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, cache in enumerate(caches)
    ]
    said = []
    try:
        for rank in reversed(ranks):
            # Rank 0 may wait for ever for one that failed: the gang's watch ends it then.
            out, logged = rank.communicate(timeout=120 if not said or said[0] == "done" else 2)
            assert rank.returncode == 0, logged[-3000:]
            said.append(out.splitlines()[-1])
    except subprocess.TimeoutExpired:
        assert said, "rank 1 is stuck"
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    return said


@pytest.mark.slow
def test_a_gang_of_which_one_rank_runs_out_takes_less_together(tmp_path, monkeypatch):
    """Two ranks under ZeRO-2 with caches of their own: of a URL, they share nothing but what is behind it."""
    env = os.environ | shared_extensions() | {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "driver"))
    (tmp_path / "large.yaml").write_text(LARGE)
    tokens, large, *_ = load(tmp_path / "large.yaml").trial({}, 0).stages
    small = replace(large, spec=large.spec.with_(recipe=large.spec.recipe.with_(batch_sequences=2)))
    url = f"local://{tmp_path}/url"
    make(tokens, Store(url), Worker())
    caches = [tmp_path / "0", tmp_path / "1"]
    (cause, *_) = run_gang(url, caches, [small, large], env)
    assert "DefaultCPUAllocator: can't allocate memory" in cause
    assert Store(url).get(large.id) is None
    # The next gang has the same room on rank 1, and may be on other hosts.
    assert run_gang(url, [tmp_path / "2", tmp_path / "3"], [small, large], env) == ["done", "done"]
    kept = Store(url).get(large.id).provenance
    assert (kept["world_size"], kept["micro_batch_divisor"], kept["gradient_checkpointing"]) == (2, 2, False)
    assert Store(url).get(small.id).provenance["micro_batch_divisor"] == 1


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
