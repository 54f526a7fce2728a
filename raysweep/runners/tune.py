"""Ray Tune runs the trials: one Tune trial per variant and seed, each on a gang that the next one takes over warm."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.air.execution._internal import RayActorManager
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysweep.errors import RaysweepError
from raysweep.estimates import ToWrite
from raysweep.events import Event, Report, StageFailed
from raysweep.plan import Stage, Trial
from raysweep.runners.agreement import Agreement
from raysweep.runners.channel import EventSink, one_at_a_time
from raysweep.runners.cluster_checks import node_memories, refuse_unfit
from raysweep.runners.draining import watching_draining
from raysweep.runners.hardware import with_gangs_chosen
from raysweep.runners.interrupts import SAVE_SECONDS, UnsavedTraining
from raysweep.runners.out_of_memory import TRIED_WITH_LESS, AtWork, is_killed_for_memory
from raysweep.runners.pareto_asha import ParetoAshaScheduler
from raysweep.runners.queue import Beginnings, Queue
from raysweep.runners.ray_cluster import LostRoom, cluster_for, looking, start_ray
from raysweep.runners.ray_watch import ray_watched
from raysweep.runners.room import Gangs, Shape
from raysweep.runners.searchers import AsLongAsThereIs, Points, ThenShares, UnderWay
from raysweep.runners.tail import Tail
from raysweep.runners.trainable import SHARE, GangTrainable, point_of, trial_of
from raysweep.runners.watch import Process, Watch
from raysweep.runs import Run
from raysweep.search import ParetoAsha
from raysweep.secrets import without_secrets
from raysweep.store import Store
from raysweep.variants import SearchSpace

if TYPE_CHECKING:
    from raysweep.runners.optuna_search import StudySearch

logger = logging.getLogger(__name__)

# Tune would give them to gangs by way of Ray, which logs what it gives. Gangs have the environment of their raylet.
ENV_VARS_TO_PROPAGATE.difference_update([name for name in ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")])

# A node that is slow to start a process; one that is gone says so at once.
END_SECONDS = 30.0

# Of an actor that died, before why: that it did, and which one it was.
RAYS_PREFACE = re.compile(r"The actor died unexpectedly before finishing this task\.\n(\t\w+: .*\n)+(?=.)")


class _GangRequest(tune.PlacementGroupFactory):  # type: ignore[misc]
    """What Ray is asked for; Tune gives a warm gang to a trial that asks for an equal one, whatever their nodes.

    Args:
        shape: of the gang.
    """

    node: str | None = None
    """Where it is best placed, if there is still room as it is; inside one node alone."""

    def __init__(self, shape: Shape) -> None:
        bundles = [{"CPU": shape.cpus, "GPU": shape.gpus}] * shape.workers
        super().__init__(bundles, strategy="PACK" if shape.spans_nodes else "STRICT_PACK")

    def to_placement_group(self) -> Any:
        """Asked for now."""
        return placement_group(self.bundles, self.strategy, _soft_target_node_id=self.node)


class _AsQueued:
    """Has each trial's gang asked for on its node, and says which trial a gang that has got free takes.

    Schedulers pick the oldest that has not begun. It would be given that gang, and the one that is starting for it be
    thrown away: with trials shorter than a start, all but one gang would never come to work. Tune by itself picks any.
    """

    gangs: Gangs

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Right after it was handed out, and before anything is asked for it."""
        super().on_trial_add(tune_controller, trial)  # type: ignore[misc]
        trial.placement_group_factory.node = self.gangs.node_of(trial.trial_id)
        if SHARE in trial.config:
            trial.max_failures = 0  # What it fails at is left to the trial's own gang.

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """The first handed out of those that wait for room, if a gang of its shape is free.

        None else: Tune goes through the trials without a gang. Shares that wait for one end with the last trial.
        """
        live = tune_controller.get_live_trials()
        if all(SHARE in trial.config and trial.status == "PENDING" for trial in live):
            for trial in list(live):  # Of which stopping takes it out.
                tune_controller.stop_trial(trial)
        tunes = tune_controller._tune_controller  # What is given warns of attributes that it does not show.
        if not (free := tunes._actor_cache).num_cached_objects:
            return None
        waiting = map(tunes._actor_to_trial.get, tunes._actor_manager.pending_actors)  # As they were asked for.
        return next((each for each in waiting if each and free.has_cached_object(each.placement_group_factory)), None)


class _InOrder(_AsQueued, tune.schedulers.FIFOScheduler):  # type: ignore[misc]
    pass


class _Asha(_AsQueued, tune.schedulers.AsyncHyperBandScheduler):  # type: ignore[misc]
    pass


class _ParetoAsha(_AsQueued, ParetoAshaScheduler):
    pass


class _EndsWithoutRoom(tune.Callback):  # type: ignore[misc]
    """Ends the run where no gang can start any more."""

    def __init__(self, lost_room: LostRoom) -> None:
        self._lost_room = lost_room

    def __getstate__(self) -> dict[str, Any]:
        """Nothing; see `_Ends`."""
        return {}

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._lost_room.look()


class _Ends(tune.Callback):  # type: ignore[misc]
    """Notes that Tune started a trial, and how it ended it; `take_less` is told of one whose gang ran out of memory."""

    def __init__(
        self, run: Run, report: Report, gangs: Gangs, *, prunes: bool, take_less: Callable[[Mapping[str, Any]], bool]
    ) -> None:
        self._run, self._report, self._gangs, self._prunes, self._take_less = run, report, gangs, prunes, take_less

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles callbacks into its own experiment state, which is never restored from."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._gangs.started(trial.trial_id)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        result = trial.last_result or {}
        if self._prunes and result.get("raysweep_trial") and not result.get("ended"):
            self._run.add_pruned(result["raysweep_trial"], result["checkpoint_step"])

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        logger.warning("a trial goes on in another gang: %s", self._lost(trial)[0])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        cause, log = self._lost(trial)
        if SHARE in trial.config:
            logger.warning("a trial's own gang is left alone with its stages, as another failed: %s", cause)
            return
        where = ", ".join(f"{path}={value}" for path, value in trial.config.items())
        stage = f"gang-{trial.trial_id}"
        self._report(StageFailed(trial=where, stage=stage, kind="gang", cause=cause, log=log, retry=False))

    def _lost(self, trial: Any) -> tuple[str, str]:
        """See `_cause`; what ran out of memory takes less when it is tried again, in this run or by the next one."""
        cause, log = _cause(trial)
        if is_killed_for_memory(cause):
            try:
                if self._take_less(trial.config):
                    cause = f"{cause}; {TRIED_WITH_LESS}"
            except (OSError, RaysweepError) as error:
                logger.warning("the next try takes as much memory: %s", error)
        return cause, log


def _cause(trial: Any) -> tuple[str, str]:
    """What ended a trial's gang, in a line, and its log.

    Read where Tune writes it. `trial.get_error` looks where it is copied to later, and unpickles what it finds there.
    """
    if not trial.error_file:
        return "the gang was lost", ""
    log = without_secrets(Path(trial.error_file).read_text())
    return cause_of(log), log


def cause_of(log: str) -> str:
    """The line that says why, of what Tune has noted of each failure, the last one last."""
    said = re.split(r"(?m)^Failure # \d+ \(occurred at .*\)$", log)[-1].strip()
    lines = RAYS_PREFACE.sub("", said).splitlines() or ["the gang was lost"]
    if "ray::" not in lines[0]:  # Of an actor that died.
        return lines[0]
    # A traceback, which ends in the error: its kind, and its message, which may have several lines.
    errors = [found[1] for line in lines if (found := re.match(r"[A-Za-z_][\w.]*: (.*)", line))]
    return errors[-1] if errors else lines[-1]


def run_tune(space: SearchSpace, store: Store, run: Run, report: Report, *, trials: Sequence[Trial] | None) -> None:
    """Run trials on Ray: those given, or whatever Optuna suggests if None.

    Raises:
        ClusterError: if the cluster cannot hold one gang, or its nodes do not go together.
    """
    search, resources = space.declared.search, space.declared.resources.default
    beginnings = Beginnings(store.finished_ids())
    study: StudySearch | None = None
    if trials is None:
        from raysweep.runners.optuna_search import study_search

        study, num_trials = study_search(space, store, run.folder)
    else:
        num_trials = len(trials)
    if num_trials == 0:
        return
    host = start_ray()
    # With nothing chosen yet, no gang is larger than these.
    smallest = [each.without_autos() for each in space.declared.resources.by_variant.every]
    on_cluster = cluster_for(*smallest).may_grow
    if on_cluster:
        refuse_unfit(store, ToWrite.of(space, store))
    space = with_gangs_chosen(space, run, partial(node_memories, on_cluster=on_cluster), report)
    cluster = cluster_for(*space.resources.every)
    shapes = tuple(dict.fromkeys(cluster.shapes.values()))
    look = looking(shapes)
    gangs = Gangs(look, max_concurrent=resources.max_concurrent, may_grow=cluster.may_grow)
    lost_room = LostRoom(look, gangs, cluster, resources.max_node_wait_seconds)
    watching = [_EndsWithoutRoom(lost_room)] if cluster.may_grow else []

    def shape_of(point: Mapping[str, Any]) -> Shape:
        return cluster.shapes[space.resources.of(point)]

    def trial_shape(trial: Trial) -> Shape:
        return shape_of(trial.point)

    def is_wide(trial: Trial, stage: Stage) -> bool:
        return stage.spec.is_wide(space.resources.of(trial.point))

    queue = Queue(trials or (), beginnings, trial_shape)
    tail = Tail(beginnings, queue.durations, trial_shape, is_wide, may_end_early=search.scheduler is not None)
    under_way = UnderWay(beginnings, gangs, tail)
    if study:
        study.use(under_way, shapes)
    searcher = AsLongAsThereIs(ThenShares(study or Points(queue, under_way), under_way))
    report = one_at_a_time(report)
    watch = Watch(
        max_silence_seconds=resources.max_silence_seconds,
        max_idle_seconds=inf if resources.gpus_per_worker else resources.max_silence_seconds,
        end=_end,
        report=report,
    )
    training, at_work = UnsavedTraining(), AtWork()

    def tell(event: Event) -> None:
        training.take(event)
        at_work.take(event)
        beginnings.take(event)
        queue.take(event)
        tail.take(event)
        report(event)

    def take_less(config: Mapping[str, Any]) -> bool:
        return at_work.note_out_of_memory(trial_of(space, config), store, among=config.get(SHARE))

    sink = EventSink(host, tell, watch=watch)
    trainable = tune.with_parameters(
        GangTrainable,
        space=space,
        store_url=store.url,
        pruned=run.pruned(),
        events=sink.address,
        agreement=Agreement.of_driver(run) if cluster.may_grow else None,
    )
    scheduler: Any = _InOrder()
    if isinstance(asha := search.scheduler, ParetoAsha):
        scheduler = _ParetoAsha(asha)
    elif asha:
        scheduler = _Asha(
            time_attr="training_iteration",
            metric=asha.metric,
            mode=asha.mode,
            grace_period=asha.grace_checkpoints,
            reduction_factor=asha.reduction_factor,
            max_t=10**6,
        )
    scheduler.gangs = gangs
    # Beside Ray's own logs: Tune's files quote errors as they come, with whatever secrets these hold.
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    storage = Path(tempfile.mkdtemp(prefix="raysweep-", dir=session))
    tuner = tune.Tuner(
        tune.with_resources(trainable, lambda config: _GangRequest(shape_of(point_of(space, config)))),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=-1,  # As many as there come.
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=storage.name,
            storage_path=str(storage),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=resources.max_retries),
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            callbacks=[_Ends(run, report, gangs, prunes=search.scheduler is not None, take_less=take_less), *watching],
        ),
    )
    with sink, watch, watching_draining(sink.tell_draining), _outliving_kills_for_memory(), ray_watched() as gone:
        try:
            tuner.fit()
        except KeyboardInterrupt:  # Gangs go on until this process ends.
            if gone:
                raise
            logger.warning("saving what is being trained; press Ctrl-C again to leave at once")
            sink.ask_to_save()
            if not training.wait_until_saved(SAVE_SECONDS):
                logger.warning("not all was saved in %g s; training goes on from the last state saved", SAVE_SECONDS)
            raise
        finally:
            for folder in (storage, *session.glob(f"artifacts/*/{storage.name}")):
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _outliving_kills_for_memory() -> Iterator[None]:
    """While in it, Tune takes a gang that Ray has killed for its node's memory as one that died.

    By itself it would end the whole run: what manages its actors knows two kinds of errors, and this is neither.
    """
    failed = RayActorManager._actor_task_failed

    def lost(manager: RayActorManager, tracked_actor_task: Any, exception: Exception) -> None:
        error = RayActorError(None, str(exception)) if isinstance(exception, OutOfMemoryError) else exception
        failed(manager, tracked_actor_task, error)

    RayActorManager._actor_task_failed = lost
    try:
        yield
    finally:
        RayActorManager._actor_task_failed = failed


def _end(process: Process) -> None:
    """Kill a process for good, on whatever node; one that is stopped takes no other notice."""
    pid = process.pid

    def kill() -> None:  # Sent by value, so that nothing heavy is imported there.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    if process.node_id == ray.get_runtime_context().get_node_id():
        kill()
        return
    there = NodeAffinitySchedulingStrategy(process.node_id, soft=False)
    killing = ray.remote(kill).options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote()
    try:
        ray.get(killing, timeout=END_SECONDS)
    except ray.exceptions.GetTimeoutError:
        ray.cancel(killing)  # Not for whoever has that number by the time the node is back.
        raise
