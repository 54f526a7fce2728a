"""A Ray cluster of real raylets on this machine; a node may have an environment and, as root, a host of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from hosts import Host
from processes import RANK_0, children, gang_workers, named

RAY = (sys.executable, "-m", "ray.scripts.scripts")
CAN_UNSHARE = os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0
"""Whether nodes can have folders of their own here."""


# Takes what `ray start` leaves behind for its own children, so that a head is one process to whoever started it.
ADOPTING = """
import ctypes, signal, subprocess, sys
PR_SET_CHILD_SUBREAPER = 36
assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1) == 0
subprocess.run(sys.argv[1:], check=True)
signal.pause()
"""

# Until nodes have found a GCS that is back: they look for it each second.
FOUND_AGAIN_SECONDS = 5.0


class RealCluster:
    """Nodes started with `ray start`, as a user would. `env`: for processes that are to reach it.

    Args:
        home: a folder for its token and log.
        job_server: whether its head takes jobs.
        ip: of this machine, where its head is; None: that by which it reaches others.
        num_cpus: of the head.
        env: of the head, beside that of this process.
        keeps_gcs: a folder for what its GCS knows, which may then be killed and started again without its node.
    """

    def __init__(
        self,
        home: Path,
        *,
        job_server: bool = False,
        ip: str | None = None,
        num_cpus: int = 1,
        env: Mapping[str, str] | None = None,
        keeps_gcs: Path | None = None,
    ) -> None:
        (home / "auth_token").write_text("a-token-of-these-tests-alone")
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        # By Ray's own default gangs give way to whatever else runs here, and so to tests that run beside these.
        self.env |= {"RAY_worker_niceness": "0"}
        self.env |= {"RAY_AUTH_TOKEN_PATH": str(home / "auth_token"), "PYTHONPATH": str(Path(__file__).parents[1])}
        self._nodes: list[subprocess.Popen[bytes]] = []
        self._gcs: subprocess.Popen[bytes] | None = None
        self._on_hosts: set[subprocess.Popen[bytes]] = set()
        self._num_lost = 0
        self._log = home / "nodes.log"
        # As in an environment that is active.
        self.env["PATH"] = f"{Path(sys.executable).parent}:{self.env['PATH']}"
        port, job_port = _free_ports(2)
        self.ip = ip or _own_ip()
        self.address, self.job_address = f"{self.ip}:{port}", f"http://127.0.0.1:{job_port}"
        dashboard = f"--dashboard-port={job_port}" if job_server else "--include-dashboard=false"
        head = "--head", f"--port={port}", f"--node-ip-address={self.ip}", f"--num-cpus={num_cpus}", dashboard
        if keeps_gcs:
            kept = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(keeps_gcs)}
            self._start(*head, env=dict(env or {}) | kept, before=(sys.executable, "-c", ADOPTING), blocks=False)
        else:
            self._start(*head, env=env)
        self.wait_for(1)

    def add(
        self,
        env: Mapping[str, str] | None = None,
        hidden: Path | None = None,
        num_cpus: int = 1,
        host: Host | None = None,
        before: tuple[str, ...] = (),
    ) -> subprocess.Popen[bytes]:
        """One more node, on this machine or another host.

        Args:
            env: beside that of the cluster.
            hidden: a folder that is another, empty one to it.
            num_cpus: that it has.
            host: where it is.
            before: what goes before its command.
        """
        before = host.command if host else before
        if hidden is not None:
            before = ("unshare", "-m", "sh", "-c", f'mount -t tmpfs none {hidden} && exec "$@"', "sh")
        count = len(self._nodes)
        ip = host.ip if host else self.ip
        arguments = f"--address={self.address}", f"--node-ip-address={ip}", f"--num-cpus={num_cpus}"
        node = self._start(*arguments, env=env or {}, before=before)
        if host:
            self._on_hosts.add(node)
        self.wait_for(count + 1)
        return node

    def lose(self, node: subprocess.Popen[bytes]) -> None:
        """Kill a node: all processes of one that has a host of its own, else what is left of one that has ended."""
        node.kill()
        node.wait(timeout=60)
        self._nodes.remove(node)
        self._num_lost += 1

    def kill_gcs(self) -> Callable[..., object]:
        """Kill -9 the GCS, of a head that keeps what it knows; gives what starts it again, and waits for its nodes.

        With `forgets=True` it is another GCS at the same address, which knows nothing; the cluster is lost then.
        """
        pid = self._gcs.pid if self._gcs else named(self._nodes[0].pid, "gcs_server")
        command = Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]
        env = dict(pair.split("=", 1) for pair in Path(f"/proc/{pid}/environ").read_text().split("\0") if pair)
        os.kill(pid, signal.SIGKILL)

        def start(*, forgets: bool = False) -> None:
            kept = {name: value for name, value in env.items() if not (forgets and name.startswith("RAY_gcs_storage"))}
            with self._log.open("ab") as log:
                self._gcs = subprocess.Popen(command, env=kept, stdout=log, stderr=log)
            deadline = time.monotonic() + 60
            while not _answers(self.address):
                assert time.monotonic() < deadline, self._log.read_text()[-3000:]
                time.sleep(0.2)
            if not forgets:
                time.sleep(FOUND_AGAIN_SECONDS)

        return start

    def start(self, code: str, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """A Python program that may connect to the cluster; what it writes is its stdout."""
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.Popen(
            command,
            env=self.env | dict(env or {}),
            cwd=self._log.parent,  # Ray has workers import from the driver's folder, too.
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, code: str, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """A Python program that may connect to the cluster."""
        command = [sys.executable, "-c", code, *arguments]
        # Elsewhere: Ray has workers import from the driver's folder, too.
        return subprocess.run(
            command, env=self.env | dict(env or {}), cwd=self._log.parent, capture_output=True, text=True, timeout=300
        )

    def node_of(self, pid: int) -> subprocess.Popen[bytes]:
        """The node that a process belongs to."""
        return next(node for node in self._nodes if pid in children(node.pid))

    def gangs(self) -> list[int]:
        """Rank 0 of each gang, on whatever node."""
        return [pid for node in self._nodes for pid in gang_workers(node.pid, RANK_0)]

    def wait_for(self, num_nodes: int) -> None:
        """Until so many nodes are there."""
        deadline = time.monotonic() + 60
        while self._log.read_text().count("Ray runtime started") < num_nodes + self._num_lost:
            ended = [node.args for node in self._nodes if node.poll() is not None]
            assert not ended, self._log.read_text()[-3000:]
            assert time.monotonic() < deadline, self._log.read_text()[-3000:]
            time.sleep(0.5)

    def close(self) -> None:
        """End all nodes; the head and its GCS last, as others take their leave of it, or wait for it half a minute."""
        for node in reversed(self._nodes):
            if "--block" not in node.args:  # Nothing there ends with the process that adopted it.
                for pid in children(node.pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            # Of a host's own processes the first one passes no signal on; what it has started dies with it.
            node.kill() if node in self._on_hosts else node.terminate()
            node.wait(timeout=60)
        if self._gcs:
            self._gcs.kill()
            self._gcs.wait(timeout=60)

    def _start(
        self,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        before: tuple[str, ...] = (),
        blocks: bool = True,
    ) -> subprocess.Popen[bytes]:
        # Else nodes of one machine, of another test too, ask for the same port, and one that lacks it takes no jobs.
        [agent_port] = _free_ports(1)
        own = "--object-store-memory=100000000", f"--dashboard-agent-listen-port={agent_port}"
        command = [*before, *RAY, "start", *own, *arguments, *["--block"] * blocks]
        # Of a node that joins, Ray does not look for a token by itself.
        env = self.env | {"RAY_AUTH_MODE": "token"} | dict(env or {})
        with self._log.open("ab") as log:
            node = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        self._nodes.append(node)
        return node


def _answers(address: str) -> bool:
    ip, port = address.split(":")
    with socket.socket() as probe:
        return probe.connect_ex((ip, int(port))) == 0


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("", 0))
        return [probe.getsockname()[1] for probe in probes]


def _own_ip() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # Sends nothing.
        return str(probe.getsockname()[0])
    return "127.0.0.1"


@contextlib.contextmanager
def real_cluster(
    home: Path,
    *,
    job_server: bool = False,
    ip: str | None = None,
    num_cpus: int = 1,
    env: Mapping[str, str] | None = None,
    keeps_gcs: Path | None = None,
) -> Iterator[RealCluster]:
    """A cluster of one node, ended at the end; see `RealCluster`."""
    cluster = RealCluster(home, job_server=job_server, ip=ip, num_cpus=num_cpus, env=env, keeps_gcs=keeps_gcs)
    try:
        yield cluster
    finally:
        cluster.close()
