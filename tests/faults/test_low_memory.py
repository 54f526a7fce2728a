"""A node that runs low on memory: Ray's own monitor kills a gang there, or the kernel a process."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import CAN_UNSHARE, real_cluster
from tiny import LARGE, results_of

from raysweep.runners import run_sweep
from raysweep.runners.out_of_memory import TRIED_WITH_LESS
from raysweep.runs import Run
from raysweep.space import load
from raysweep.store import Store

pytestmark = pytest.mark.slow

GROUPS = Path("/sys/fs/cgroup/memory")
COMMAND = "import sys; from raysweep.cli import main; sys.exit(main(sys.argv[1:]))"

# A training step takes 1.5 GB more than its process has, and in two micro-batches 0.75 GB.
LARGER = LARGE.replace("batch_sequences: 256", "batch_sequences: 512")
# A node with one gang takes 0.5 GB before. The limit itself is not reached: there the kernel would be first.
LIMIT_BYTES, SHARE = 4 * 2**30, 0.4
# So that what counts is in use: by default the C library keeps freed blocks of these sizes.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group whose memory is its own."""
    group = GROUPS / f"raysweep-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip("no control groups of version 1 can be made here")
    try:
        (group / "memory.limit_in_bytes").write_text(str(LIMIT_BYTES))
        yield group
    finally:
        deadline = time.monotonic() + 30
        while True:  # As long as its last process is not quite gone.
            try:
                group.rmdir()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)


def enter_group(group: Path) -> str:
    return f"echo $$ > {group}/cgroup.procs"


@pytest.fixture(scope="module")
def in_halves(tmp_path_factory) -> dict[str, object]:
    """What a run gives that takes the micro-batches that there is memory for."""
    home = tmp_path_factory.mktemp("halves")
    (home / "halves.yaml").write_text(f"{LARGER}resources: {{micro_batch_sequences: 256}}\n")
    return results_of(run_sweep(load(home / "halves.yaml"), Store(home / "store"), runner="inline"))


@pytest.mark.ray
@pytest.mark.skipif(not CAN_UNSHARE, reason="only root may give a node memory of its own")
def test_a_gang_that_is_killed_for_its_memory_takes_less_the_next_time(tmp_path, sweep_file, group, in_halves):
    sweep, store = sweep_file(LARGER), Store(tmp_path / "store")
    enter = f'{enter_group(group)} && mount --bind {group} {GROUPS} && exec "$@"'
    env = {"RAY_memory_usage_threshold": str(SHARE), "RAY_memory_monitor_refresh_ms": "50"} | MALLOC
    with real_cluster(tmp_path, num_cpus=0) as cluster:
        cluster.add(env=env, before=("unshare", "-m", "sh", "-c", enter, "sh"))
        driver = cluster.start(COMMAND, "run", str(sweep), "--store", store.url, "--address", cluster.address)
        words, _ = driver.communicate(timeout=240)
    assert driver.returncode == 0, words
    [line] = [line for line in words.splitlines() if "a trial goes on in another gang: " in line]
    assert "worker(s) were killed due to the node running low on memory. " in line
    assert line.endswith(f"; {TRIED_WITH_LESS}")
    check(store, in_halves)


def test_a_process_that_the_kernel_kills_takes_less_the_next_time(tmp_path, sweep_file, group, in_halves):
    """Whose end nobody sees, or has a word of."""
    (group / "memory.limit_in_bytes").write_text(str(int(SHARE * LIMIT_BYTES)))
    sweep, store = sweep_file(LARGER), Store(tmp_path / "store")
    command = ["sh", "-c", f'{enter_group(group)} && exec "$@"', "sh", sys.executable, "-c", COMMAND, "run", str(sweep)]
    command += ["--store", store.url, "--runner", "inline"]
    first, second = (subprocess.run(command, env=os.environ | MALLOC, capture_output=True, text=True) for _ in range(2))
    assert first.returncode == -signal.SIGKILL, first.stderr
    assert second.returncode == 0, second.stderr
    assert "the kernel killed a process here, as memory ran out, while stage pretrain-" in second.stderr
    check(store, in_halves)


def check(store: Store, in_halves: dict[str, object]) -> None:
    [run] = Run.all(store)
    assert run.failures() == []
    assert results_of(run) == in_halves
    [trained] = [record for record in store.records() if record.kind == "pretrain"]
    assert trained.provenance["micro_batch_divisor"] == 2
