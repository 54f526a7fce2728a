"""The driver's watch over the processes of gangs: what is stopped or stuck is ended, so that its trial goes on.

Two kinds of silence:

* A process that is *stopped* (SIGSTOP, a frozen machine) sends no beat. Beats come from a thread, so that long work (a
  model that loads, a compiler, an evaluation) does not hold them up.
* A gang that is *stuck* (a collective that a rank never enters) still beats, but all its processes that are at work on
  one stage leave their processors idle. A rank that works keeps those that wait for it, and so does one that waits for
  a store at a URL. One that is alone at a stage is let be: it waits for no other. A rank that waits for another gang to
  finish a shared stage is not at work; that gang is watched itself. On GPUs a process that waits may spin, and this
  rule is off: there NCCL's own watchdog ends a collective after ten minutes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from pydantic import ConfigDict

from raysweep.events import Report, StageFailed

logger = logging.getLogger(__name__)

# Of a process that could not be ended, one tick after the other.
TRIES = 3

# A process that waits uses this share of a processor at most: Ray's own threads take about 0.01.
IDLE_LOAD = 0.03


@dataclass(frozen=True)
class Process:
    """A process of a gang, and where it runs."""

    gang: str
    rank: int
    node_id: str
    pid: int


@dataclass(frozen=True)
class Beat:
    """A sign of life. `seconds`: since the one before; `load`: processors used in them, on average.

    Of a process that waits for a store, `load` is 1: it waits for no other rank.
    """

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")

    process: Process
    trial: str
    """Known to rank 0 alone; else empty."""
    stage: str
    """What the process is at work on; empty between stages."""
    seconds: float
    load: float
    event: Literal["beat"] = "beat"


@dataclass
class _Life:
    beat: Beat
    silent_seconds: float = 0.0
    idle_seconds: float = 0.0


class Watch:
    """Takes beats, from any thread, and ends processes that are silent for longer than `max_silence_seconds`.

    Args:
        max_silence_seconds: of a process.
        max_idle_seconds: of all processes of a gang at work on one stage; may be infinite.
        end: kills a process for good.
        report: takes a `StageFailed` where a stage was under way.
    """

    def __init__(
        self,
        *,
        max_silence_seconds: float,
        max_idle_seconds: float,
        end: Callable[[Process], None],
        report: Report,
    ) -> None:
        self._max_silence_seconds, self._max_idle_seconds = max_silence_seconds, max_idle_seconds
        self._end, self._report = end, report
        self._lives: dict[Process, _Life] = {}
        self._to_end: dict[Process, int] = {}
        """Of each process that is to be ended, how often that is tried yet; of the ticking thread alone."""
        self._lock = threading.Lock()
        self._left = threading.Event()

    def __enter__(self) -> Watch:
        threading.Thread(target=self._run, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._left.set()

    def hear(self, beat: Beat) -> None:
        """Take a sign of life: the process is not silent, and idle on if its stage is the same and its load low."""
        with self._lock:
            life = self._lives.setdefault(beat.process, _Life(beat))
            waits = beat.stage != "" and beat.stage == life.beat.stage and beat.load < IDLE_LOAD
            life.idle_seconds = life.idle_seconds + beat.seconds if waits else 0.0
            life.beat, life.silent_seconds = beat, 0.0

    def forget(self, process: Process) -> None:
        """Watch a process no longer, as it has ended by itself."""
        with self._lock:
            self._lives.pop(process, None)

    def tick(self, seconds: float) -> None:
        """Let time pass, and end what has been silent for too long."""
        with self._lock:
            for life in self._lives.values():
                life.silent_seconds += seconds
            lost = [*self._stopped(), *self._stuck()]
            events = [event for process, cause in lost if (event := self._failed(process, cause))]
            for process, _ in lost:
                self._lives.pop(process, None)
                self._to_end[process] = TRIES
        for event in events:
            self._report(event)
        for _, cause in lost:
            logger.warning(cause)
        self._try_to_end()

    def _try_to_end(self) -> None:
        """All at once: a node that has no time is not to hold up what others wait for."""
        tried = {process: left - 1 for process, left in self._to_end.items()}
        if not tried:
            return
        with ThreadPoolExecutor(len(tried)) as pool:
            errors = dict(zip(tried, pool.map(self._error_of_ending, tried), strict=True))
        for process, error in errors.items():
            if error:  # Its node is gone, or has no time.
                logger.warning("process %d of node %s was not ended: %s", process.pid, process.node_id, error)
        self._to_end = {process: left for process, left in tried.items() if left and errors[process]}

    def _error_of_ending(self, process: Process) -> Exception | None:
        try:
            self._end(process)
        except Exception as error:
            return error
        return None

    def _stopped(self) -> Iterable[tuple[Process, str]]:
        for process, life in self._lives.items():
            if life.silent_seconds > self._max_silence_seconds:
                yield (
                    process,
                    f"worker {process.rank} (process {process.pid}) gave no sign of life for "
                    f"{self._max_silence_seconds:g} s "
                    "(resources.max_silence_seconds): it was stopped, or its machine was; its gang is replaced",
                )

    def _stuck(self) -> Iterable[tuple[Process, str]]:
        """The lowest rank of each gang that is at work and gets nowhere: the others end with it."""
        together: dict[tuple[str, str], list[_Life]] = {}
        for life in self._lives.values():
            if life.beat.stage:
                together.setdefault((life.beat.process.gang, life.beat.stage), []).append(life)
        for at_work in together.values():
            if len(at_work) > 1 and all(life.idle_seconds > self._max_idle_seconds for life in at_work):
                yield (
                    min((life.beat.process for life in at_work), key=lambda process: process.rank),
                    f"{len(at_work)} worker(s) used no processor for {self._max_idle_seconds:g} s "
                    "(resources.max_silence_seconds): they wait for each other; their gang is replaced",
                )

    def _failed(self, process: Process, cause: str) -> StageFailed | None:
        """The event of a stage that a process holds up; None between stages. It may hold up one that others work on."""
        beats = [life.beat for life in self._lives.values() if life.beat.process.gang == process.gang]
        beats.sort(key=lambda beat: beat.process != process)
        if not (stage := next((beat.stage for beat in beats if beat.stage), "")):
            return None
        trial = next((beat.trial for beat in beats if beat.trial), "")
        kind = stage.rsplit("-", 1)[0]
        return StageFailed(trial=trial, stage=stage, kind=kind, cause=cause, log=cause, retry=True)

    def _run(self) -> None:
        every = beat_seconds(self._max_silence_seconds)
        then = time.monotonic()
        while not self._left.wait(every):
            now = time.monotonic()
            # Not more than two beats: while the driver itself was stopped, it heard nobody.
            self.tick(min(now - then, 2 * every))
            then = now


def beat_seconds(max_silence_seconds: float) -> float:
    """Time between beats: ten fit into the bound."""
    return min(5.0, max_silence_seconds / 10)
