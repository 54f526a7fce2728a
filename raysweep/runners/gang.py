"""A gang: the worker processes of a trial. A stage runs on all of them, or several stages run side by side.

`Gang` is a gang of one, this process. `RayGang` is rank 0's view of more: rank 0 is the process it is made in, the
other ranks are actors on the remaining bundles of the same placement group.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any, NoReturn

from raysweep.errors import ClusterError, RaysweepError
from raysweep.events import Note, Report
from raysweep.plan import Stage
from raysweep.resources import Resources
from raysweep.runners.agreement import Agreement
from raysweep.runners.attempts import Failure, Outcome, attempt, fetch_inputs, make
from raysweep.runners.channel import Address
from raysweep.runners.heartbeat import start_beats, this_process
from raysweep.runners.interrupts import SaveFirst
from raysweep.runners.processes import LOOPBACK, join_process_group, leave_process_group, make_worker
from raysweep.secrets import without_secrets
from raysweep.spec import canonical
from raysweep.store import Store
from raysweep.worker import Worker, never

logger = logging.getLogger(__name__)

# How long the other ranks may take to notice that one of them failed.
SETTLE_SECONDS = 20.0

# How long a last word to the driver may take.
TELL_SECONDS = 5.0


class GangBroken(Exception):  # noqa: N818 - says what became of the gang
    """A worker died, or is stuck in a collective: the gang has to be replaced. `failure`: what rank 0 knows of it."""

    def __init__(self, message: str, failure: Failure | None = None) -> None:
        super().__init__(message)
        self.failure = failure


class Gang:
    """A gang of one: this process, on which every stage runs.

    Raises:
        ClusterError: if `resources` ask for a GPU and there is none.
    """

    def __init__(
        self,
        store: Store,
        resources: Resources,
        *,
        report: Report,
        save_asked: Callable[[], bool] = never,
    ) -> None:
        self.store, self.resources, self._report = store, resources, report
        self.worker = make_worker(resources, rank=0, world_size=1, save_asked=save_asked)
        with socket.create_server((LOOPBACK, 0)) as listener:
            port = listener.getsockname()[1]
            join_process_group(self.worker, resources, LOOPBACK, port, listener=listener, tell=self._note)

    def wide(self, stage: Stage) -> Outcome:
        """Run one stage on all ranks."""
        return make(stage, self.store, self.worker, self._report)

    def split(self, stages: Sequence[Stage]) -> Iterator[Outcome]:
        """Run independent stages, each on one rank; outcomes as they come."""
        for stage in stages:
            yield make(stage, self.store, self.worker.alone(), self._report)

    def drop_state(self, key: str) -> None:
        """Forget resumable state that no stage needs any more, on every rank's host."""
        self.store.drop_state(key)

    def memory_bytes(self) -> int:
        """What the rank that holds most does: on a GPU if it has one, else resident memory."""
        return _memory_bytes(self.worker)

    def close(self) -> None:
        """Leave the process group; no stage may run after it."""
        leave_process_group()

    def _note(self, message: str) -> None:
        self._report(Note(message=message))


class RayGang(Gang):
    """Rank 0's view of a gang whose other ranks are Ray actors of class `RankActor`.

    Args:
        start_rank: starts one of them.
        hosts: the address of each rank's node, or one that all are on.
    """

    def __init__(
        self,
        store: Store,
        resources: Resources,
        *,
        report: Report,
        start_rank: Callable[[int], Any],
        hosts: Sequence[str] = (LOOPBACK,),
        save_asked: Callable[[], bool] = never,
    ) -> None:
        self.store, self.resources, self._report = store, resources, report
        world_size = resources.workers
        self._others = [start_rank(rank) for rank in range(1, world_size)]
        if len(set(hosts)) == 1:  # Nobody else can reach them.
            hosts = [LOOPBACK] * world_size
        listener = socket.create_server((hosts[0], 0))
        port = listener.getsockname()[1]
        joined = [
            actor.join.remote(store.url, resources, rank, hosts, port) for rank, actor in enumerate(self._others, 1)
        ]
        self.worker = make_worker(resources, rank=0, world_size=world_size, save_asked=save_asked)
        # A rank that dies before it has joined would be waited for for half an hour.
        with _watch(joined, self._note):
            join_process_group(self.worker, resources, hosts[0], port, hosts=hosts, listener=listener, tell=self._note)
        _get(joined)

    def wide(self, stage: Stage) -> Outcome:
        """See `Gang.wide`. Raises GangBroken if a rank died, or is stuck."""
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(self.store.claim(stage.id))
                if record := self.store.get(stage.id, asked=canonical(stage.spec)):
                    return record
                self.store.work_dir(stage.id)
            except (OSError, RaysweepError) as error:
                return Failure.of(stage, error)
            fetching = [actor.fetch.remote(stage) for actor in self._others]
            failures: list[Failure | None] = [fetch_inputs(stage, self.store), *_get(fetching)]
            for failure in failures:
                if failure:
                    return failure
            running = [actor.run.remote(stage) for actor in self._others]
            with _watch(running, self._note):
                outcome = attempt(stage, self.store, self.worker, self._report)
            if isinstance(outcome, Failure):
                self._settle(running, outcome)
                return outcome
            _get(running)
            return outcome

    def split(self, stages: Sequence[Stage]) -> Iterator[Outcome]:
        """See `Gang.split`: ranks take the next stage as they get free. Raises GangBroken if a rank died."""
        waiting = deque(stages)
        # None: a rank has ended.
        made: SimpleQueue[Outcome | Exception | None] = SimpleQueue()

        def feed(actor: Any) -> None:
            try:
                with contextlib.suppress(IndexError):  # Another rank took the last one.
                    while True:
                        stage = waiting.popleft()
                        made.put(_get([actor.make.remote(stage)])[0])
            except Exception as error:
                made.put(error)
            made.put(None)

        for actor in self._others:
            threading.Thread(target=feed, args=(actor,), daemon=True).start()
        at_work, broken = len(self._others), None
        while at_work or waiting:
            with contextlib.suppress(IndexError):
                made.put(make(waiting.popleft(), self.store, self.worker.alone(), self._report))
            outcomes = [made.get()]
            while not made.empty():
                outcomes.append(made.get())
            for outcome in outcomes:
                if outcome is None:
                    at_work -= 1
                elif isinstance(outcome, Exception):
                    broken = broken or outcome
                    waiting.clear()
                else:
                    yield outcome
        if broken:
            raise broken

    def memory_bytes(self) -> int:
        """See `Gang.memory_bytes`. Raises GangBroken if a rank died."""
        others: list[int] = _get([actor.memory_bytes.remote() for actor in self._others])
        return max(super().memory_bytes(), *others)

    def drop_state(self, key: str) -> None:
        """See `Gang.drop_state`."""
        super().drop_state(key)
        _get([actor.drop_copies.remote(key) for actor in self._others])

    def close(self) -> None:
        """End the processes of the other ranks, and leave the process group."""
        import ray

        for actor in self._others:
            ray.kill(actor)
        leave_process_group()

    def _settle(self, running: list[Any], failure: Failure) -> None:
        """After rank 0 failed: the others have failed too, or are stuck and the gang is broken."""
        import ray

        done, stuck = ray.wait(running, num_returns=len(running), timeout=SETTLE_SECONDS)
        for ref in done:
            with contextlib.suppress(ray.exceptions.RayTaskError):
                _get([ref])
        if stuck:
            raise GangBroken(f"{len(stuck)} rank(s) are stuck after: {failure.cause}", failure)


class RankActor:
    """A rank other than 0; `ray.remote` makes an actor of it.

    Raises:
        ClusterError: if its node does not go together with the driver's.
    """

    def __init__(self, store: Store, agreement: Agreement | None) -> None:
        import ray

        if agreement:
            agreement.check(store, node=ray.util.get_node_ip_address())
        self._unreached: ClusterError | None = None

    def beat(self, address: Address, gang: str, rank: int, every_seconds: float) -> None:
        """Begin to give signs of life to the driver; `join`, which rank 0 waits for, raises if there is no way."""
        try:
            start_beats(address, this_process(gang, rank), every_seconds=every_seconds)
        except ClusterError as error:
            self._unreached = error

    def join(self, store_url: str, resources: Resources, rank: int, hosts: Sequence[str], port: int) -> None:
        """Enter the process group of the ranks on `hosts`, where rank 0 listens at `port`; returns when all have.

        Raises:
            ClusterError: if the driver cannot be reached from here.
        """
        if self._unreached:
            raise self._unreached
        self._store = Store(store_url)
        self._store.be_patient(resources.max_store_wait_seconds)
        # As of a node that is taken away: the ranks save together when one of them is asked to.
        self._saves = SaveFirst([signal.SIGTERM]).__enter__()
        self._worker = make_worker(resources, rank=rank, world_size=resources.workers, save_asked=self._saves.asked)
        join_process_group(self._worker, resources, hosts[0], port, hosts=hosts)

    def fetch(self, stage: Stage) -> Failure | None:
        """See `fetch_inputs`."""
        return fetch_inputs(stage, self._store)

    def memory_bytes(self) -> int:
        """What this process holds; see `Gang.memory_bytes`."""
        return _memory_bytes(self._worker)

    def drop_copies(self, state_key: str) -> None:
        """See `Store.drop_copies`."""
        self._store.drop_copies(state_key)

    def run(self, stage: Stage) -> None:
        """This rank's part of a wide stage."""
        outcome = attempt(stage, self._store, self._worker, self._saves.take)
        if isinstance(outcome, Failure):
            raise RuntimeError(f"rank {self._worker.rank}: {outcome.log}")

    def make(self, stage: Stage) -> Outcome:
        """A whole stage of a split."""
        return make(stage, self._store, self._worker.alone(), self._saves.take)


def _memory_bytes(worker: Worker) -> int:
    if worker.device.startswith("cuda"):
        import torch

        return int(torch.cuda.memory_reserved())
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _get(refs: list[Any]) -> list[Any]:
    """Results of other ranks. Raises GangBroken if one died."""
    import ray

    try:
        return list(ray.get(refs))
    except (
        ray.exceptions.RayActorError,
        ray.exceptions.OutOfMemoryError,
        ray.exceptions.RaySystemError,
    ) as error:
        raise GangBroken(f"a worker of the gang died: {error}") from error


def _exit_saying(message: str, note: Callable[[str], None]) -> NoReturn:
    """End this process, after a word to the driver if it takes one: to tell may raise, or wait for a lost driver."""
    logger.error(message)

    def tell() -> None:
        with contextlib.suppress(Exception):
            note(message)

    telling = threading.Thread(target=tell, daemon=True)
    telling.start()
    telling.join(TELL_SECONDS)
    os._exit(1)


@contextlib.contextmanager
def _watch(running: list[Any], note: Callable[[str], None]) -> Any:
    """While rank 0 waits for the others: if one of them is gone and rank 0 does not notice, say why and end rank 0.

    gloo notices a closed connection at once; nccl, and the making of a process group, wait for their time-out.
    """
    import ray

    left = threading.Event()

    def watch() -> None:
        waiting = list(running)
        while waiting and not left.is_set():
            done, waiting = ray.wait(waiting, timeout=1.0)
            for ref in done:
                try:
                    ray.get(ref)
                except Exception as error:
                    if not left.wait(SETTLE_SECONDS):
                        cause = without_secrets((str(error).strip() or repr(error)).splitlines()[-1])
                        message = f"a rank failed, and rank 0 is stuck in a collective: the gang is replaced ({cause})"
                        _exit_saying(message, note)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        left.set()
