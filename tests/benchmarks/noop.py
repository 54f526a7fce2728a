"""A stage that does nothing but leave a file: what remains is the runner's own time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from raysweep.costs import Size
from raysweep.data.corpora import Corpus
from raysweep.resources import Resources
from raysweep.spec import Metric
from raysweep.stages.base import StageSpec
from raysweep.worker import Worker


class WideNoop(StageSpec):
    kind: ClassVar[str] = "noop"
    index: int

    def run(self, inputs: Mapping[str, Path], out: Path, worker: Worker) -> dict[str, float]:
        if worker.rank == 0:
            (out / "file").write_text("x")
        worker.barrier()
        return {"zero": 0.0}

    def metrics(self, corpus: Corpus) -> tuple[Metric, ...]:
        return (Metric("zero"),)

    def flops(self, size: Size, corpus: Corpus) -> float:
        return 0.0

    def memory_bytes(self, size: Size, resources: Resources) -> int:
        return 0

    def disk_bytes(self, size: Size) -> int:
        return 0


class SplitNoop(WideNoop):
    wide: ClassVar[bool] = False
    kind: ClassVar[str] = "splitnoop"
