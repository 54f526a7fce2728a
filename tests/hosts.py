"""Hosts of their own on this machine, as root: each with its network, processes and, where wanted, folders."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from raysweep.train.deepspeed_ops import extensions_dir

CLONE_NEWNS, CLONE_NEWNET = 0x00020000, 0x40000000  # Of Linux's sched.h.


def can_have_hosts() -> bool:
    """Whether this process may make them."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    made = subprocess.run(["unshare", "-n", "ip", "link", "add", "name", "rs0", "type", "veth"], capture_output=True)
    return made.returncode == 0


def shared_extensions() -> dict[str, str]:
    """So that a host with a cache of its own finds DeepSpeed's operator, which takes minutes to compile."""
    return {"TORCH_EXTENSIONS_DIR": str(extensions_dir())}


def own_operator(extensions: Path) -> Path:
    """Copy DeepSpeed's operator into another folder for TORCH_EXTENSIONS_DIR; gives that of its build."""
    build = extensions / "deepspeed_shm_comm"
    shutil.copytree(extensions_dir() / build.name, build, ignore=shutil.ignore_patterns("lock"))
    return build


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Host:
    """One host: processes started by `command` see no other network, processes and shared memory than its own.

    Args:
        name: of its network namespace.
        ip: its address on the hosts' network.
        own: folders that are others, empty ones, to it.
    """

    def __init__(self, name: str, ip: str, own: Sequence[Path]) -> None:
        self.name, self.ip = name, ip
        self._own = ["/dev/shm", *map(str, own)]

    @property
    def command(self) -> tuple[str, ...]:
        """What goes before a command that is to run there; when it is killed, so is all that it started."""
        script = 'while [ "$1" != -- ]; do mount -t tmpfs none "$1" || exit 1; shift; done; shift; exec "$@"'
        namespaces = ("unshare", "-m", "-p", "-f", "--kill-child", "--mount-proc")
        return ("ip", "netns", "exec", self.name, *namespaces, "sh", "-c", script, "sh", *self._own, "--")

    def enter(self) -> None:
        """Have this process, of one thread so far, see that network, shared memory and those folders from now on."""
        libc = ctypes.CDLL(None, use_errno=True)
        with Path(f"/run/netns/{self.name}").open() as network:
            if libc.setns(network.fileno(), CLONE_NEWNET) or libc.unshare(CLONE_NEWNS):
                raise OSError(ctypes.get_errno(), f"no way into {self.name}")
        for mount in (["--make-rprivate", "/"], *(["-t", "tmpfs", "none", folder] for folder in self._own)):
            subprocess.run(["mount", *mount], check=True, capture_output=True)

    def vanish(self) -> None:
        """Have its network drop all packets, as where a cable is pulled: nobody is told that a connection has ended."""
        _ip("link", "set", f"{self.name}-o", "down")

    def come_back(self) -> None:
        """Its network again, and with it every connection that nobody has given up."""
        _ip("link", "set", f"{self.name}-o", "up")


class Hosts:
    """Hosts on one network, `ip` being this machine's address on it."""

    def __init__(self) -> None:
        self._name = f"rs{os.getpid() % 100000}"
        self._subnet = f"10.{77 + os.getpid() % 100}.{os.getpid() // 100 % 250}"
        self._hosts: list[Host] = []
        self.ip = f"{self._subnet}.1"
        _ip("link", "add", self._name, "type", "bridge")
        _ip("addr", "add", f"{self.ip}/24", "dev", self._name)
        _ip("link", "set", self._name, "up")

    def add(self, own: Sequence[Path] = ()) -> Host:
        """One more host."""
        number = len(self._hosts) + 2
        host = Host(f"{self._name}-{number}", f"{self._subnet}.{number}", own)
        self._hosts.append(host)
        outer = f"{host.name}-o"
        _ip("netns", "add", host.name)
        _ip("link", "add", outer, "type", "veth", "peer", "name", "cable0", "netns", host.name)
        _ip("link", "set", outer, "master", self._name, "up")
        for arguments in (
            ("addr", "add", f"{host.ip}/24", "dev", "cable0"),
            ("link", "set", "cable0", "up"),
            ("link", "set", "lo", "up"),
        ):
            _ip("-n", host.name, *arguments)
        return host

    def close(self) -> None:
        """Take the network away."""
        for host in self._hosts:
            _ip("netns", "del", host.name)
        _ip("link", "del", self._name)


@contextlib.contextmanager
def hosts() -> Iterator[Hosts]:
    """Hosts that are gone at the end."""
    network = Hosts()
    try:
        yield network
    finally:
        network.close()
