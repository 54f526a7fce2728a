"""A stage that runs out of memory for real is tried again with less, and its record says so."""

import ctypes
import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hosts import shared_extensions
from ranks import forked
from tiny import LARGE, TINY, free_port

from raysweep.allocator import M_MMAP_THRESHOLD
from raysweep.plan import Stage
from raysweep.resources import Resources
from raysweep.runners.attempts import attempt, fetch_inputs, make
from raysweep.runners.out_of_memory import is_out_of_memory, note_out_of_memory, times_out_of_memory
from raysweep.runners.processes import join_process_group, make_worker
from raysweep.space import load
from raysweep.stages.pretrain import Pretrain
from raysweep.store import Store
from raysweep.worker import StateDir, Worker

# So that a limit is of what is in use: by default the C library keeps freed blocks of these sizes.
THRESHOLD = "MALLOC_MMAP_THRESHOLD_"
OF_BLOCKS = {THRESHOLD: str(2**16)}

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
    env = os.environ | OF_BLOCKS
    ended = subprocess.run([sys.executable, "-c", SCRIPT, *files], capture_output=True, text=True, env=env)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout.splitlines()[-1])
    (cause,) = told["causes"]
    assert "DefaultCPUAllocator: can't allocate memory" in cause
    assert cause.endswith("if tried again, it trains in smaller micro-batches, or recomputes activations")
    assert (told["provenance"]["micro_batch_divisor"], told["provenance"]["gradient_checkpointing"]) == (2, False)


def rank_main(rank: int, port: int, url: str, caches: list[str], env: dict[str, str], stages: list[str]) -> None:
    """One rank of a gang of two tries stages; what came of the last one is in its cache."""
    os.environ.update(env | {"XDG_CACHE_HOME": caches[rank]})
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, int(env[THRESHOLD]))  # The C library reads it at the start alone.
    resources, store = Resources(workers=2, zero_stage=2), Store(url)
    worker = make_worker(resources, rank=rank, world_size=2)
    join_process_group(worker, resources, "127.0.0.1", port)
    for text in stages:  # All but the last so that all is imported.
        spec, tokens = json.loads(text)
        stage = Stage(Pretrain.model_validate_json(spec), {"tokens": tokens})
        if rank == 0:
            store.work_dir(stage.id)
        assert fetch_inputs(stage, store) is None
        worker.barrier()
        if rank == 1 and text is stages[-1]:
            status = Path("/proc/self/status").read_text().splitlines()
            held = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmSize"))
            # Of its activations, 380 MB of half the batch and 190 MB of a quarter, the former do not fit.
            resource.setrlimit(resource.RLIMIT_AS, (held + 280 * 2**20, resource.RLIM_INFINITY))
        outcome = attempt(stage, store, worker)
    (Path(caches[rank]) / "outcome").write_text(getattr(outcome, "cause", "done"))
    os._exit(0)  # A gang that cannot go on is ended so, too.


def run_gang(url: str, caches: list[Path], stages: list[Stage], env: dict[str, str]) -> list[str]:
    """A gang of two tries the last stage; what came of it on rank 1, and on rank 0 where that is not stuck then."""
    written = [json.dumps([stage.spec.model_dump_json(by_alias=True), stage.inputs["tokens"]]) for stage in stages]
    given = (free_port(), url, [str(cache) for cache in caches], env, written)
    for cache in caches:
        cache.mkdir()
    ranks = [forked.Process(target=rank_main, args=(rank, *given)) for rank in range(2)]
    said = []
    try:
        for rank in ranks:
            rank.start()
        for rank, cache in zip(reversed(ranks), reversed(caches), strict=True):
            # Rank 0 may wait for ever for one that failed: the gang's watch ends it then.
            rank.join(timeout=120 if not said or said[0] == "done" else 2)
            if rank.exitcode is None:
                assert said, "rank 1 is stuck"
                break
            assert rank.exitcode == 0
            said.append((cache / "outcome").read_text())
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    return said


@pytest.mark.slow
def test_a_gang_of_which_one_rank_runs_out_takes_less_together(tmp_path, monkeypatch):
    """Two ranks under ZeRO-2 with caches of their own: of a URL, they share nothing but what is behind it."""
    env = shared_extensions() | OF_BLOCKS
    for name, value in (shared_extensions() | {"XDG_CACHE_HOME": str(tmp_path / "driver")}).items():
        monkeypatch.setenv(name, value)
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
