"""What runs in a gang's rank 0: a trial in Tune's eyes, gone on with leg by leg."""

from __future__ import annotations

import logging
import signal
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import FrameType
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raysweep.errors import ClusterError
from raysweep.events import Event, Note, StageProgress, TrialStarted
from raysweep.plan import Trial
from raysweep.resources import Resources
from raysweep.runners.agreement import Agreement
from raysweep.runners.chain import Leg, run_chain, run_share
from raysweep.runners.channel import Address, EventSource
from raysweep.runners.gang import Gang, GangBroken, RankActor, RayGang
from raysweep.runners.heartbeat import start_beats, this_process
from raysweep.runners.interrupts import SaveFirst
from raysweep.runners.journal import trial_row
from raysweep.runners.watch import beat_seconds
from raysweep.store import Store
from raysweep.variants import SearchSpace

logger = logging.getLogger(__name__)

SHARE = "(share)"
"""In a config: ids of stages, which are all that is to be made of the trial; no axis can have such a name."""

# A gang is replaced when a trial leaves it this much larger than its first trial did, in bytes.
MEMORY_SLACK = 2**30


class GangTrainable(tune.Trainable):  # type: ignore[misc]
    """A trial in Tune's eyes; each `step` runs on to the next checkpoint. Its config is the point, and the seed."""

    def setup(
        self,
        config: dict[str, Any],
        space: SearchSpace,
        store_url: str,
        pruned: Mapping[str, int],
        events: Address,
        agreement: Agreement | None,
    ) -> None:
        """Make the gang: this process is rank 0, the other ranks take the other bundles.

        Raises:
            ClusterError: if this node does not go together with the driver's, or cannot reach it.
        """
        self._space, self._pruned = space, pruned
        self._current = ""
        self._is_in_step = False
        resources = space.declared.resources.default
        self._store, self._agreement = Store(store_url), agreement
        if agreement:
            agreement.check(self._store, node=ray.util.get_node_ip_address())
        self._address, self._events = events, EventSource(events)
        self._store.be_patient(
            resources.max_store_wait_seconds, lambda message: self._events.tell(Note(message=message))
        )
        self._beats = uuid.uuid4().hex, beat_seconds(resources.max_silence_seconds)
        name, every = self._beats
        start_beats(events, this_process(name, 0), every_seconds=every, trial=lambda: self._current)
        self._nodes = frozenset(_nodes())
        self._rays_own: Any = signal.signal(signal.SIGTERM, self._leave)
        self._saves = SaveFirst([signal.SIGTERM]).__enter__()
        self._resources = space.resources.of(point_of(space, config))
        self._gang = self._make_gang()
        self._first_memory: int | None = None
        self._unfit: str | None = None
        self._begin(config)

    def _make_gang(self) -> Gang:
        callbacks: dict[str, Any] = {"report": self._tell, "save_asked": self._save_asked}
        if self._resources.workers == 1:
            return Gang(self._store, self._resources, **callbacks)
        start_rank = _rank_starter(self._resources, self._store, self._agreement)
        name, every = self._beats

        def start(rank: int) -> Any:
            actor = start_rank(rank)
            actor.beat.remote(self._address, name, rank, every)
            return actor

        return RayGang(self._store, self._resources, **callbacks, start_rank=start, hosts=_hosts())

    def _begin(self, config: Mapping[str, Any]) -> None:
        trial = trial_of(self._space, config)
        self._current = trial.id
        if SHARE in config:
            self._stop_after, self._legs = None, self._share(trial, config[SHARE])
            return
        self._stop_after = self._pruned.get(trial.id)
        self._events.tell(TrialStarted(row=trial_row(trial)))
        self._legs = self._chain(trial)

    # Both begin when the first leg is asked for: what goes wrong then is tried again, see `reset_config`.
    def _chain(self, trial: Trial) -> Iterator[Leg]:
        gang = self._gang_for(trial)
        yield from run_chain(trial, gang, max_retries=gang.resources.max_retries, report=self._tell)

    def _share(self, trial: Trial, ids: Sequence[str]) -> Iterator[Leg]:
        run_share(trial, ids, self._gang_for(trial), report=self._tell)
        yield Leg(step=trial.last_step, metrics={}, last=True)

    def _gang_for(self, trial: Trial) -> Gang:
        resources = self._space.resources.of(trial.point)
        if resources != self._resources:  # As many workers, or another gang would have been given the trial.
            self._gang.close()
            self._resources = resources
            self._gang = self._make_gang()
        return self._gang

    def step(self) -> dict[str, Any]:
        """The metrics of the next checkpoint.

        Raises:
            RayActorError: if this gang is to be replaced, before the trial begins (see `reset_config`) or since one of
                its nodes is about to be taken away.
        """
        if self._unfit:
            raise _taken_away(self._unfit)
        self._is_in_step = True
        try:
            leg = next(self._legs)
            if leg.last:
                next(self._legs, None)  # Lets the chain tidy up.
        except _Left:
            raise _taken_away("a node of its gang was about to be taken away") from None
        finally:
            self._is_in_step = False
        ended = leg.last or leg.step == self._stop_after
        # What was told is with the driver before Tune may end the run.
        self._events.wait()
        # Tune sets "done" of a trial that a scheduler stops, too; "ended" is the trial's own word.
        progress = {"checkpoint_step": leg.step, "raysweep_trial": self._current, "last": leg.last}
        return {**leg.metrics, **progress, "ended": ended, "done": ended}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take another trial over, warm. If this gang is unfit for it, `step` hands the trial on.

        Never False, and nothing is raised here: either would lose the trial, as Tune has not started it yet.
        """
        try:
            memory = self._gang.memory_bytes()
            self._first_memory = self._first_memory or memory
            if memory > self._first_memory + MEMORY_SLACK:
                self._unfit = f"a worker grew from {self._first_memory} to {memory} bytes; its gang is replaced"
                logger.warning(self._unfit)
            else:
                self._begin(new_config)
        # A rank has died; or the driver cannot be reached, which a new gang finds out for itself.
        except (GangBroken, ClusterError) as error:
            self._unfit = str(error)
        return True

    def cleanup(self) -> None:
        """End the other ranks with this one."""
        self._gang.close()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: the store is what a trial goes on from."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing: the stages that are in the store are taken from there."""

    def _tell(self, event: Event) -> None:
        """Tell the driver, and leave if that is asked for and nothing would be lost."""
        if isinstance(event, StageProgress):
            event = replace(event, trial=self._current)
        self._events.tell(event)
        self._look_at_nodes()
        self._saves.take(event)

    def _save_asked(self) -> bool:
        self._look_at_nodes()
        return self._events.save_asked() or self._saves.asked()

    def _look_at_nodes(self) -> None:
        """Take it as SIGTERM, as from here on it is the same, if a node of this gang is about to be taken away."""
        if not self._saves.asked() and self._nodes & self._events.draining():
            signal.raise_signal(signal.SIGTERM)

    def _leave(self, number: int, frame: FrameType | None) -> None:
        if self._is_in_step:
            raise _Left
        self._rays_own(number, frame)


class _Left(BaseException):
    """Passes through whatever tries a stage again."""


def _taken_away(why: str) -> RayActorError:
    """Has Tune try a trial again in a new gang, and count no failure: its actor was taken away from it."""
    return RayActorError(None, why, False, True)  # By place: keywords are lost in pickling.


def _nodes() -> list[str]:
    """The id of each rank's node: that of the bundle of the rank's number."""
    places = ray.util.placement_group_table(ray.util.get_current_placement_group())["bundles_to_node_id"]
    return [node for _, node in sorted(places.items())]


def point_of(space: SearchSpace, config: Mapping[str, Any]) -> dict[str, Any]:
    """The point of a trial's config, which holds its seed, too."""
    return {name: config[name] for name in space.declared.sweep if name in config}


def trial_of(space: SearchSpace, config: Mapping[str, Any]) -> Trial:
    """The trial of a config; see `point_of`."""
    return space.trial(point_of(space, config), config.get("seed", space.declared.seeds[0]))


def _hosts() -> list[str]:
    """The address of each rank's node."""
    addresses = {node["NodeID"]: str(node["NodeManagerAddress"]) for node in ray.nodes()}
    return [addresses[node] for node in _nodes()]


def _rank_starter(resources: Resources, store: Store, agreement: Agreement | None) -> Callable[[int], Any]:
    group = ray.util.get_current_placement_group()

    def start(rank: int) -> Any:
        strategy = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=rank)
        return (
            ray.remote(RankActor)
            .options(
                num_cpus=resources.cpus_per_worker,
                num_gpus=resources.gpus_per_worker,
                scheduling_strategy=strategy,
            )
            .remote(store, agreement)
        )

    return start
