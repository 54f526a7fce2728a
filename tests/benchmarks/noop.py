"""A stage that does nothing but leave a file: what remains is the runner's own time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from raysweep.data.corpora import Corpus
from raysweep.spec import Metric, StageSpec
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


class SplitNoop(WideNoop):
    wide: ClassVar[bool] = False
    kind: ClassVar[str] = "splitnoop"
