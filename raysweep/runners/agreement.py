"""What a process of a gang has to find on its node before it works: a node may join long after a sweep has begun."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from raysweep.errors import ClusterError
from raysweep.runners.node_tasks import code_digest, versions_here
from raysweep.runs import Run
from raysweep.store import Store


@dataclass(frozen=True)
class Agreement:
    """The driver's own versions and code, and the run that it has written into the store."""

    versions: Mapping[str, str]
    code: str
    run: str

    @staticmethod
    def of_driver(run: Run) -> Agreement:
        """That of this process."""
        return Agreement(versions_here(), code_digest(), run.name)

    def check(self, store: Store, *, node: str) -> None:
        """Raise ClusterError if this process has other versions or code, or its store is another one.

        Args:
            store: as this process reaches it.
            node: what to call this node.
        """
        here = versions_here()
        differing = [
            f"{name} {here[name]}, not {version}" for name, version in self.versions.items() if here[name] != version
        ]
        if not differing and code_digest() != self.code:
            differing = ["other files of raysweep"]
        if differing:
            raise ClusterError(f"node {node} has {'; '.join(differing)}: install the same on all nodes")
        # At a URL it is the same for whoever reaches it.
        if store.is_local and not (store.root / "runs" / self.run).is_dir():
            raise ClusterError(
                f"node {node} does not see run {self.run!r} in {store.url}: give a --store that all nodes share"
            )
