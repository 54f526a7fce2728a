"""A cluster looked at before a sweep: what otherwise shows after an hour, or in results that do not match.

Each check runs as small Ray tasks, pinned to the nodes. `quick_checks` take seconds and no resources, and `run` makes
them, too; `bandwidth` takes a GPU of each node, where there are any.
"""

from __future__ import annotations

import contextlib
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray
from ray import cloudpickle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysweep.errors import ClusterError
from raysweep.estimates import ToWrite
from raysweep.runners import node_tasks
from raysweep.runners.hardware import NodeMemory
from raysweep.runners.node_facts import GIB, Check, NodeFacts, compare, some
from raysweep.runners.node_tasks import (
    GROUP_SECONDS,
    Rank,
    clock,
    facts_here,
    memory_here,
    remove_nonce,
    store_disk,
    unreached,
    unseen_nonces,
    write_nonce,
)
from raysweep.store import Store

# A worker process starts in seconds; on a busy machine in tens of them.
ANSWER_SECONDS = 90.0
# Of float32, as gradients of a model are sent.
NUM_BYTES = 2**26

Node = Mapping[str, Any]
"""As `ray.nodes()` lists it."""


def quick_checks(store: Store, to_write: ToWrite | None = None) -> list[Check]:
    """Versions, code, GPUs, interfaces, clocks, disks, shared memory, auth, this host's ports, the store, on all nodes.

    Args:
        store: to be looked for on each node.
        to_write: what each is to have room for; None: it is not known.

    Raises:
        ClusterError: if a node does not answer; names it.
    """
    nodes = _alive()
    checks = [*compare(_facts(nodes)), driver_ports(nodes)]
    # Without raysweep, or with another, a node cannot speak for the store.
    if not all(check.ok for check in checks if check.name == "code"):
        return [*checks, Check("store", False, "not looked at: see code")]
    return [*checks, shared_store(store, nodes, to_write)]


def refuse_unfit(store: Store, to_write: ToWrite | None) -> None:
    """Raise ClusterError with each finding of `quick_checks`."""
    failed = [check for check in quick_checks(store, to_write) if not check.ok]
    if failed:
        error = ClusterError()
        error.findings = tuple(((check.name,), check.message) for check in failed)
        raise error


def driver_ports(nodes: Sequence[Node]) -> Check:
    """Each node connects to a port of this host, as gangs do to tell what they do."""
    host = str(ray.util.get_node_ip_address())
    with socket.create_server((host, 0), backlog=max(128, len(nodes))) as listener:
        return reached(nodes, host, listener.getsockname()[1])


def reached(nodes: Sequence[Node], host: str, port: int) -> Check:
    """Each node connects to a port where this host listens."""
    names = _names(nodes)
    answers = _on_each(nodes, unreached, lambda node: (host, port))
    findings = [f"{names[node]} cannot reach {host}:{port} ({answer})" for node, answer in answers.items() if answer]
    if findings:
        return Check(
            "driver",
            False,
            f"{'; '.join(findings)}: let all nodes connect to every TCP port of this host, the driver's, which listens "
            "at one that its system chooses",
        )
    return Check("driver", True, f"each of {len(nodes)} node(s) reaches the ports of {host}, the driver's host")


def shared_store(store: Store, nodes: Sequence[Node] | None = None, to_write: ToWrite | None = None) -> Check:
    """Each node writes a nonce into the store, and reads those of all others; it has room for what is to be written."""
    nodes = _alive() if nodes is None else nodes
    names = _names(nodes)
    nonce = uuid.uuid4().hex
    answers = _on_each(nodes, write_nonce, lambda node: (store.url, nonce, node["NodeID"]))
    try:
        findings = [f"{names[node]}: {answer}" for node, answer in answers.items() if answer]
        if findings:
            return Check("store", False, "; ".join(findings))
        written = [node["NodeID"] for node in nodes]
        unseen = _on_each(nodes, unseen_nonces, lambda node: (store.url, nonce, written))
        findings = [
            f"{names[reader]} does not see what {some([names[writer] for writer in writers])} wrote"
            for reader, writers in unseen.items()
            if writers
        ]
    finally:
        _on_each(nodes, remove_nonce, lambda node: (store.url, nonce, node["NodeID"]))
    if findings:
        return Check(
            "store",
            False,
            f"{store.url} is not one store to all nodes: {'; '.join(findings)}. Give a --store on a file system that "
            "all nodes share (NFS, Lustre, a volume that many may write), or the URL of a bucket",
        )
    # A head that trains nothing keeps nothing of what is behind a URL.
    keeping = nodes if store.is_local else _training(nodes)
    disks = _on_each(keeping, store_disk, lambda node: (store.url,))
    findings = [
        f"{names[node]}: {lack}"
        for node, (folder, free) in disks.items()
        if to_write and (lack := to_write.lack(store, folder, free))
    ]
    if findings:
        return Check("store", False, "; ".join(findings))
    least = min((free for _, free in disks.values()), default=0)
    which = "it" if store.is_local else "what they keep of it"
    return Check(
        "store",
        True,
        f"{store.url}: each of {len(nodes)} node(s) reads what the others write, and has {least / GIB:.1f} GiB or more "
        f"free for {which}",
    )


def bandwidth(*, num_bytes: int = NUM_BYTES) -> Check:
    """All-reduce over one process a node: by NCCL if all have a GPU free, else by gloo."""
    nodes = _alive()
    use_gpus = _have_gpus(nodes)
    members = _training(nodes) if use_gpus else nodes
    if len(members) < 2:
        return Check("all-reduce", True, "one node: nothing to reduce over")
    with _by_value():
        ranks = [
            ray.remote(Rank)
            .options(num_cpus=0, num_gpus=int(use_gpus), scheduling_strategy=_pin(node))
            .remote(node["NodeManagerAddress"], rank, len(members), use_gpus)
            for rank, node in enumerate(members)
        ]
        try:
            port = ray.get(ranks[0].listen.remote(), timeout=ANSWER_SECONDS)
            host = members[0]["NodeManagerAddress"]
            found = ray.get(
                [rank.reduce.remote(host, port, num_bytes) for rank in ranks], timeout=ANSWER_SECONDS + GROUP_SECONDS
            )
        except ray.exceptions.GetTimeoutError:
            busy = "its GPUs are in use by others, or " if use_gpus else ""
            return Check("all-reduce", False, f"no answer in {ANSWER_SECONDS:g} s: {busy}a firewall holds ports closed")
        except ray.exceptions.RayError as error:
            return Check("all-reduce", False, f"{_last_line(error)}: is a firewall between the nodes?")
        finally:
            for rank in ranks:
                ray.kill(rank)
    seconds = max(each for each, _ in found)
    # What a link carries: in a ring each byte crosses it 2 (n - 1) / n times.
    rate = 2 * (len(members) - 1) / len(members) * num_bytes / seconds
    names = ", ".join(sorted({interface for _, interface in found}))
    by = "NCCL" if use_gpus else "gloo"
    return Check("all-reduce", True, f"{rate / 1e9:.2f} GB/s a link by {by} over {len(members)} nodes, on {names}")


def _have_gpus(nodes: Sequence[Node]) -> bool:
    return any(node["Resources"].get("GPU", 0.0) >= 1 for node in nodes)


def _training(nodes: Sequence[Node]) -> list[Node]:
    """Those that gangs come to: where some have GPUs, a head without takes no part."""
    name = "GPU" if _have_gpus(nodes) else "CPU"
    return [node for node in nodes if node["Resources"].get(name, 0.0) >= (1 if name == "GPU" else 0.001)]


def node_memories(*, on_cluster: bool) -> list[NodeMemory]:
    """Of all nodes, which otherwise are this machine. Raises ClusterError if one does not answer."""
    nodes = _alive()
    found = _on_each(nodes, memory_here, lambda node: ()) if on_cluster else {}
    here = None if on_cluster else memory_here()
    return [NodeMemory(node["Resources"], *(here or found[node["NodeID"]])) for node in nodes]


def _alive() -> list[Node]:
    return [node for node in ray.nodes() if node["Alive"]]


def _names(nodes: Sequence[Node]) -> dict[str, str]:
    """Node id -> its IP; with the beginning of its id where several have the same."""
    ips = [node["NodeManagerAddress"] for node in nodes]
    return {
        node["NodeID"]: ip if ips.count(ip) == 1 else f"{ip} ({node['NodeID'][:6]})"
        for node, ip in zip(nodes, ips, strict=True)
    }


def _facts(nodes: Sequence[Node]) -> list[NodeFacts]:
    names = _names(nodes)
    folder = ray._private.worker._global_node.get_temp_dir_path()
    answers = _on_each(nodes, facts_here, lambda node: (node["NodeManagerAddress"], folder))
    clocks = {node["NodeID"]: _clock(node) for node in nodes}
    return [
        NodeFacts(
            **answers[node["NodeID"]],
            name=names[node["NodeID"]],
            ray_gpus=node["Resources"].get("GPU", 0.0),
            clock_ahead_seconds=clocks[node["NodeID"]][0],
            clock_error_seconds=clocks[node["NodeID"]][1],
        )
        for node in nodes
    ]


def _clock(node: Node) -> tuple[float, float]:
    """How far a node's clock is ahead of this one's, and the error of that, in seconds (Cristian's method)."""
    before = time.time()
    (there,) = _on_each([node], clock, lambda node: ()).values()
    after = time.time()
    return there - (before + after) / 2, (after - before) / 2


def _on_each(
    nodes: Sequence[Node], call: Callable[..., Any], arguments: Callable[[Node], tuple[Any, ...]]
) -> dict[str, Any]:
    """Node id -> what `call` gave there.

    Raises:
        ClusterError: if a node does not answer, or the call raised there.
    """
    names = _names(nodes)
    with _by_value():
        task = ray.remote(call)
        refs = {
            node["NodeID"]: task.options(num_cpus=0, max_retries=0, scheduling_strategy=_pin(node)).remote(
                *arguments(node)
            )
            for node in nodes
        }
    _, late = ray.wait(list(refs.values()), num_returns=len(refs), timeout=ANSWER_SECONDS)
    if late:
        silent = [names[node] for node, ref in refs.items() if ref in late]
        raise ClusterError(
            f"no answer in {ANSWER_SECONDS:g} s from {some(silent)}: is its raylet stopped, or its disk full?"
        )
    answers = {}
    for node, ref in refs.items():
        try:
            answers[node] = ray.get(ref)
        except ray.exceptions.RayError as error:
            raise ClusterError(f"node {names[node]}: {_last_line(error)}") from error
    return answers


def _pin(node: Node) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)


@contextlib.contextmanager
def _by_value() -> Iterator[None]:
    """While in it, what is sent to the nodes comes with its code."""
    cloudpickle.register_pickle_by_value(node_tasks)
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(node_tasks)


def _last_line(error: Exception) -> str:
    """What was raised on a node, without the traceback."""
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    return f"{type(cause).__name__}: {lines[-1]}"
