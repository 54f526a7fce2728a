"""A gang: the worker processes of a trial. A stage runs on all of them, or several stages run side by side.

`Gang` is a gang of one, this process. `RayGang` is rank 0's view of more: rank 0 is the process it is made in, the
other ranks are actors on the remaining bundles of the same placement group.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raysweep.errors import ClusterError, Diverged, RaysweepError, UnreachableError
from raysweep.plan import Stage
from raysweep.provenance import provenance
from raysweep.search import Resources
from raysweep.spec import canonical
from raysweep.store import Record, Store
from raysweep.worker import Worker

logger = logging.getLogger(__name__)

# How long the other ranks may take to notice that one of them failed.
SETTLE_SECONDS = 20.0


class GangBroken(Exception):  # noqa: N818 - says what became of the gang
    """A worker died, or is stuck in a collective: the gang has to be replaced. `failure`: what rank 0 knows of it."""

    def __init__(self, message: str, failure: Failure | None = None) -> None:
        super().__init__(message)
        self.failure = failure


@dataclass(frozen=True)
class Failure:
    """Why a stage failed. `final`: trying again cannot help."""

    stage: Stage
    cause: str
    log: str
    final: bool

    @staticmethod
    def of(stage: Stage, error: BaseException) -> Failure:
        """What an exception says of the stage it came out of."""
        cause = f"{type(error).__name__}: {error}" if not isinstance(error, RaysweepError) else str(error)
        log = "".join(traceback.format_exception(error))
        # A user's mistake stays one. Whatever else it was (a full disk, memory, a lost file) may have passed.
        final = isinstance(error, RaysweepError) and not isinstance(error, UnreachableError)
        return Failure(stage=stage, cause=cause.strip(), log=log, final=final)


Outcome = Record | Failure


class Gang:
    """A gang of one."""

    def __init__(self, store: Store, resources: Resources, *, report: Callable[[Mapping[str, Any]], None]) -> None:
        self.store = store
        self.worker = make_worker(resources, rank=0, world_size=1, report=report)
        join_process_group(self.worker, resources, "127.0.0.1", _free_port())

    def wide(self, stage: Stage) -> Outcome:
        """Run one stage on all ranks."""
        return make(stage, self.store, self.worker)

    def split(self, stages: Sequence[Stage]) -> list[Outcome]:
        """Run independent stages, each on one rank; outcomes in the order of `stages`."""
        return [make(stage, self.store, self.worker.alone()) for stage in stages]

    def memory_bytes(self) -> int:
        """What this process holds: on a GPU if it has one, else resident memory."""
        if self.worker.device.startswith("cuda"):
            import torch

            return int(torch.cuda.memory_reserved())
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def close(self) -> None:
        """Give the processes back."""
        leave_process_group()


class RayGang(Gang):
    """Rank 0's view of a gang whose other ranks are Ray actors of class `RankActor`."""

    def __init__(
        self,
        store: Store,
        resources: Resources,
        *,
        report: Callable[[Mapping[str, Any]], None],
        start_rank: Callable[[int], Any],
    ) -> None:
        self.store = store
        world_size = resources.workers
        self._others = [start_rank(rank) for rank in range(1, world_size)]
        import ray

        address, port = ray.util.get_node_ip_address(), _free_port()
        joined = [
            actor.join.remote(store.url, resources, rank, address, port) for rank, actor in enumerate(self._others, 1)
        ]
        self.worker = make_worker(resources, rank=0, world_size=world_size, report=report)
        # A rank that dies before it has joined would be waited for for half an hour.
        with _watch(joined):
            join_process_group(self.worker, resources, address, port)
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
            running = [actor.run.remote(stage) for actor in self._others]
            with _watch(running):
                outcome = _attempt(stage, self.store, self.worker)
            if isinstance(outcome, Failure):
                self._settle(running, outcome)
                return outcome
            _get(running)
            return outcome

    def split(self, stages: Sequence[Stage]) -> list[Outcome]:
        """See `Gang.split`: ranks take the next stage as they get free. Raises GangBroken if a rank died."""
        waiting = deque(enumerate(stages))
        outcomes: dict[int, Outcome] = {}
        broken: list[Exception] = []

        def feed(actor: Any) -> None:
            while waiting and not broken:
                with contextlib.suppress(IndexError):  # Another rank took the last one.
                    index, stage = waiting.popleft()
                    try:
                        outcomes[index] = _get([actor.make.remote(stage)])[0]
                    except Exception as error:
                        broken.append(error)

        feeders = [threading.Thread(target=feed, args=(actor,), daemon=True) for actor in self._others]
        for feeder in feeders:
            feeder.start()
        while waiting and not broken:
            with contextlib.suppress(IndexError):
                index, stage = waiting.popleft()
                outcomes[index] = make(stage, self.store, self.worker.alone())
        for feeder in feeders:
            feeder.join()
        if broken:
            raise broken[0]
        return [outcomes[index] for index in range(len(stages))]

    def close(self) -> None:
        """End the other ranks."""
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
    """A rank other than 0; `ray.remote` makes an actor of it."""

    def join(self, store_url: str, resources: Resources, rank: int, address: str, port: int) -> None:
        """Enter the process group."""
        self._store = Store(store_url)
        self._worker = make_worker(resources, rank=rank, world_size=resources.workers)
        join_process_group(self._worker, resources, address, port)

    def run(self, stage: Stage) -> None:
        """This rank's part of a wide stage."""
        outcome = _attempt(stage, self._store, self._worker)
        if isinstance(outcome, Failure):
            raise RuntimeError(f"rank {self._worker.rank}: {outcome.log}")

    def make(self, stage: Stage) -> Outcome:
        """A whole stage of a split."""
        return make(stage, self._store, self._worker.alone())


def make(stage: Stage, store: Store, worker: Worker) -> Outcome:
    """Run a stage in this process alone, unless it is finished already."""
    try:
        with store.claim(stage.id):
            if record := store.get(stage.id, asked=canonical(stage.spec)):
                return record
            store.work_dir(stage.id)
            return _attempt(stage, store, worker)
    except (OSError, RaysweepError) as error:  # A full disk, most likely: `_attempt` itself raises neither.
        return Failure.of(stage, error)


def _attempt(stage: Stage, store: Store, worker: Worker) -> Outcome:
    """One rank's part of a stage whose claim is held and whose work folder is empty; rank 0 commits."""
    started = time.time()
    out = store.partial_dir(stage.id)
    spec, report = stage.spec, worker.report
    worker = replace(
        worker,
        state_dir=store.state_dir(spec.state_key or stage.id),
        report=lambda event: report({"stage": stage.id, "kind": stage.kind, **event}),
    )
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
    try:
        inputs = {role: store.folder(stage_id) for role, stage_id in stage.inputs.items()}
        try:
            metrics = spec.run(inputs, out, worker)
        except Diverged as outcome:
            record = replace(record, status="diverged")
            metrics = {"diverged_step": float(outcome.step), "diverged_loss": outcome.loss}
        if worker.rank > 0:
            return record
        measured = {name: value for name, value in metrics.items() if name.endswith(("_seconds", "_per_second"))}
        metrics = {name: value for name, value in metrics.items() if name not in measured}
        known = measured | provenance(
            started=started, finished=time.time(), world_size=worker.world_size, device=worker.device
        )
        record = store.commit(replace(record, metrics=metrics, provenance=known), out)
        if spec.state_key is None:
            store.drop_state(stage.id)
        return record
    except Exception as error:
        logger.warning("stage %s failed: %s: %s", stage.id, type(error).__name__, error)
        return Failure.of(stage, error)
    finally:
        if spec.wide:  # Where the large cycles are: engines, models and their graphs.
            gc.collect()


def make_worker(
    resources: Resources,
    *,
    rank: int,
    world_size: int,
    report: Callable[[Mapping[str, Any]], None] | None = None,
) -> Worker:
    """The worker this process is, with its share of the machine's threads."""
    import torch
    import transformers.models.llama.modeling_llama

    # What is imported now stays: a collection between stages need not walk over it, which takes a quarter second.
    gc.freeze()
    device = "cuda" if resources.gpus_per_worker else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ClusterError(
            f"resources.gpus_per_worker is {resources.gpus_per_worker:g}, but torch finds no GPU here: set it to 0, or "
            "run where there is one"
        )
    transformers.utils.logging.disable_progress_bar()
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        # DeepSpeed calls `ninja`, which lies beside the interpreter; it need not be on a user's path.
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        torch.set_num_threads(max(1, int(resources.cpus_per_worker)))
    else:
        device = "cuda:0"  # Ray shows each worker its own GPU alone.
        torch.cuda.set_device(0)
    worker = Worker(
        rank=rank,
        world_size=world_size,
        device=device,
        zero_stage=resources.zero_stage,
        gradient_checkpointing=resources.gradient_checkpointing,
        micro_batch_sequences=resources.micro_batch_sequences,
    )
    return replace(worker, report=report) if report else worker


def join_process_group(worker: Worker, resources: Resources, address: str, port: int) -> None:
    """Make the process group of a gang, once for all its stages. A plain gang of one needs none."""
    if worker.world_size == 1 and worker.zero_stage == 0:
        return
    import torch.distributed as dist

    os.environ |= {
        "RANK": str(worker.rank),
        "WORLD_SIZE": str(worker.world_size),
        "LOCAL_RANK": "0" if worker.device.startswith("cuda") else str(worker.rank),
        "LOCAL_WORLD_SIZE": str(worker.world_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }
    dist.init_process_group("nccl" if worker.device.startswith("cuda") else "gloo")


def leave_process_group() -> None:
    """Undo `join_process_group`."""
    import torch.distributed as dist

    # A thread of gloo's may still be waiting for the interpreter to let its last tensors go. If the process ends
    # before it has them, it aborts (SIGABRT), its work all done.
    time.sleep(0.1)
    if "deepspeed" in sys.modules:
        import deepspeed.comm

        if deepspeed.comm.is_initialized():
            deepspeed.comm.destroy_process_group()  # With it goes what DeepSpeed keeps of the group.
    if dist.is_initialized():
        dist.destroy_process_group()


def _free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _get(refs: list[Any]) -> list[Any]:
    """Results of other ranks. Raises GangBroken if one died."""
    import ray

    try:
        return list(ray.get(refs))
    except (ray.exceptions.RayActorError, ray.exceptions.RaySystemError) as error:
        raise GangBroken(f"a worker of the gang died: {error}") from error


@contextlib.contextmanager
def _watch(running: list[Any]) -> Any:
    """While rank 0 waits for the others: if one of them is gone and rank 0 does not notice, end rank 0.

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
                except Exception:
                    if not left.wait(SETTLE_SECONDS):
                        logger.error("a rank failed and rank 0 is stuck in a collective; ending this gang")
                        os._exit(1)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        left.set()
