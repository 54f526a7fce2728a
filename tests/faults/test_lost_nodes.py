"""A cluster whose GCS or nodes are lost while a sweep runs: the same run goes on, to the same bits, or says why not."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from clusters import RealCluster, real_cluster
from metadata_service import metadata_service
from processes import named
from tiny import TINY, results_of

from raysweep.runners import run_sweep
from raysweep.runs import Run
from raysweep.space import load
from raysweep.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.ray]

# One checkpoint, at the end: until then a state is saved only where that is asked for.
LONG = TINY[: TINY.index("indicators:")].replace("steps: 12", "steps: 3000").replace("[6, 12]", "[3000]")
SHORT = LONG.replace("3000", "400")
SPOT = Path(__file__).parents[2] / "cluster" / "ray-up" / "spot.sh"
COMMAND = "import sys; from raysweep.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture
def cluster(tmp_path_factory):
    """A head that keeps what its GCS knows, and takes no work."""
    home = tmp_path_factory.mktemp("cluster")
    with real_cluster(home, num_cpus=0, keeps_gcs=home / "gcs") as cluster:
        yield cluster


@pytest.fixture
def spot_services():
    """Of three spot machines."""
    with contextlib.ExitStack() as served:
        yield [served.enter_context(metadata_service()) for _ in range(3)]


class Driver:
    """A sweep on the cluster, and what can be seen of it."""

    def __init__(self, cluster: RealCluster, sweep: Path) -> None:
        self.home = sweep.parent
        self.store = Store(self.home / "store")
        command = "run", str(sweep), "--store", self.store.url, "--address", cluster.address
        self.process = cluster.start(COMMAND, *command)

    def num_training(self) -> int:
        """Trials whose losses have come to their TensorBoard file."""
        return sum(path.stat().st_size > 1000 for path in self.home.glob("store/runs/*/tensorboard/*/*"))

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """While it runs."""
        deadline = time.monotonic() + 120
        while not condition():
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_a_gcs_that_comes_back_and_nodes_that_do_not_cost_what_was_not_saved(
    tmp_path, sweep_file, cluster, spot_services
):
    """Two gangs on a node each: kill -9 of the GCS, notice of a spot machine's end, kill -9 of a raylet."""
    sweep = sweep_file(LONG)
    watched = "bash", str(SPOT), "aws"
    services = {cluster.add({"RAYSWEEP_METADATA_URL": each.url}, before=watched): each for each in spot_services}
    driver = Driver(cluster, sweep)
    driver.wait_for(lambda: driver.num_training() == 2)
    start_again = cluster.kill_gcs()
    preempted, killed = cluster.gangs()
    start_again()
    nodes = [cluster.node_of(preempted), cluster.node_of(killed)]
    services[nodes[0]].ends = True
    os.kill(named(nodes[1].pid, "raylet"), signal.SIGKILL)
    began = time.monotonic()
    driver.wait_for(lambda: preempted not in cluster.gangs())
    # Before Ray ends it, after 110 s.
    assert time.monotonic() - began < 25
    assert list(tmp_path.glob("store/partial/*.state/step-*"))
    # While that goes on.
    want = results_of(run_sweep(load(sweep), Store(tmp_path / "whole"), runner="inline"))
    words, _ = driver.process.communicate(timeout=120)
    assert driver.process.returncode == 0, words
    for node in nodes:
        cluster.lose(node)
    [run] = Run.all(driver.store)
    assert results_of(run) == want
    assert run.failures() == []
    assert "1 node(s) are about to be taken away" in words
    assert "a trial goes on in another gang: a node of its gang was about to be taken away" in words
    assert words.count("a trial goes on in another gang") == 2
    assert "Traceback" not in words


def test_a_gcs_that_comes_back_without_its_memory_is_one_line_and_the_same_sweep_goes_on(tmp_path, sweep_file, cluster):
    """Where it stays away the line is that of `test_a_ray_that_is_gone_is_one_line`, after more patience."""
    sweep = sweep_file(SHORT + "resources: {max_concurrent: 1}\n")
    cluster.add()
    driver = Driver(cluster, sweep)
    driver.wait_for(lambda: driver.num_training() == 2)
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("store/stages/*/record.json")}
    start_again = cluster.kill_gcs()
    start_again(forgets=True)
    words, _ = driver.process.communicate(timeout=30)
    # A request of Ray's own that is under way may be answered before anybody has looked: then Ray aborts.
    if "An unexpected system state has occurred" not in words:
        assert driver.process.returncode == 2, words
        [line] = [line for line in words.splitlines() if line.startswith("ClusterError")]
        assert line.startswith("ClusterError: Ray's GCS was started again without what it knew")
    assert driver.process.returncode != 0, words
    assert "Traceback" not in words
    assert any("flatness" in str(path) for path in finished)
    run = run_sweep(load(sweep), driver.store, runner="inline")
    assert len(results_of(run)) > len(finished)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
