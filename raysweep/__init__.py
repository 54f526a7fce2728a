"""raysweep: of many ways to pretrain, which checkpoint will fine-tune best?

    space = raysweep.load("search_spaces/quickstart.yaml")
    results = raysweep.run(space, store="raysweep-store")
    results.checkpoints           # a pandas DataFrame, one row per checkpoint
    results.ranking.best          # the best one's row; results.ranking.best["location"]: its folder

    raysweep.Results.open("quickstart-0123456789", store="raysweep-store")   # a run of before

Nothing heavy is imported until it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from raysweep.results import Results
    from raysweep.variants import SearchSpace

__all__ = ["Results", "Store", "load", "rank", "run"]


def load(path: str | Path, overrides: Sequence[str] = ()) -> SearchSpace:
    """Read, validate and pin a sweep file.

    Args:
        path: of the file.
        overrides: values in place of the file's, as `raysweep run` takes them: ["pretrain.steps=200"].

    Raises:
        SpaceError: with every finding; a DataError if all of them are of data.
    """
    from raysweep.space import load

    return load(path, overrides)


def run(space: SearchSpace, *, store: str | Path, runner: str = "tune", name: str | None = None) -> Results:
    """Run what of a sweep is not finished, as `raysweep run` does.

    Args:
        space: from `load`.
        store: folder or fsspec URL.
        runner: "tune", on Ray, or "inline", in this process.
        name: of the run; None: from the sweep's name and identity.

    Raises:
        RaysweepError: if something has to be mended first. Stages that failed are in `Results.failures`.
    """
    from raysweep.results import run

    return run(space, store=store, runner=runner, name=name)


def __getattr__(name: str) -> Any:
    if name == "Results":
        from raysweep.results import Results

        return Results
    if name == "Store":
        from raysweep.store import Store

        return Store
    if name == "rank":
        from raysweep.analysis.ranking import rank

        return rank
    raise AttributeError(f"module 'raysweep' has no attribute {name!r}")
