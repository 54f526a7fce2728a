"""What is stopped or stuck is ended; what works, however long and silently, is left alone."""

import contextlib
import multiprocessing
import os
import signal
import time

import pytest
from ranks import forked
from tiny import free_port

from raysweep.runners import attempts
from raysweep.runners.channel import Address, EventSink
from raysweep.runners.heartbeat import start_beats
from raysweep.runners.watch import Beat, Process, Watch


class Gang:
    """Two processes whose beats come as the test says, under a watch of ten seconds."""

    def __init__(self) -> None:
        self.ended, self.events = [], []
        self.watch = Watch(
            max_silence_seconds=10, max_idle_seconds=10, end=self.ended.append, report=self.events.append
        )
        self.ranks = [Process("g", rank, "node", 100 + rank) for rank in range(2)]

    def pass_second(self, *loads: float | None, stages=("sft-1", "sft-2")) -> None:
        for process, load, stage in zip(self.ranks, loads, stages, strict=True):
            if load is not None:
                trial = "" if process.rank else "trial-1"
                self.watch.hear(Beat(process, trial=trial, stage=stage, seconds=1.0, load=load))
        self.watch.tick(1.0)


def test_a_process_without_a_beat_is_ended_and_the_cause_recorded():
    gang = Gang()
    for _ in range(5):
        gang.pass_second(1.0, 1.0)
    for _ in range(15):
        gang.pass_second(1.0, None)
    assert gang.ended == [gang.ranks[1]]
    (event,) = gang.events
    assert (event.event, event.stage, event.kind, event.retry) == ("failed", "sft-2", "sft", True)
    assert event.trial == "trial-1"
    assert "worker 1 (process 101) gave no sign of life for 10 s" in event.cause


@pytest.mark.parametrize(("num_failing", "num_tries"), [(1, 2), (9, 3)])
def test_what_could_not_be_ended_is_tried_again_a_few_times_and_told_once(num_failing, num_tries):
    gang, tries = Gang(), []

    def end(process):
        tries.append(process)
        if len(tries) <= num_failing:
            raise OSError("no time")

    gang.watch = Watch(max_silence_seconds=10, max_idle_seconds=10, end=end, report=gang.events.append)
    gang.pass_second(1.0, 1.0)
    for _ in range(20):
        gang.pass_second(1.0, None)
    assert tries == [gang.ranks[1]] * num_tries
    assert len(gang.events) == 1


def test_a_gang_whose_ranks_all_wait_is_ended():
    gang = Gang()
    for _ in range(15):
        gang.pass_second(0.01, 0.01, stages=("pretrain-1", "pretrain-1"))
    assert gang.ended[0] == gang.ranks[0]
    assert "2 worker(s) used no processor for 10 s" in gang.events[0].cause


@pytest.mark.parametrize(
    ("loads", "stages"),
    [
        ((0.0, 1.0), ("pretrain-1", "pretrain-1")),  # One waits for the other's long evaluation.
        ((0.0, 1.0), ("", "sft-1")),  # Of a split: rank 0 has nothing left to do.
        ((0.0, 1.0), ("fetch-1", "")),  # A download, and nothing to do beside it.
        ((0.0, 0.0), ("sft-1", "sft-2")),  # Two downloads: neither waits for the other.
        ((0.0, 0.0), ("", "")),  # Between trials, or until another gang has made what both need.
    ],
)
def test_waiting_for_work_that_goes_on_is_left_alone(loads, stages):
    gang = Gang()
    for _ in range(100):
        gang.pass_second(*loads, stages=stages)
    assert gang.ended == []


def test_a_driver_that_was_stopped_ends_nobody():
    # The driver hears nothing for longer than the bound, as it does not run itself.
    child = multiprocessing.get_context("fork").Process(target=_watch_over_a_pause)
    child.start()
    time.sleep(0.3)
    os.kill(child.pid, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(child.pid, signal.SIGCONT)
    child.join()
    assert child.exitcode == 0


def _watch_over_a_pause() -> None:
    process = Process("g", 0, "node", os.getpid())
    ended = []
    watch = Watch(max_silence_seconds=0.5, max_idle_seconds=0.5, end=ended.append, report=ended.append)
    with watch:
        for _ in range(40):
            watch.hear(Beat(process, trial="", stage="sft-1", seconds=0.05, load=1.0))
            time.sleep(0.05)
    os._exit(len(ended))


def _rank(rank: int, port: int, address: Address) -> None:
    """Enters a collective that rank 1 stays away from, working at something else."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    attempts._under_way.append("pretrain-1")
    start_beats(address, Process("g", rank, "node", os.getpid()), every_seconds=0.2)
    until = time.monotonic() + (3 if rank else 0)
    while time.monotonic() < until:
        pass
    with contextlib.suppress(RuntimeError):
        dist.all_reduce(torch.zeros(1)) if rank == 0 else time.sleep(600)


def test_real_processes_that_wait_in_a_collective_are_ended():
    """No sooner than the rank that worked has stopped to; rank 0 is killed, which the other then sees."""
    events, began = [], time.monotonic()
    watch = Watch(
        max_silence_seconds=20,
        max_idle_seconds=2,
        end=lambda process: os.kill(process.pid, signal.SIGKILL),
        report=events.append,
    )
    with EventSink("127.0.0.1", events.append, watch=watch) as sink, watch:
        port = free_port()
        ranks = [forked.Process(target=_rank, args=(rank, port, sink.address)) for rank in range(2)]
        for process in ranks:
            process.start()
        ranks[0].join(timeout=60)
        assert ranks[0].exitcode == -signal.SIGKILL
        assert time.monotonic() - began > 5
        ranks[1].kill()
        ranks[1].join()
    assert "used no processor" in events[0].cause
    assert events[0].stage == "pretrain-1"
