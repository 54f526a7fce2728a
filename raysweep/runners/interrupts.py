"""Ctrl-C and SIGTERM while a sweep runs: trajectories under way are saved first.

All else that a chain does is short, or keeps its finished parts by itself.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from raysweep.events import Event, StageEnded, StageFailed, StageProgress
from raysweep.worker import Reached

SIGNALS = (signal.SIGINT, signal.SIGTERM)

# How long gangs may take to save; a node that is taken away is often given 30 seconds in all.
SAVE_SECONDS = 20.0


class UnsavedTraining:
    """Which trajectories are being trained and not saved, from the events of a run; may be told from any thread."""

    def __init__(self) -> None:
        self._unsaved: set[str] = set()
        self._changed = threading.Condition()

    def take(self, event: Event) -> None:
        """Take one event of the run."""
        with self._changed:
            match event:
                case StageProgress(kind="pretrain" | "optimizer_state", at=Reached(loss=float())):
                    self._unsaved.add(event.stage)
                case StageProgress(at=Reached(saved_step=int())) | StageEnded(event="finished") | StageFailed():
                    self._unsaved.discard(event.stage)
            self._changed.notify_all()

    @property
    def is_under_way(self) -> bool:
        """Whether anything would be lost now."""
        return bool(self._unsaved)

    def wait_until_saved(self, seconds: float) -> bool:
        """Wait until all that is unsaved now has been saved once, or has ended; False if that took too long."""
        before = set(self._unsaved)

        def saved() -> bool:
            before.intersection_update(self._unsaved)
            return not before

        with self._changed:
            return self._changed.wait_for(saved, timeout=seconds)


class SaveFirst:
    """In the process that trains: the first signal asks for a save and waits for it, a second one is passed on at once.

    So is a signal while nothing is trained. Passed on is what the handlers of before made of it. Only the main thread
    may take signals; elsewhere this does nothing.
    """

    def __init__(self, signals: Sequence[int] = SIGNALS) -> None:
        self._signals = signals
        self._training = UnsavedTraining()
        self._pending: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> SaveFirst:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in self._signals}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """Whether a save is waited for: `Worker.save_asked` of this process."""
        return self._pending is not None

    def take(self, event: Event) -> None:
        """Take one event of this process; a signal that waited is passed on once the trajectory is saved."""
        self._training.take(event)
        if self._pending is not None and not self._training.is_under_way:
            self._pass_on(self._pending, None)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._training.is_under_way and self._pending is None:
            self._pending = number
        else:
            self._pass_on(number, frame)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        handler = self._before[number]
        if callable(handler):
            handler(number, frame)
        elif handler == signal.SIG_DFL:
            signal.signal(number, handler)
            signal.raise_signal(number)


@contextlib.contextmanager
def keeping_sigterm() -> Iterator[None]:
    """Undo what a library does with SIGTERM while it is in it: `ray.init` would have it end with code 1 at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
