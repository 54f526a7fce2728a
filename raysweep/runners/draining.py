"""Nodes that are about to be taken away: gangs on them save what they train, and their trials go on elsewhere.

Ray says of a node that it drains when its `ray start --block` gets SIGTERM, as in a pod that Kubernetes deletes or on a
spot machine whose notice cluster/ray-up/spot.sh passes on, when an autoscaler ends it, and after `ray drain-node`. It
starts nothing there any more, and ends what is left after 30 seconds, or as RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S says.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0


def draining_nodes() -> frozenset[str]:
    """Ids of the nodes that are about to be taken away."""
    import ray

    return frozenset(ray._private.state.state.get_draining_nodes())


@contextlib.contextmanager
def watching_draining(tell: Callable[[frozenset[str]], None]) -> Iterator[None]:
    """While in it, tell of the nodes that are about to be taken away, all of them each time that there are more."""
    left = threading.Event()

    def watch() -> None:
        known: frozenset[str] = frozenset()
        while not left.wait(LOOK_SECONDS):
            try:
                nodes = draining_nodes()
            except Exception:  # Ray's own, of many kinds: its GCS restarts, or is gone, which is for others to say.
                continue
            if nodes - known:
                logger.warning(
                    "%d node(s) are about to be taken away: what is trained there is saved and goes on elsewhere",
                    len(nodes - known),
                )
                tell(nodes)
            known = nodes

    threading.Thread(target=watch, name="raysweep-draining", daemon=True).start()
    try:
        yield
    finally:
        left.set()
