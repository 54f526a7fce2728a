"""OptunaSearch whose study lives in the run, and goes on after a kill as if there had been none."""

from __future__ import annotations

import json
import logging
import math
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers._base import _CONSTRAINTS_KEY as CONSTRAINTS
from optuna.trial import FrozenTrial, TrialState, create_trial
from ray.tune.search.optuna import OptunaSearch
from sqlalchemy.exc import DatabaseError

from raysweep.plan import Trial
from raysweep.runners.chain import last_metrics, recall
from raysweep.runners.room import Shape
from raysweep.runners.searchers import UnderWay
from raysweep.runs import Run
from raysweep.search import LogUniform, RandInt, Uniform, Within
from raysweep.store import Store
from raysweep.variants import SearchSpace

logger = logging.getLogger(__name__)

BOUNDED = "raysweep:bounded"
"""Of a trial in the study: the value that `search.choose.within` is about."""
FOUND = "raysweep:found"
"""Of a trial in the study: it was run by another run, and does not count among this one's."""
AGAIN = "raysweep:again"
"""Of a trial in the study: the number of the one in whose place it is run, which counts no more, nor sets a bound."""

# Suggestions that may wait for a beginning which another trial is making, while further ones are asked for.
MAX_HELD = 8


class StudySearch(OptunaSearch):  # type: ignore[misc]
    """Tells Optuna a trial's last metrics; one without them (diverged, failed) is told as failed.

    A suggestion is held back while there is no room for its gang, and while another trial is at work on what it begins
    with.
    """

    within: Within | None = None
    """The bound that a chosen checkpoint keeps; the sampler prefers trials that do."""

    def hold(self, trial_of: Callable[[Mapping[str, Any]], Trial], num_trials: int) -> None:
        """Say how a point becomes a trial, and how many trials are still to be run."""
        self._trial_of, self._left = trial_of, num_trials
        self._held: dict[str, Trial] = {}

    def use(self, under_way: UnderWay, shapes: Collection[Shape]) -> None:
        """Say what trials are handed out beside, and all gangs that there are."""
        self._under_way, self._shapes = under_way, shapes

    def is_finished(self) -> bool:
        """Whether as many trials as were asked for are handed out."""
        return self._left <= 0

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The next point whose beginning nobody is at work on; None if there is none yet, or no room."""
        room = {shape for shape in self._shapes if self._under_way.gangs.has_room(shape)}
        if not room:
            return None
        trial = self._first_ready(self._held.values(), room)
        if trial is None and len(self._held) < min(MAX_HELD, self._left):
            trial = self._trial_of(super().suggest(trial_id))
            self._held[trial_id] = trial
            trial = self._first_ready([trial], room)
        if trial is None:
            return None
        asked_as = next(key for key, held in self._held.items() if held is trial)
        del self._held[asked_as]
        self._ot_trials[trial_id] = self._ot_trials.pop(asked_as)
        self._left -= 1
        self._under_way.start(trial_id, trial)
        return dict(trial.point)

    def _first_ready(self, trials: Iterable[Trial], room: Collection[Shape]) -> Trial | None:
        fit = (trial for trial in trials if self._under_way.shape_of(trial) in room)
        return self._under_way.beginnings.first_ready(fit)

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Nothing: goals belong to the last checkpoint, and Optuna's own pruners are not used."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the study a trial's last metrics, or that it has none: it was stopped, failed or diverged."""
        self._under_way.end(trial_id)
        if result and not error and not result.get("last"):
            # A scheduler stopped it: its metrics are an earlier checkpoint's.
            super().on_trial_complete(trial_id, None, error=False)
            return
        bounded = (result or {}).get(self.within.metric, math.nan) if self.within else math.nan
        if not math.isnan(bounded):
            self._ot_trials[trial_id].set_user_attr(BOUNDED, bounded)
        names = self._metric if isinstance(self._metric, list) else [self._metric]
        values = [(result or {}).get(name, math.nan) for name in names]
        missing = any(value is None or math.isnan(value) for value in values)
        super().on_trial_complete(trial_id, None if missing else result, error=error or missing)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: what is left to do is the study's to say."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the study is opened from its file, as `study_search` does."""


class _SamplerByNumber(optuna.samplers.TPESampler):  # type: ignore[misc]
    """TPE whose draws depend on the seed, the trial's number and what is known, not on the process's history."""

    def __init__(self, seed: int, constraints: Callable[[FrozenTrial], Sequence[float]] | None = None) -> None:
        with warnings.catch_warnings():
            # An experiment in Optuna 4, and in 5 to be replaced by what 4 does not have.
            warnings.simplefilter("ignore")
            super().__init__(seed=seed, constraints_func=constraints)
        self._seed = seed

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._rng.rng.seed(self._seed + trial.number)
        super().before_trial(study, trial)


def study_search(space: SearchSpace, store: Store, folder: Path) -> tuple[StudySearch, int]:
    """The searcher of a run, and how many trials are still to be run.

    A trial that was under way when the driver died goes on under its number and parameters. One that has ended with
    stages still to be run, as they failed or are of another version now, is run once more under another number.
    """
    search = space.declared.search
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directions = ["minimize" if goal.mode == "min" else "maximize" for goal in search.objectives]
    try:
        storage, study = _open_study(folder / "study.db", space.name, directions)
    except DatabaseError as error:
        # What its trials gave is in the store, and the sampler's draws are of the seed: it finds them again.
        store.set_aside(folder / "study.db", str(error.orig))
        storage, study = _open_study(folder / "study.db", space.name, directions)
    if search.warm_start and not study.get_trials(deepcopy=False):
        _warm_start(study, space, [run for run in Run.all(store) if run.folder != folder])
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
    ended = _count_ended(study, space, store)
    metrics = [goal.metric for goal in search.objectives]
    modes = [goal.mode for goal in search.objectives]
    searcher = StudySearch(
        space={path: _distribution(space, path) for path in space.declared.sweep},
        metric=metrics if len(metrics) > 1 else metrics[0],
        mode=modes if len(modes) > 1 else modes[0],
        storage=storage,
        study_name=space.name,
        sampler=_SamplerByNumber(search.seed, _constraints(study, search.choose.within) if search.choose else None),
    )
    searcher.within = search.choose.within if search.choose else None
    num_trials = max(0, (search.num_trials or 0) - ended)
    searcher.hold(lambda point: space.trial(point, space.declared.seeds[0]), num_trials)
    return searcher, num_trials


def _count_ended(study: optuna.Study, space: SearchSpace, store: Store) -> int:
    """How many of the study's own trials have all they will; those that have not are enqueued, each once.

    One that diverged, or that a scheduler stopped, has its outcome.
    """
    finished, ended = store.finished_ids(), 0
    for trial in _standing(study.get_trials()):
        if not trial.state.is_finished() or FOUND in trial.user_attrs:
            continue
        _, to_do = recall(space.trial(trial.params, space.declared.seeds[0]), store, finished)
        if to_do and trial.state is not TrialState.PRUNED:
            study.enqueue_trial(trial.params, user_attrs={AGAIN: trial.number})
        else:
            ended += 1
    return ended


def _standing(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Those in whose place no other is run."""
    replaced = {trial.user_attrs.get(AGAIN) for trial in trials}
    return [trial for trial in trials if trial.number not in replaced]


def _constraints(study: optuna.Study, within: Within) -> Callable[[FrozenTrial], Sequence[float]]:
    """How far a trial is beyond the bound of the best that has ended by then: Optuna asks once, at a trial's end."""

    def of(trial: FrozenTrial) -> Sequence[float]:
        if BOUNDED not in trial.user_attrs:  # Stopped early, or the metric is missing.
            return (sys.float_info.max,)
        others = [each for each in _standing(study.get_trials(deepcopy=False)) if each.state is TrialState.COMPLETE]
        values = [each.user_attrs[BOUNDED] for each in (*others, trial) if BOUNDED in each.user_attrs]
        return (within.excess(trial.user_attrs[BOUNDED], within.best(values)),)

    return of


def _warm_start(study: optuna.Study, space: SearchSpace, runs: Sequence[Run]) -> None:
    """Tell a new study what finished trials of other runs of its store gave, of points that this space has, too."""
    if not runs:
        return
    store, search = runs[0].store, space.declared.search
    finished = store.finished_ids()
    distributions = {path: _distribution(space, path) for path in space.declared.sweep}
    points = [row.point for run in runs for row in run.trials() if row.point.keys() == distributions.keys()]
    unique = {json.dumps(point, sort_keys=True): point for point in points}
    found = []
    for point in unique.values():
        if all(_has(distribution, point[path]) for path, distribution in distributions.items()):
            # By its ids: a run of another recipe has other stages, and these are not finished.
            metrics = last_metrics(space.trial(point, space.declared.seeds[0]), store, finished) or {}
            values = [metrics.get(goal.metric, math.nan) for goal in search.objectives]
            if not any(map(math.isnan, values)):
                found.append((point, values, metrics))
    within = search.choose.within if search.choose else None
    known = [metrics[within.metric] for _, _, metrics in found if within.metric in metrics] if within else []
    for point, values, metrics in found:
        attrs: dict[str, Any] = {FOUND: True}
        system_attrs: dict[str, Any] = {}
        bounded = metrics.get(within.metric, math.nan) if within else math.nan
        if within and not math.isnan(bounded):
            attrs[BOUNDED] = bounded
            system_attrs[CONSTRAINTS] = [within.excess(bounded, within.best(known))]
        study.add_trial(
            create_trial(
                params=dict(point),
                distributions=distributions,
                values=values,
                user_attrs=attrs,
                system_attrs=system_attrs,
            )
        )
    logger.info("the study begins with %d finished trials of the store", len(found))


def _has(distribution: BaseDistribution, value: Any) -> bool:
    try:
        return bool(distribution._contains(distribution.to_internal_repr(value)))
    except (TypeError, ValueError):
        return False


def _open_study(path: Path, name: str, directions: Sequence[str]) -> tuple[optuna.storages.RDBStorage, optuna.Study]:
    storage = optuna.storages.RDBStorage(f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": 60}})
    return storage, optuna.create_study(study_name=name, storage=storage, load_if_exists=True, directions=directions)


def _distribution(space: SearchSpace, path: str) -> BaseDistribution:
    axis = space.declared.sweep[path]
    if isinstance(axis, Uniform):
        return FloatDistribution(*axis.uniform)
    if isinstance(axis, LogUniform):
        return FloatDistribution(*axis.loguniform, log=True)
    if isinstance(axis, RandInt):
        return IntDistribution(*axis.randint)
    return CategoricalDistribution(space.values(path))
