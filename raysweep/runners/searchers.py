"""What Tune asks for more to run: the next trial, and when none is left, a share of one that is under way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray.tune.search import Searcher
from ray.tune.search.search_generator import SearchGenerator

from raysweep.plan import Trial
from raysweep.runners.queue import Beginnings, Queue
from raysweep.runners.room import Gangs
from raysweep.runners.tail import Share, Tail
from raysweep.runners.trainable import SHARE

if TYPE_CHECKING:
    from raysweep.runners.optuna_search import StudySearch


class UnderWay:
    """All that is handed out: what it trains, the room it holds, and what of it others may be given.

    Args:
        beginnings: who trains what.
        gangs: who holds which room.
        tail: what others may be given.
    """

    def __init__(self, beginnings: Beginnings, gangs: Gangs, tail: Tail) -> None:
        self.beginnings, self.gangs, self.tail = beginnings, gangs, tail
        self.shape_of = tail.shape_of

    def start(self, key: str, trial: Trial) -> None:
        """Note that a trial is handed out, under a `key` for `end`."""
        self.beginnings.start(key, trial)
        self.gangs.start(key, self.shape_of(trial))
        self.tail.start(key, trial)

    def start_share(self, key: str, share: Share) -> None:
        """Note that a share is handed out, under a `key` for `end`."""
        self.gangs.start(key, self.shape_of(share.trial))

    def end(self, key: str) -> None:
        """Note that what was handed out under `key` has ended, however it did: what it left undone is for others."""
        self.beginnings.end(key)
        self.gangs.end(key)
        self.tail.end(key)


class Points(Searcher):  # type: ignore[misc]
    """Hands trials out as their queue says: where there is room, and nobody else is at work on what they begin with."""

    def __init__(self, queue: Queue, under_way: UnderWay) -> None:
        super().__init__()
        self._queue, self._under_way = queue, under_way

    def is_finished(self) -> bool:
        """Whether all trials are handed out."""
        return not self._queue

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The config of the next trial; None while each that is left waits for another, or for room."""
        trial = self._queue.next(self._under_way.gangs.has_room)
        if trial is None:
            return None
        self._under_way.start(trial_id, trial)
        return {**trial.point, "seed": trial.seed}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """What it left undone is for another to begin with."""
        self._under_way.end(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: what is left to do is the store's to say."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: trials that are finished are not handed out, as the store has them."""


class ThenShares(Searcher):  # type: ignore[misc]
    """Hands out what another searcher does, and when that has nothing left, shares of what is under way.

    Args:
        trials: the other one.
        under_way: what is handed out, by the other one, too.
    """

    def __init__(self, trials: Points | StudySearch, under_way: UnderWay) -> None:
        super().__init__()
        self._trials, self._under_way = trials, under_way
        self._next: Share | None = None
        self._shares: set[str] = set()

    def is_finished(self) -> bool:
        """Whether there is nothing to hand out: trials for good, shares for now. A share that is found stays for
        `suggest`, as Tune asks before it closes a gang that could take it."""
        if not self._trials.is_finished():
            return False
        self._next = self._next or self._under_way.tail.next(self._under_way.gangs.has_room_now)
        return self._next is None

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The config of the next trial, or of a share of one; None as long as there is neither, or no room."""
        if self.is_finished():
            return None
        if self._next is None:
            return self._trials.suggest(trial_id)
        share, self._next = self._next, None
        self._shares.add(trial_id)
        self._under_way.start_share(trial_id, share)
        return {**share.trial.point, "seed": share.trial.seed, SHARE: share.stages}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Told to the other one, if it is of a trial."""
        if trial_id not in self._shares:
            self._trials.on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Told to the other one, if it is of a trial."""
        if trial_id in self._shares:
            self._under_way.end(trial_id)
        else:
            self._trials.on_trial_complete(trial_id, result, error)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: what is left to do is the store's to say, or the study's."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing; see `save`."""


class AsLongAsThereIs(SearchGenerator):  # type: ignore[misc]
    """Finished while there is nothing to hand out, so that Tune closes gangs that get free, and asked when there is."""

    def is_finished(self) -> bool:
        """Whether Tune need not ask for more now."""
        return bool(self._finished or self.searcher.is_finished())
