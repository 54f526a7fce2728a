"""How long until all gangs are up: a cluster with room for 16, a stand-in that waits in place of a gang's imports.

    python tests/benchmarks/gang_starts.py [--gangs 16] [--wait 5] [--cpus 1]

Through the runner's own queue and Tune, on two raylets of this machine with eight gangs' CPUs each. Every gang is a
process that has to be started and to import Ray, and a raylet starts as many processes at a time as it has CPUs: where
a machine has no core for each gang (`--cpus 0.125`, the default), they take turns, so plain actors of the same base
class are started beside them (`--plain`), all at once, without Tune and the queue.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.cluster_utils import Cluster

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import TINY

from raysweep.runners import tune as runner
from raysweep.runners.searchers import Points
from raysweep.runs import Run
from raysweep.space import load
from raysweep.store import Store

NUM_NODES, ROOM = 2, 16
os.environ["RAY_AUTH_MODE"] = "disabled"  # Both raylets are on loopback.


class StandIn(tune.Trainable):
    """Waits, notes that it is up, and goes when all are."""

    def setup(self, config: dict[str, Any], **parameters: Any) -> None:
        folder, self._num, wait = Path(os.environ["UP"]), int(os.environ["GANGS"]), float(os.environ["WAIT"])
        time.sleep(wait)
        self._folder = folder
        (folder / str(os.getpid())).touch()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        return True

    def step(self) -> dict[str, Any]:
        while len(list(self._folder.iterdir())) < self._num:
            time.sleep(0.2)
        return {"done": True, "last": True, "ended": True}


def through_tune(num_gangs: int, wait: float, cpus: float) -> list[float]:
    """Seconds from the first question for a trial until each gang was up."""
    began: list[float] = []
    suggest = Points.suggest

    def suggested(self: Any, trial_id: str) -> Any:
        began.append(time.time())
        return suggest(self, trial_id)

    runner.GangTrainable, Points.suggest = StandIn, suggested  # type: ignore[misc,method-assign]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ |= {"UP": str(folder / "up"), "GANGS": str(num_gangs), "WAIT": str(wait)}
        (folder / "up").mkdir()
        values = ", ".join(f"{1e-3 + 1e-5 * index}" for index in range(num_gangs))
        resources = f"resources: {{cpus_per_worker: {cpus:g}, max_silence_seconds: 3600}}\n"
        (folder / "sweep.yaml").write_text(TINY.replace("grid: [1e-2, 3e-3]", f"grid: [{values}]") + resources)
        of_node = int(ROOM * cpus / NUM_NODES)  # A raylet takes no other number.
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": of_node})
        try:
            for _ in range(NUM_NODES - 1):
                cluster.add_node(num_cpus=of_node)
            cluster.wait_for_nodes()
            os.environ["RAY_ADDRESS"] = cluster.address
            space, store = load(folder / "sweep.yaml"), Store(folder / "store")
            run = Run.create(store, "starts", sweep_text=space.text, identity=space.identity())
            trials = [space.trial(point, 0) for point in space.points()]
            runner.run_tune(space, store, run, lambda event: None, trials=trials)
            return sorted(path.stat().st_mtime - began[0] for path in (folder / "up").iterdir())
        finally:
            ray.shutdown()
            cluster.shutdown()


def plain(num_actors: int, wait: float, cpus: float) -> float:
    """Seconds until as many actors of the same base class are up, started by Ray alone."""

    class Actor(tune.Trainable):
        def __init__(self) -> None:
            time.sleep(wait)

        def up(self) -> None:
            pass

    os.environ.pop("RAY_ADDRESS", None)
    ray.init(num_cpus=int(ROOM * cpus), include_dashboard=False, log_to_driver=False)
    began = time.monotonic()
    actors = [ray.remote(Actor).options(num_cpus=cpus).remote() for _ in range(num_actors)]
    ray.get([actor.up.remote() for actor in actors])
    seconds = time.monotonic() - began
    ray.shutdown()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gangs", type=int, default=16, help=f"to start; at most {ROOM} fit")
    parser.add_argument("--wait", type=float, default=5.0, help="seconds, in place of imports")
    parser.add_argument("--cpus", type=float, default=0.125, help="of a gang")
    parser.add_argument("--plain", action="store_true", help="actors without Tune, instead")
    given = parser.parse_args()
    if given.plain:
        print(f"{given.gangs} plain actors up after {plain(given.gangs, given.wait, given.cpus):.1f} s")
        return
    ups = through_tune(given.gangs, given.wait, given.cpus)
    print(
        f"{len(ups)} gangs up: the first after {ups[0]:.1f} s, half after {ups[len(ups) // 2]:.1f}, all {ups[-1]:.1f}"
    )


if __name__ == "__main__":
    main()
