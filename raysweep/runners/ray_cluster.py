"""Ray, started on this machine or connected to, and what gangs it holds."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from math import isclose
from typing import Any, NamedTuple

import ray
from ray._private import ray_constants
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.services import canonicalize_bootstrap_address_or_die
from ray._private.state import available_resources_per_node
from ray.autoscaler.sdk import request_resources
from ray.util.placement_group import placement_group_table

from raysweep.errors import ClusterError, first_line
from raysweep.resources import Resources
from raysweep.runners.draining import draining_nodes
from raysweep.runners.interrupts import keeping_sigterm
from raysweep.runners.processes import LOOPBACK
from raysweep.runners.ray_watch import GO_ON
from raysweep.runners.room import Gangs, Placement, Room, Shape, View

logger = logging.getLogger(__name__)

# Processes that Ray starts ahead never become a gang: Tune asks for its trainables' own environment, which these lack.
# They would only import beside the gang's: measured on 2 cores, 10 s to the first gang with them, 5.4 s without.
LOCAL_RAY = {"prestart_worker_first_driver": False, "enable_worker_prestart": False}
"""System configuration of a Ray that is started here, on one machine."""

# How long a run that has lost all room for its gangs waits for nodes at least.
LOST_SECONDS = 600.0


class Cluster(NamedTuple):
    """A cluster that can hold each gang of a sweep."""

    shapes: Mapping[Resources, Shape]
    """Of gangs: inside one node if there is one with so much room."""
    may_grow: bool


def start_ray() -> str:
    """Connect to the cluster of RAY_ADDRESS, or start one on this machine; returns where gangs reach this process.

    Raises:
        ClusterError: if there is no such cluster; says which, and what to do.
    """
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    # Tune saves a state of its own, which is never restored from: that it cannot is nobody's loss, nor traceback.
    for name in ("ray.tune.execution.experiment_state", "ray.train._internal.syncer"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", str(24 * 3600))
    # Else one trial waits for its gang at a time. Ours are handed out where there is room for them, so all may start.
    os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", "100000")
    os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")  # A traceback each; `_Ends` says it in a line.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    local = "RAY_ADDRESS" not in os.environ and not ray.is_initialized()
    if local:
        # Ray adds 15: a gang would wait for all else that runs on the machine, where it is what the machine is to do.
        os.environ.setdefault("RAY_worker_niceness", "0")
        if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
            logger.warning("RAY_AUTH_MODE=disabled: whoever is on this machine may run code as you while this goes on")
        with _on_loopback():
            _init(address="local", include_dashboard=False, _system_config=LOCAL_RAY)
    elif not ray.is_initialized():
        connect()
    return LOOPBACK if local else str(ray.util.get_node_ip_address())


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """A Ray that is started while in it listens on loopback alone.

    Its processes do where that is their node's address, and on all addresses otherwise. Ray takes it for the address
    only where it is told not to make clusters, as it is on other systems; given as an argument, it is replaced.
    """
    variable, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    given = os.environ.get(variable)
    # For this process, which has read the variable, and for those that it starts.
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ[variable] = "0"
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        del os.environ[variable]
        if given is not None:
            os.environ[variable] = given


def cluster_for(*every: Resources) -> Cluster:
    """The cluster that Ray was started on, seen to hold each of these gangs.

    Raises:
        ClusterError: if it cannot; says what was asked and what is there. A cluster, which may still be scaling up, is
            waited for for `max_node_wait_seconds`; on one machine waiting brings nothing.
    """
    on_cluster = "RAY_ADDRESS" in os.environ
    deadline = time.monotonic() + (every[0].max_node_wait_seconds if on_cluster else 0)
    is_asked = False
    while True:
        nodes = _nodes()
        room = {each: sum(Shape.of(each).workers_in(node) for node in nodes) for each in every}
        # The first that has none: it is told, and asked for.
        resources = next((each for each in every if room[each] < each.workers), None)
        if resources is None:
            if is_asked:  # From here on the gangs that wait for room ask by themselves.
                request_resources(bundles=[])
            return Cluster({each: _shape(each) for each in every}, may_grow=on_cluster)
        if time.monotonic() >= deadline:
            raise ClusterError(_too_small(nodes, room[resources], resources))
        if not is_asked:
            logger.warning("waiting for nodes: %s", _too_small(nodes, room[resources], resources))
            # An autoscaler brings no node that nobody asks for; where there is none, nobody hears it.
            bundle = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
            request_resources(bundles=[bundle] * resources.workers)
            is_asked = True
        time.sleep(1.0)


class LostRoom:
    """Nodes lost so that no gang is left, and none of those that trials wait for could be started: said, and an end.

    Args:
        look: gives what gangs there are.
        gangs: says what is waited for.
        cluster: that had room for each gang.
        wait_seconds: for nodes to come, but at least LOST_SECONDS, as for a machine that is started again.
        nodes: gives CPU and GPU of each node that is there.
        clock: in seconds.
    """

    def __init__(
        self,
        look: Callable[[], View],
        gangs: Gangs,
        cluster: Cluster,
        wait_seconds: float,
        *,
        nodes: Callable[[], Sequence[Mapping[str, float]]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._look, self._gangs, self._nodes, self._clock = look, gangs, nodes or _nodes, clock
        self._resources = {shape: resources for resources, shape in cluster.shapes.items()}
        self._wait_seconds = max(wait_seconds, LOST_SECONDS)
        self._since: float | None = None

    def look(self) -> None:
        """To be called time and again. Raises ClusterError once that has been so for too long."""
        shapes = set() if self._look().gangs else self._gangs.under_way()
        nodes = self._nodes() if shapes else []
        room = Room({str(number): node for number, node in enumerate(nodes)})
        if not shapes or any(room.find(shape) for shape in shapes):
            self._since = None
            return
        shape = min(shapes)
        room_of_each = [*map(shape.workers_in, nodes), 0]
        workers = sum(room_of_each) if shape.spans_nodes else max(room_of_each)
        lack = _too_small(nodes, workers, self._resources[shape], inside=not shape.spans_nodes)
        if self._since is None:
            self._since = self._clock()
            logger.warning("no gang is left, and none can start; waiting for %g s: %s", self._wait_seconds, lack)
        elif self._clock() - self._since > self._wait_seconds:
            raise ClusterError(f"no gang is left, and none could start for {self._wait_seconds:g} s: {lack}; {GO_ON}")


def connect() -> None:
    """Connect to the cluster of RAY_ADDRESS, with its token where there is one on this machine.

    Raises:
        ClusterError: if there is no such cluster, or it does not take this process; says which, and what to do.
    """
    address = os.environ["RAY_ADDRESS"]
    if "://" in address:
        raise ClusterError(
            f"Ray at {address!r}: a sweep's driver is a process on a node of the cluster: run the command there with "
            "--address auto, or send it there with raysweep submit"
        )
    if address not in ("auto", "local") and not re.fullmatch(r".+:\d{1,5}", address):
        raise ClusterError(f"Ray at {address!r}: an address is IP:PORT, as ray start --head printed it, or auto")
    use_token()
    try:
        if address == "auto":  # Which Ray would take on trust, and wait for a quarter of an hour.
            address = canonicalize_bootstrap_address_or_die(address)
        if ":" in address:
            _probe(address)
        _init(address=address)
    except (ray.exceptions.RayError, OSError, RuntimeError, ValueError) as error:
        raise ClusterError(f"Ray at {address!r} cannot be joined: {first_line(error)}") from error


def use_token() -> None:
    """Show this machine's token to a cluster that is about to be connected to, if there is one and nothing forbids it.

    Ray itself does so for the address "auto" alone: at any other a cluster with a token, as every head has been since
    there is one in ~/.ray, would be said to be unreachable. A cluster without a token takes no notice of ours.
    """
    logging.getLogger(maybe_enable_token_auth_if_token_available.__module__).setLevel(logging.ERROR)
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _probe(address: str) -> None:
    """Ray itself would try for a minute where nobody listens, and for 20 s where its token is refused."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10.0).close()
        importlib.import_module("ray._raylet").GcsClient(address=address)
    except ray.exceptions.AuthenticationError as error:
        mode = os.environ.get("RAY_AUTH_MODE", "unset")
        raise ClusterError(
            f"Ray at {address!r} asks for its token (RAY_AUTH_MODE is {mode} here, which has no token or another): "
            "copy ~/.ray/auth_token of its head to this machine, or set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, and "
            "leave RAY_AUTH_MODE unset or set it to token"
        ) from error
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"Ray at {address!r} cannot be reached ({error}): give the IP and port of its head, as ray start --head "
            "printed them"
        ) from error


def _init(**how: Any) -> None:
    with keeping_sigterm():
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **how)


def _nodes() -> list[Mapping[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _shape(resources: Resources) -> Shape:
    """Inside a node where one has room for a whole gang by now: what others hold there they may hold for long."""
    whole = Shape.of(resources)
    fits = any(whole.workers_in(free) >= whole.workers for free in available_resources_per_node().values())
    return whole._replace(spans_nodes=not fits)


def looking(shapes: Collection[Shape], *, every_seconds: float = 1.0) -> Callable[[], View]:
    """Gives what is free of each node, and this process's gangs, of these shapes; asks Ray once in `every_seconds`."""
    job = ray.get_runtime_context().get_job_id()
    seen: list[tuple[float, View]] = []

    def look() -> View:
        if not seen or time.monotonic() > seen[0][0] + every_seconds:
            seen[:] = [(time.monotonic(), _view(job, shapes))]
        return seen[0][1]

    return look


def _view(job: str, shapes: Collection[Shape]) -> View:
    # What nodes have available arrives late, so what placement groups hold counts as well: that is known at once.
    available = available_resources_per_node()
    groups = [group for group in placement_group_table().values() if group["state"] == "CREATED"]
    held: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for group in groups:
        for index, node_id in group["bundles_to_node_id"].items():
            held[node_id].update(group["bundles"][index])
    free = {}
    draining = draining_nodes()
    for node_id, total in ((node["NodeID"], node["Resources"]) for node in ray.nodes() if node["Alive"]):
        if node_id in draining:  # Ray starts nothing there.
            continue
        there = available.get(node_id, {})
        free[node_id] = {
            name: min(total.get(name, 0.0) - held[node_id][name], there.get(name, 0.0)) for name in ("CPU", "GPU")
        }
    gangs: defaultdict[Shape, list[Placement]] = defaultdict(list)
    for group in groups:
        if group["placement_group_id"].endswith(job) and (shape := _shape_of(group["bundles"], shapes)):
            gangs[shape].append(Counter(group["bundles_to_node_id"].values()))
    return View(free, gangs)


def _shape_of(bundles: Mapping[int, Mapping[str, float]], shapes: Collection[Shape]) -> Shape | None:
    """None of a placement group that is no gang's."""
    first = next(iter(bundles.values()))
    held = (len(bundles), first.get("CPU", 0.0), first.get("GPU", 0.0))
    # Ray keeps four digits of a fraction.
    return next((shape for shape in shapes if all(map(partial(isclose, abs_tol=1e-3), shape[:3], held))), None)


def _too_small(nodes: Sequence[Mapping[str, float]], room: int, resources: Resources, *, inside: bool = False) -> str:
    """What a gang lacks. `inside`: `room` is of one node, in which all its workers are to be."""
    workers = resources.workers
    wanted = {"CPU": workers * resources.cpus_per_worker, "GPU": workers * resources.gpus_per_worker}
    total = {name: sum(node.get(name, 0.0) for node in nodes) for name in wanted}
    short = [name for name in wanted if wanted[name] > total[name]] or list(wanted)
    asked = ", ".join(f"{wanted[name]:g} {name}" for name in short)
    has = ", ".join(f"{total[name]:g} {name}" for name in short)
    return (
        f"a gang of resources.workers = {workers} needs {asked}; the cluster has {has} on {len(nodes)} node(s), with "
        f"room for {room} worker(s){' inside one' if inside else ''} of {resources.cpus_per_worker:g} CPU and "
        f"{resources.gpus_per_worker:g} GPU: lower "
        "resources.workers, cpus_per_worker or gpus_per_worker, set RAY_ADDRESS to a larger cluster, or raise "
        "resources.max_node_wait_seconds where nodes are still to come"
    )
