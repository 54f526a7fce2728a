"""Learning to compare from a run or a table, and comparing two checkpoints by what was learnt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raysweep.results import Results
from raysweep.spec import fingerprint

if TYPE_CHECKING:
    import pandas as pd

    from raysweep.analysis.comparer_files import IndicatorFile
    from raysweep.analysis.given_table import Roles
    from raysweep.analysis.learning import Learnt
    from raysweep.analysis.ranking import Ranking


def learn_from_run(results: Results, folder: Path) -> list[Learnt]:
    """A comparer of the mean score and of each task's, saved in `folder`.

    Raises:
        CompareError: if there is too little to learn from.
    """
    from raysweep.analysis.ranking import MEAN_SCORE, rank, score

    targets = [MEAN_SCORE, *map(score, results.ranking.tasks)]
    rankings = [
        rank(results.checkpoints, columns=results.columns, noise=results.noise, target=target) for target in targets
    ]
    others = {MEAN_SCORE: ()} | {
        target: tuple(each for each in targets[1:] if each != target) for target in targets[1:]
    }
    return _learn(rankings, folder, results.run.name, versions=_versions(results.stages), others=others)


def learn_from_table(path: Path, roles: Roles, folder: Path) -> list[Learnt]:
    """A comparer of a table's target, saved in `folder`.

    Raises:
        CompareError: if there is too little to learn from.
        DataError: if the table is not what `roles` say.
    """
    from raysweep.analysis.given_table import rank_table

    return _learn([rank_table(path, roles)], folder, path.name, versions={}, others={})


def _learn(
    rankings: Sequence[Ranking],
    folder: Path,
    name: str,
    *,
    versions: Mapping[str, IndicatorFile],
    others: Mapping[str, Sequence[str]],
) -> list[Learnt]:
    from raysweep.analysis.comparer_files import IndicatorFile, save
    from raysweep.analysis.learning import learn_target

    learnt = [learn_target(ranking, others=others.get(ranking.target, ())) for ranking in rankings]
    needed = dict.fromkeys(indicator for each in learnt for indicator in each.comparer.indicators)
    save(
        folder,
        {each.tested.target: (each.comparer, each.tested.indicators.accuracy.value) for each in learnt},
        learnt_from=name,
        indicators={each: versions.get(each.partition("/")[0], IndicatorFile()) for each in needed},
    )
    return learnt


def _versions(stages: pd.DataFrame) -> dict[str, IndicatorFile]:
    """Kind of stage -> the fingerprints of its specs, and what it takes."""
    from raysweep.analysis.comparer_files import IndicatorFile

    found = {}
    done = stages[stages["settings"].notna()].drop_duplicates("id")
    for kind, rows in done.groupby("kind"):
        prints = sorted({version_of(json.loads(settings)) for settings in rows["settings"]})
        spent = (rows["wall_seconds"] * rows["world_size"].astype("float64")).median()
        found[str(kind)] = IndicatorFile(versions=tuple(prints), seconds=float(spent))
    return found


def version_of(spec: Mapping[str, object]) -> str:
    """Of a stage, as its record has it: two of one version measure the same thing."""
    return fingerprint(dict(spec))
