"""What a run gave, as pandas tables: the Python face of the command line."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysweep.errors import SpaceError
from raysweep.runners import run_sweep
from raysweep.runs import Run
from raysweep.scores import Column
from raysweep.space import load
from raysweep.store import DEFAULT_ROOT, Store
from raysweep.variants import SearchSpace

if TYPE_CHECKING:
    import pandas as pd

    from raysweep.analysis.ranking import Ranking
    from raysweep.analysis.uncertainty import TaskNoise


@dataclass(frozen=True)
class Results:
    """A run's results. Tables are read when first asked for, and once: open it again to see what came since."""

    run: Run
    target: str = ""
    """The column that checkpoints are ranked by; empty: `ranking.default_target`."""

    @staticmethod
    def open(run: str | Path, *, store: str | Path | None = None, overrides: Sequence[str] = ()) -> Results:
        """The results of a run that was started before.

        Args:
            run: its name or folder, or its sweep file.
            store: folder or fsspec URL; None: that of the run's folder, else "raysweep-store".
            overrides: `key=value` that the sweep file was run with.

        Raises:
            StoreError: if there is no such run; the message lists those there are.
            SpaceError: if the sweep file is not one, or overrides are given without one.
        """
        path = Path(run).absolute()
        if path.suffix in (".yaml", ".yml") and os.path.isfile(path):
            return Results(Run.find(Store(store or DEFAULT_ROOT), load(path, overrides).run_name()))
        if overrides:
            raise SpaceError(f"{overrides[0]!r} changes a sweep file, and {str(run)!r} is none; name the run alone")
        # Not Path.is_file, which raises where a name is too long to be one.
        if store is None and os.path.isfile(path / "sweep.yaml"):
            return Results(Run.find(Store(path.parent.parent), path.name))
        return Results(Run.find(Store(store or DEFAULT_ROOT), str(run)))

    def by(self, target: str) -> Results:
        """The same tables, as far as they are read, ranked by a column of them."""
        other = replace(self, target=target)
        tables = ("stages", "noise", "columns", "checkpoints")
        other.__dict__.update({name: self.__dict__[name] for name in tables if name in self.__dict__})
        return other

    @cached_property
    def stages(self) -> pd.DataFrame:
        """One row per stage of each started trial: status, metrics, settings, time; see `stage_table`."""
        from raysweep.analysis.tables import stage_table

        return stage_table(self.run)

    @cached_property
    def checkpoints(self) -> pd.DataFrame:
        """One row per checkpoint: its point, indicators, fine-tuned scores, and the folder it lies in."""
        from raysweep.analysis.tables import checkpoints_of

        return checkpoints_of(self.stages, self.noise, self.columns)

    @cached_property
    def noise(self) -> Mapping[str, TaskNoise]:
        """Column -> the errors of a task's scores and of their differences, over test examples and seeds."""
        from raysweep.analysis.tables import noise_of

        return noise_of(self.run.store, self.stages)

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        """What the metric columns of `checkpoints` are: kind, task, direction and unit."""
        from raysweep.analysis.tables import columns_of

        return columns_of(self.run)

    @cached_property
    def ranking(self) -> Ranking:
        """Checkpoints by the target and indicators by agreement with it, best first.

        Raises:
            ValueError: if there is no such column.
            DataError: if checkpoints do not compare by it.
        """
        from raysweep.analysis.ranking import default_target, rank

        target = self.target or default_target(self.checkpoints, self.columns)
        return rank(self.checkpoints, columns=self.columns, noise=self.noise, target=target)

    @property
    def failures(self) -> list[dict[str, Any]]:
        """What failed and is not finished yet: stage, kind, trial, cause, attempts and log of each."""
        return self.run.failures()

    def write_report(self) -> Path:
        """Write report.html, and the tables as Parquet, into the run's folder; the path of the page."""
        from raysweep.analysis.report import write_report
        from raysweep.analysis.tables import write_tables

        write_tables(self.run, self.stages, self.checkpoints, self.columns)
        return write_report(self.run, self.stages, self.ranking)

    def _repr_html_(self) -> str:
        """For notebooks: the headline and the checkpoints, best first."""
        from raysweep.analysis.report import ranking_html

        return ranking_html(self.ranking)


def run(space: SearchSpace, *, store: str | Path, runner: Any = "tune", name: str | None = None) -> Results:
    """Run what of a sweep is not finished yet, and look at the results; see `raysweep.run`."""
    return Results(run_sweep(space, Store(store), runner=runner, name=name))
