"""Trials stopped early by several metrics at once, between checkpoints: Optuna's own `report` takes one objective."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from raysweep.search import ParetoAsha


class Rungs:
    """What trials had at each of their checkpoints, in the order in which they came there.

    Args:
        spec: by what they are compared, and how many go on.
    """

    def __init__(self, spec: ParetoAsha) -> None:
        self._spec = spec
        self._reached: defaultdict[int, dict[str, tuple[float, ...]]] = defaultdict(dict)

    def goes_on(self, trial: str, checkpoint: int, metrics: Mapping[str, Any]) -> bool:
        """Whether a trial is among the best part of those that have come to this checkpoint so far.

        Args:
            trial: what names it.
            checkpoint: of its own, counted from 1.
            metrics: as `kind/name`; a trial without one of the goals is not judged.
        """
        signs = [1 if goal.mode == "max" else -1 for goal in self._spec.goals]
        given = [metrics.get(goal.metric) for goal in self._spec.goals]
        mine = tuple(sign * (math.nan if value is None else value) for sign, value in zip(signs, given, strict=True))
        if any(map(math.isnan, mine)):
            return True
        reached = self._reached[checkpoint]
        reached[trial] = mine
        if checkpoint < self._spec.grace_checkpoints:
            return True
        num_better = sum(
            other != mine and all(theirs >= ours for theirs, ours in zip(other, mine, strict=True))
            for other in reached.values()
        )
        return num_better < max(1.0, len(reached) / self._spec.reduction_factor)


class ParetoAshaScheduler(FIFOScheduler):  # type: ignore[misc]
    """Stops what `Rungs` does not let go on."""

    def __init__(self, spec: ParetoAsha) -> None:
        super().__init__()
        self._rungs = Rungs(spec)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> str:
        """Told after each checkpoint of a trial."""
        goes_on = self._rungs.goes_on(trial.trial_id, int(result["training_iteration"]), result)
        return str(TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP)
