"""What runs on each node to look at a cluster.

Sent to the nodes by value, for one whose raysweep is missing, or another, is to say so. So nothing of raysweep is
imported but where it is needed.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

PACKAGES = ("raysweep", "ray", "torch", "deepspeed", "transformers", "accelerate")
"""What computes results, or carries them between nodes."""


# A file that another node has just written shows this late at most: what network file systems keep of a folder.
SHARED_SECONDS = 10.0
GROUP_SECONDS = 60.0
NUM_REDUCTIONS = 5


def facts_here(ip: str, ray_folder: str) -> dict[str, Any]:
    """The facts of this node, by field of `NodeFacts`.

    Args:
        ip: by which Ray knows the node.
        ray_folder: where Ray keeps its files here.
    """
    gpus, driver = _gpus()
    # A node that was given another --temp-dir lacks it: its disk is that of the folder above.
    disk = disk_usage(Path(ray_folder))
    return {
        "ip": ip,
        "interface": interface_of(ip),
        "chosen_interfaces": {
            name: os.environ[name] for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if name in os.environ
        },
        "versions": versions_here(),
        "code": code_digest(),
        "gpus": gpus,
        "gpu_driver": driver,
        "is_token_asked": _is_token_asked(),
        "disk": ray_folder,
        "free_disk": disk.free,
        "total_disk": disk.total,
        "free_shared_memory": shutil.disk_usage("/dev/shm").free,
    }


def store_disk(store_url: str) -> tuple[str, int]:
    """Where this node keeps a store's files, or what it has at hand of one behind a URL; and bytes free there."""
    from raysweep.store import Store

    root = Store(store_url).root
    return str(root), disk_usage(root).free


def disk_usage(folder: Path) -> Any:
    """Of the file system that it is on, or will be."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists()))


def versions_here() -> dict[str, str]:
    """Of Python and PACKAGES; `missing` where there is none."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def code_digest() -> str:
    """SHA-256 over raysweep's own files and their names, as they lie here; empty if there is none."""
    spec = importlib.util.find_spec("raysweep")
    if spec is None or spec.origin is None:
        return ""
    folder, digest = Path(spec.origin).parent, hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in (".py", ".html", ".css", ".js"):
            digest.update(f"{path.relative_to(folder)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def interface_of(ip: str) -> str:
    """The network interface that has an address; empty if none has."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.split("%")[0] == ip for address in addresses):
            return str(name)
    return ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _gpus() -> tuple[tuple[str, ...], str]:
    """Names of the GPUs, and their driver's version."""
    rows = _gpu_rows("name", "driver_version")
    return tuple(name for name, _ in rows), rows[0][1] if rows else ""


def memory_here() -> tuple[int, list[tuple[str, int]]]:
    """Bytes of this node's memory; and of each of its GPUs the name, and bytes as the driver has them."""
    from raysweep.devices import host_memory_bytes

    rows = _gpu_rows("name", "memory.total")
    return host_memory_bytes(), [(name, int(mebibytes) * 2**20) for name, mebibytes in rows if mebibytes.isdecimal()]


def _gpu_rows(*columns: str) -> list[list[str]]:
    """Of each GPU. Not by torch: Ray hides them from a task that asks for none."""
    query = ["nvidia-smi", f"--query-gpu={','.join(columns)}", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in row] for row in csv.reader(listed.splitlines())]
    return [row for row in rows if len(row) == len(columns)]


def _is_token_asked() -> bool:
    """Whether the raylet that started this process takes nobody without the token."""
    raylet: Any = importlib.import_module("ray._raylet")
    return bool(raylet.get_authentication_mode() == raylet.AuthenticationMode.TOKEN)


def clock() -> float:
    """Seconds of epoch, by this node."""
    return time.time()


def unreached(host: str, port: int) -> str:
    """Why this node cannot connect to a port, in a line; empty if it can."""
    try:
        socket.create_connection((host, port), timeout=10.0).close()
    except OSError as error:
        return str(error)
    return ""


def write_nonce(store_url: str, nonce: str, node: str) -> str:
    """Leave a file of this node in the store; returns what went wrong, in a line."""
    from raysweep.errors import RaysweepError

    try:
        _Nonces(store_url, nonce).write(node)
    except (OSError, RaysweepError) as error:
        return f"cannot write to {store_url}: {error}"
    return ""


def unseen_nonces(store_url: str, nonce: str, nodes: Sequence[str]) -> list[str]:
    """Those of `nodes` whose file this node does not find in the store."""
    nonces, deadline = _Nonces(store_url, nonce), time.monotonic() + SHARED_SECONDS
    while (unseen := [node for node in nodes if not nonces.has(node)]) and time.monotonic() < deadline:
        time.sleep(0.5)
    return unseen


def remove_nonce(store_url: str, nonce: str, node: str) -> None:
    """Take the file of this node away again, if it could be written."""
    from raysweep.errors import RaysweepError

    with contextlib.suppress(OSError, RaysweepError):
        _Nonces(store_url, nonce).remove(node)


class _Nonces:
    """Small files in a store, as its stages lie there: not in a cache of this node."""

    def __init__(self, store_url: str, nonce: str) -> None:
        from raysweep.remote import Remote
        from raysweep.store import Store

        store = Store(store_url)
        self._name = f"partial/check-{nonce}"
        self._folder = store.root / self._name if store.is_local else None
        self._remote = None if store.is_local else Remote(store_url)

    def write(self, node: str) -> None:
        if self._folder:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / node).write_text(node)
        elif self._remote:
            self._remote.write(f"{self._name}/{node}", node.encode())

    def has(self, node: str) -> bool:
        if self._folder:
            return (self._folder / node).exists()
        return self._remote is not None and node in self._remote.names(self._name)

    def remove(self, node: str) -> None:
        if self._folder:
            (self._folder / node).unlink(missing_ok=True)
            shutil.rmtree(self._folder, ignore_errors=True)
        elif self._remote:
            self._remote.remove(f"{self._name}/{node}")


class Rank:
    """A process of a group that reduces over the nodes; `ray.remote` makes an actor of it."""

    def __init__(self, ip: str, rank: int, world_size: int, use_gpu: bool) -> None:
        self._ip, self._rank, self._world_size, self._use_gpu = ip, rank, world_size, use_gpu
        self._store: Any = None
        self._interface = interface_of(ip)
        # gloo takes the interface of the host's name otherwise, which Debian has on loopback.
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, self._interface)

    def listen(self) -> int:
        """The port where rank 0 waits for the others."""
        # torch itself would listen on all addresses.
        self._store = self._tcp_store(0, listener=socket.create_server((self._ip, 0)))
        return int(self._store.port)

    def reduce(self, host: str, port: int, num_bytes: int) -> tuple[float, str]:
        """Seconds of one all-reduce of float32, the fastest of several; and the interface it went over."""
        import torch
        import torch.distributed as dist

        store = self._store or self._tcp_store(port, host=host)
        dist.init_process_group(
            "nccl" if self._use_gpu else "gloo",
            store=store,
            rank=self._rank,
            world_size=self._world_size,
            timeout=timedelta(seconds=GROUP_SECONDS),
        )
        tensor = torch.ones(num_bytes // 4, device="cuda" if self._use_gpu else "cpu")
        seconds = []
        for _ in range(1 + NUM_REDUCTIONS):
            dist.barrier()
            started = time.perf_counter()
            dist.all_reduce(tensor)
            if self._use_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        dist.destroy_process_group()
        return min(seconds[1:]), self._interface  # The first one makes the connections.

    def _tcp_store(self, port: int, *, host: str = "", listener: socket.socket | None = None) -> Any:
        from torch._C._distributed_c10d import TCPStore

        return TCPStore(
            host or self._ip,
            listener.getsockname()[1] if listener else port,
            world_size=self._world_size,
            is_master=listener is not None,
            wait_for_workers=False,
            timeout=timedelta(seconds=GROUP_SECONDS),
            master_listen_fd=listener.detach() if listener else None,
        )
