"""Nodes of a cluster that are taken away while a sweep runs: the same run goes on on others, to the same bits."""

import os
import signal
import time

import pytest
from clusters import real_cluster
from processes import named
from tiny import TINY, results_of

from raysweep.runners import run_sweep
from raysweep.runs import Run
from raysweep.space import load
from raysweep.store import Store

pytestmark = pytest.mark.slow

# One checkpoint, at the end: until then a state is saved only where that is asked for.
LONG = TINY[: TINY.index("indicators:")].replace("steps: 12", "steps: 3000").replace("[6, 12]", "[3000]")
COMMAND = "import sys; from raysweep.cli import main; sys.exit(main(sys.argv[1:]))"


def test_a_node_that_is_preempted_and_one_that_dies_cost_what_was_not_saved(tmp_path, sweep_file):
    """Two gangs on a node each: SIGTERM to one node, as of a spot machine, and kill -9 of the other one's raylet."""
    sweep = sweep_file(LONG)
    with real_cluster(tmp_path, num_cpus=0) as cluster:
        for _ in range(3):
            cluster.add()
        store = ["--store", str(tmp_path / "store")]
        driver = cluster.start(COMMAND, "run", str(sweep), *store, "--address", cluster.address)
        want = results_of(run_sweep(load(sweep), Store(tmp_path / "whole"), runner="inline"))

        def num_training() -> int:
            """Trials whose losses have come to their TensorBoard file."""
            return sum(path.stat().st_size > 1000 for path in tmp_path.glob("store/runs/*/tensorboard/*/*"))

        def wait_for(condition) -> None:
            deadline = time.monotonic() + 120
            while not condition():
                assert driver.poll() is None, driver.communicate()[0]
                assert time.monotonic() < deadline
                time.sleep(0.1)

        wait_for(lambda: num_training() == 2)
        preempted, killed = cluster.gangs()
        cluster.node_of(preempted).send_signal(signal.SIGTERM)
        os.kill(named(cluster.node_of(killed).pid, "raylet"), signal.SIGKILL)
        began = time.monotonic()
        wait_for(lambda: preempted not in cluster.gangs())
        # Before Ray ends it, after 30 s.
        assert time.monotonic() - began < 20
        assert list(tmp_path.glob("store/partial/*.state/step-*"))
        words, _ = driver.communicate(timeout=120)
        assert driver.returncode == 0, words
    [run] = Run.all(Store(tmp_path / "store"))
    assert results_of(run) == want
    assert run.failures() == []
    assert "1 node(s) are about to be taken away" in words
    assert "a trial goes on in another gang: a node of its gang was about to be taken away" in words
    assert words.count("a trial goes on in another gang") == 2
    assert "Traceback" not in words
