"""What of a node matters to a sweep, and whether the nodes of a cluster agree; a check is a function and its name in
`compare`."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from raysweep.runners.node_tasks import PACKAGES

GIB = 2**30
MIN_SHARED_MEMORY_BYTES = GIB
# Ray stops taking objects to disk when this share of it is used (its local_fs_capacity_threshold).
MAX_DISK_USED = 0.95
# Records carry times; two nodes further apart than this make a mess of a run's order.
MAX_CLOCK_SECONDS = 5.0


@dataclass(frozen=True)
class Check:
    """One finding: what was looked at, whether it is as it should be, and the words for it."""

    name: str
    ok: bool
    message: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class NodeFacts:
    """What `node_tasks.facts_here` found on a node. Sizes in bytes."""

    ip: str
    interface: str
    """Of its IP; empty if none has it."""
    chosen_interfaces: Mapping[str, str]
    """GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, where set."""
    versions: Mapping[str, str]
    code: str
    """Digest of raysweep's own files; empty if it is not installed."""
    gpus: tuple[str, ...]
    gpu_driver: str
    is_token_asked: bool
    disk: str
    """The folder that `free_disk` and `total_disk` are of."""
    free_disk: int
    total_disk: int
    free_shared_memory: int
    # Known to whoever asks:
    name: str = ""
    ray_gpus: float = 0.0
    """How many GPUs Ray takes the node to have."""
    clock_ahead_seconds: float = 0.0
    clock_error_seconds: float = 0.0


def compare(nodes: Sequence[NodeFacts]) -> list[Check]:
    """What the facts say of nodes that are to work on one sweep."""
    checks = (_versions, _code, _gpus_equal, _interfaces, _clocks, _disks, _shared_memory, _auth)
    return [check(nodes) for check in checks]


def _versions(nodes: Sequence[NodeFacts]) -> Check:
    findings, equal = [], []
    for package in ("python", *PACKAGES):
        groups = _groups(nodes, lambda node, package=package: node.versions[package])  # type: ignore[misc]
        if len(groups) > 1 or "missing" in groups:
            findings.append(f"{package} {_said(groups)}")
        else:
            equal.append(f"{package} {next(iter(groups))}")
    if findings:
        return Check("versions", False, "; ".join(findings) + ": install the same on all nodes")
    return Check("versions", True, ", ".join(equal))


def _code(nodes: Sequence[NodeFacts]) -> Check:
    groups = _groups(nodes, lambda node: node.code[:12] or "missing")
    if len(groups) > 1 or "missing" in groups:
        return Check("code", False, f"raysweep's own files differ: {_said(groups)}: install the same on all nodes")
    return Check("code", True, f"raysweep's own files are the same on all nodes ({next(iter(groups))})")


def _gpus_equal(nodes: Sequence[NodeFacts]) -> Check:
    findings = [
        f"{node.name}: Ray counts {node.ray_gpus:g} GPU(s), the driver {len(node.gpus)}: start it with --num-gpus "
        f"{len(node.gpus)}, or mend the driver"
        for node in nodes
        # Fewer may be meant, as where others have their share of a node.
        if node.gpu_driver and node.ray_gpus > len(node.gpus)
    ]
    drivers = _groups([node for node in nodes if node.gpus], lambda node: node.gpu_driver)
    if len(drivers) > 1:
        findings.append(f"driver {_said(drivers)}: install one")
    kinds = _groups([node for node in nodes if node.gpus], lambda node: f"{len(node.gpus)} x {node.gpus[0]}")
    if findings:
        return Check("gpus", False, "; ".join(findings))
    return Check("gpus", True, f"{_said(kinds)}; driver {next(iter(drivers))}" if kinds else "none on any node")


def _interfaces(nodes: Sequence[NodeFacts]) -> Check:
    findings = []
    for node in nodes:
        if not node.interface:
            findings.append(f"{node.name}: no interface has the node's IP {node.ip}: give ray start --node-ip-address")
        elif len(nodes) > 1 and node.ip.startswith("127."):
            findings.append(f"{node.name}: Ray knows it by loopback: give ray start --node-ip-address")
        findings += [
            f"{node.name}: {variable} is {value!r}, but its IP {node.ip} is on {node.interface}: unset it"
            for variable, value in node.chosen_interfaces.items()
            if node.interface and not _takes(value, node.interface)
        ]
    if findings:
        return Check("interfaces", False, "; ".join(findings))
    return Check("interfaces", True, _said(_groups(nodes, lambda node: node.interface)))


def _takes(chosen: str, interface: str) -> bool:
    """Whether a value of NCCL_SOCKET_IFNAME lets an interface in: names or beginnings of names; `^`: all but these."""
    names = chosen.lstrip("=^").split(",")
    is_named = interface in names if chosen.startswith("=") else interface.startswith(tuple(names))
    return is_named != chosen.startswith("^")


def _clocks(nodes: Sequence[NodeFacts]) -> Check:
    findings = [
        f"{node.name} is {node.clock_ahead_seconds:+.1f} s off this one: synchronise it (chrony, systemd-timesyncd)"
        for node in nodes
        if abs(node.clock_ahead_seconds) - node.clock_error_seconds > MAX_CLOCK_SECONDS
    ]
    most = max((abs(node.clock_ahead_seconds) for node in nodes), default=0.0)
    return Check("clocks", not findings, "; ".join(findings) or f"within {most:.2f} s of this one")


def _disks(nodes: Sequence[NodeFacts]) -> Check:
    findings = [
        f"{node.name}: {node.disk} is {1 - node.free_disk / node.total_disk:.0%} full: make room, or start Ray with "
        "--temp-dir"
        for node in nodes
        if node.free_disk < (1 - MAX_DISK_USED) * node.total_disk
    ]
    least = min((node.free_disk for node in nodes), default=0)
    return Check(
        "disks", not findings, "; ".join(findings) or f"{least / GIB:.1f} GiB or more free for Ray's own files"
    )


def _shared_memory(nodes: Sequence[NodeFacts]) -> Check:
    findings = [
        f"{node.name}: {node.free_shared_memory / GIB:.2f} GiB free in /dev/shm, Ray and NCCL want 1 GiB or more: "
        "enlarge it (docker --shm-size; in Kubernetes an emptyDir of medium Memory)"
        for node in nodes
        if node.free_shared_memory < MIN_SHARED_MEMORY_BYTES
    ]
    least = min((node.free_shared_memory for node in nodes), default=0)
    return Check(
        "shared memory", not findings, "; ".join(findings) or f"{least / GIB:.1f} GiB or more free in /dev/shm"
    )


def _auth(nodes: Sequence[NodeFacts]) -> Check:
    is_open = [node.name for node in nodes if not node.is_token_asked and not node.ip.startswith("127.")]
    if not is_open:
        return Check("auth", True, "the cluster takes nobody without its token")
    chosen = os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled"
    text = (
        "the cluster takes anybody who reaches it: start its nodes with RAY_AUTH_MODE=token and the same "
        "~/.ray/auth_token (ray get-auth-token --generate)"
    )
    if chosen:
        return Check("auth", True, "off, as RAY_AUTH_MODE=disabled asks: whoever reaches the cluster runs code on it")
    return Check("auth", False, f"{text}, or set RAY_AUTH_MODE=disabled here if it is closed off otherwise")


def _groups(nodes: Iterable[NodeFacts], key: Callable[[NodeFacts], Hashable]) -> dict[Any, list[str]]:
    """Value -> names of the nodes that have it, the commonest first."""
    groups: dict[Any, list[str]] = {}
    for node in nodes:
        groups.setdefault(key(node), []).append(node.name)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def _said(groups: Mapping[Any, Sequence[str]]) -> str:
    """As `2.13.0 on 10.0.0.1 and 5 more; 2.12.0 on 10.0.0.2`."""
    return "; ".join(f"{value} on {some(names)}" for value, names in groups.items())


def some(names: Sequence[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
