"""What a run gave, as pandas tables: the Python face of the command line."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysweep.runners import run_sweep
from raysweep.runs import Run
from raysweep.space import SearchSpace
from raysweep.store import Store

if TYPE_CHECKING:
    import pandas as pd

    from raysweep.analysis.ranking import Ranking


@dataclass(frozen=True)
class Results:
    """A run's results; tables are read when first asked for."""

    run: Run

    @cached_property
    def stages(self) -> pd.DataFrame:
        """One row per stage result."""
        from raysweep.analysis.tables import stage_table

        return stage_table(self.run)

    @cached_property
    def checkpoints(self) -> pd.DataFrame:
        """One row per checkpoint: its point, indicators and fine-tuned scores."""
        from raysweep.analysis.tables import checkpoint_table

        return checkpoint_table(self.run)

    @cached_property
    def ranking(self) -> Ranking:
        """Checkpoints and indicators, best first."""
        from raysweep.analysis.ranking import rank

        return rank(self.checkpoints)

    @property
    def failures(self) -> list[dict[str, Any]]:
        """What failed, with its cause."""
        return self.run.failures()

    def write_report(self) -> Path:
        """Write report.html; returns its path."""
        from raysweep.analysis.report import write_report

        return write_report(self.run)


def run(space: SearchSpace, *, store: str | Path, runner: Any = "tune", name: str | None = None) -> Results:
    """See `raysweep.run`."""
    return Results(run_sweep(space, Store(store), runner=runner, name=name))
