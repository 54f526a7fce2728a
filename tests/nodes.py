"""Sweeps on hosts of their own: a cluster of raylets that share a network and nothing else, and a store they reach."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clusters import RealCluster, real_cluster
from hosts import Host, Hosts, hosts, shared_extensions
from s3_server import Server
from tiny import results_of

from raysweep.runs import Run
from raysweep.store import Store

RUN = """
import json, sys
from dataclasses import asdict
from raysweep.runners import run_sweep
from raysweep.space import load
from raysweep.store import Store

with open(sys.argv[3], "w", buffering=1) as events:
    show = lambda event: print(json.dumps(asdict(event)), file=events)
    run_sweep(load(sys.argv[1]), Store(sys.argv[2]), name="run", show=show)
"""


class Nodes:
    """A cluster whose head, on this machine, takes no work.

    Args:
        home: a folder for what its parts write.
        network: where its hosts are.
        cluster: of the head alone.
        server: of S3's interface; all nodes have its keys.
        extensions: where torch compiles operators, on all nodes; None: where it does here.
    """

    def __init__(
        self, home: Path, network: Hosts, cluster: RealCluster, server: Server, extensions: Path | None
    ) -> None:
        self.home, self.network, self.cluster, self.server = home, network, cluster, server
        self._extensions = {"TORCH_EXTENSIONS_DIR": str(extensions)} if extensions else shared_extensions()

    def add(self, *, num_cpus: int) -> tuple[Host, subprocess.Popen[bytes]]:
        """A node on a host of its own; its cache and Ray's files are its own, too."""
        own = [self.home / "cache", Path("/tmp/ray")]
        for folder in own:
            folder.mkdir(exist_ok=True)
        host = self.network.add(own)
        return host, self.cluster.add(self._env(), host=host, num_cpus=num_cpus)

    def start(self, sweep: Path, store: str, events: Path) -> subprocess.Popen[str]:
        """A driver on the head."""
        return self.cluster.start(RUN, str(sweep), store, str(events), env=self._env())

    def _env(self) -> dict[str, str]:
        return {
            "XDG_CACHE_HOME": str(self.home / "cache"),
            **self._extensions,
            "RAY_ADDRESS": self.cluster.address,
            **self.server.env,
        }


@contextlib.contextmanager
def nodes(home: Path, *, extensions: Path | None = None) -> Iterator[Nodes]:
    """A cluster of a head, ended at the end; see `Nodes`."""
    with hosts() as network:
        server = Server(network.ip)
        try:
            with real_cluster(home, ip=network.ip, num_cpus=0, env=server.env) as cluster:
                yield Nodes(home, network, cluster, server, extensions)
        finally:
            server.stop()


def finish(driver: subprocess.Popen[str]) -> None:
    """Wait for a driver to end well."""
    said, _ = driver.communicate(timeout=600)
    assert driver.returncode == 0, said[-5000:]


def events_in(path: Path) -> list[dict[str, Any]]:
    """What a driver was told so far; a line that is being written is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_for(
    path: Path, driver: subprocess.Popen[str], event: str, *, after: int = 0, **wanted: object
) -> dict[str, Any]:
    """The first event that holds these values, of those that follow on so many."""
    deadline = time.monotonic() + 180
    while True:
        for each in events_in(path)[after:]:
            if each["event"] == event and all(each.get(key) == value for key, value in wanted.items()):
                return each
        assert driver.poll() is None, driver.communicate()[0][-5000:]
        assert time.monotonic() < deadline, f"no {event} with {wanted}"
        time.sleep(0.2)


def results_in(store: str) -> dict[str, object]:
    """See `tiny.results_of`."""
    return results_of(Run.find(Store(store), "run"))
