"""One try at a stage in this process: a record in the store, or why there is none."""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace

from raysweep.errors import Diverged, LostError, RaysweepError, UnreachableError
from raysweep.events import Report, StageProgress
from raysweep.patience import is_away
from raysweep.plan import Stage
from raysweep.printable import duration
from raysweep.provenance import count_peak_memory_anew, provenance
from raysweep.record import Record
from raysweep.runners.out_of_memory import (
    TRIED_WITH_LESS,
    is_out_of_memory,
    note_kills,
    note_out_of_memory,
    release,
    times_out_of_memory,
    under_way_in,
)
from raysweep.secrets import without_secrets
from raysweep.spec import canonical
from raysweep.store import Store
from raysweep.worker import StateDir, Worker, ignore

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """Why a stage failed. `final`: trying again cannot help; `lost`: id of a finished stage to be made again.

    `no_room`: a disk was full, or a quota; `away`: a folder's server was gone, or a disk failed.
    """

    stage: Stage
    cause: str
    log: str
    final: bool
    lost: str | None = None
    no_room: bool = False
    away: bool = False

    @staticmethod
    def of(stage: Stage, error: BaseException) -> Failure:
        """What an exception says of the stage it came out of."""
        cause = f"{type(error).__name__}: {error}" if not isinstance(error, RaysweepError) else str(error)
        cause, log = without_secrets(cause), without_secrets("".join(traceback.format_exception(error)))
        # A user's mistake stays one. Whatever else it was (a full disk, memory, a lost file) may have passed.
        final = isinstance(error, RaysweepError) and not isinstance(error, UnreachableError | LostError)
        lost = error.stage_id if isinstance(error, LostError) else None
        # Writers of weights have errors of their own, which quote it.
        no_room = any(os.strerror(number) in str(error) for number in NO_ROOM)
        return Failure(
            stage=stage,
            cause=cause.strip(),
            log=log,
            final=final,
            lost=lost,
            no_room=no_room,
            away=is_away(error),
        )


Outcome = Record | Failure

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)

# A disk with more room than this was filled by something else, or is not the one that is full.
LITTLE_ROOM_BYTES = 2**27

# Where nothing but a try tells, between two of them.
QUOTA_SECONDS = 10.0


def wait_for_room(store: Store, tell: Callable[[str], None]) -> bool:
    """After a disk was full: wait until a local store's has got room again. False if that takes too long."""
    patience = store.patience.seconds
    if not store.is_local or not patience:
        return False
    before = _free_bytes(store)
    is_quota = before > LITTLE_ROOM_BYTES
    if is_quota and _has_room(store):
        return False
    tell(f"store {store.url!r} has no room: make some; waiting for it for up to {duration(patience)}")
    deadline, every = time.monotonic() + patience, QUOTA_SECONDS if is_quota else 1.0
    while time.monotonic() < deadline:
        time.sleep(min(every, patience))
        if _has_room(store) if is_quota else _free_bytes(store) >= before + 2**20:
            tell(f"store {store.url!r} has room again")
            return True
    return False


def _has_room(store: Store) -> bool:
    """Whether more than a little can be written, which quotas may forbid on a disk that has room."""
    try:
        with tempfile.TemporaryFile(dir=store.root) as file:
            os.posix_fallocate(file.fileno(), 0, LITTLE_ROOM_BYTES)
    except OSError as error:
        return error.errno not in NO_ROOM
    return True


def _free_bytes(store: Store) -> int:
    return shutil.disk_usage(store.root).free


def make(stage: Stage, store: Store, worker: Worker, report: Report = ignore) -> Outcome:
    """Run a stage in this process alone, unless it is finished already; `report` is told how far it is."""
    try:
        with store.claim(stage.id):
            if record := store.get(stage.id, asked=canonical(stage.spec)):
                return record
            store.work_dir(stage.id)
            _look_for_kills(stage, store)
            return attempt(stage, store, worker, report)
    except (OSError, RaysweepError) as error:  # A full disk, most likely.
        return Failure.of(stage, error)


def fetch_inputs(stage: Stage, store: Store) -> Failure | None:
    """Have what a stage reads on this host, verified. On every rank before any begins: none waits for one that cannot.

    Returns:
        None, or why it cannot be had.
    """
    try:
        _look_for_kills(stage, store)
        for stage_id in stage.inputs.values():
            store.folder(stage_id)
    except (OSError, RaysweepError) as error:
        return Failure.of(stage, error)
    return None


def _look_for_kills(stage: Stage, store: Store) -> None:
    if note_kills(store.state_dir(stage.state_key or stage.id)):
        logger.warning(
            "the kernel killed a process here, as memory ran out, while stage %s was made: it is made with less, if it "
            "trains",
            stage.id,
        )


_under_way: list[str] = []


def under_way() -> str:
    """The id of the stage that this process is at work on; empty if there is none."""
    return _under_way[-1] if _under_way else ""


def attempt(stage: Stage, store: Store, worker: Worker, report: Report = ignore) -> Outcome:
    """One rank's part of a stage whose claim is held and whose work folder is empty; rank 0 commits. Raises nothing."""
    started = time.time()
    count_peak_memory_anew(worker.device)
    spec = stage.spec
    record = Record(
        id=stage.id,
        kind=stage.kind,
        status="done",
        spec=canonical(spec),
        inputs=dict(stage.inputs),
        metrics={},
        provenance={},
        files={},
    )
    _under_way.append(stage.id)
    states, times = None, 0
    ran_out = False
    begun = contextlib.ExitStack()
    try:
        states = store.state_dir(stage.state_key or stage.id)
        out = store.partial_dir(stage.id)
        times = times_out_of_memory(states)
        begun.enter_context(under_way_in(states, rank=worker.rank, times=times))
        worker = replace(
            worker.saving_memory(times),
            state_dir=states,
            report=lambda step: report(StageProgress(stage=stage.id, kind=stage.kind, at=step)),
        )
        inputs = {role: store.folder(stage_id) for role, stage_id in stage.inputs.items()}
        try:
            metrics = spec.run(inputs, out, worker)
        except Diverged as outcome:
            record = replace(record, status="diverged")
            metrics = {"diverged_step": float(outcome.step), "diverged_loss": outcome.loss}
        if worker.rank > 0:  # Rank 0 alone commits; the others' answer says that they came to the end.
            return record
        # What is no result must not stand among results: it would differ each time the stage is made again.
        timings = {metric.name: metrics[metric.name] for metric in spec.timings if metric.name in metrics}
        metrics = {name: value for name, value in metrics.items() if name not in timings}
        known = timings | provenance(started=started, finished=time.time(), worker=worker)
        record = store.commit(replace(record, metrics=metrics, provenance=known), out)
        if stage.state_key is None:  # What several stages hand on is dropped with the trial.
            store.drop_state(stage.id)
        return record
    except Exception as error:
        failure = Failure.of(stage, error)
        if store.is_away():  # What reads its files may say that they are not there, or no such.
            failure = replace(failure, away=True, final=False, lost=None)
        if states and (ran_out := is_out_of_memory(error)):
            failure = _noted(failure, states, times)
        logger.warning("stage %s failed: %s", stage.id, failure.cause)
        return failure
    finally:
        begun.close()
        _under_way.clear()
        if spec.wide or ran_out:  # Where the large cycles are: engines, models and their graphs.
            gc.collect()
        if ran_out:
            release()


def _noted(failure: Failure, states: StateDir, times: int) -> Failure:
    """Have the next try take less memory."""
    try:
        note_out_of_memory(states, times)
    except (OSError, RaysweepError) as error:
        logger.warning("the next try of %s takes as much memory: %s", failure.stage.id, error)
        return failure
    return replace(failure, cause=f"{failure.cause}; {TRIED_WITH_LESS}")
