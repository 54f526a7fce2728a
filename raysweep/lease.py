"""Holding a name alone behind a URL, where no lock can be had: a note that its holder renews while it lives.

Whoever wants the name first puts a note of its own, then lists all notes: of two, at least one sees the other. A note
that is renewed has a holder that lives; one that stays as it is for `expiry_seconds`, by the clock of whoever watches
it, has none, and the name is taken from it. A holder that was only frozen, or cut off, finds that in the taker's note.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

from raysweep.durable import parse_object
from raysweep.errors import StoreError, UnreachableError
from raysweep.remote import Remote

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pace:
    """How often a note is renewed, and after how long without that its holder counts as gone."""

    beat_seconds: float = 15.0
    expiry_seconds: float = 75.0


@dataclass(frozen=True)
class Holder:
    """Who holds a name. `lock`: of this machine, held with the name; a note of the same lock is a dead process's."""

    host: str
    pid: int
    lock: str


class Lease:
    """One holder's hold of a name.

    Args:
        remote: where notes are put.
        name: of their folder.
        what: is held, in words.
        holder: this process.
        pace: of all holders.
        renewed: called after each renewal, from a thread; it may raise StoreError and OSError.
        lost: called once, from a thread, if another holder has taken the name; is told who.
    """

    def __init__(
        self,
        remote: Remote,
        name: str,
        holder: Holder,
        *,
        what: str,
        pace: Pace,
        renewed: Callable[[], None],
        lost: Callable[[str], None],
    ) -> None:
        self._remote, self._folder, self._holder, self._pace = remote, name, holder, pace
        self._what, self._renewed, self._lost = what, renewed, lost
        self._id = uuid.uuid4().hex
        self._holds, self._num_beats = False, 0
        self._taken_from: set[str] = set()
        self._left = threading.Event()

    def __enter__(self) -> Lease:
        """Take the name. Raises StoreError if another process holds it."""
        try:
            self._take()
            self._holds = True
            self._put()
        except BaseException:
            self._forget([self._id])
            raise
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._left.set()
        self._thread.join()
        self._forget([self._id])

    def _take(self) -> None:
        for _ in range(5):
            self._put()
            others = self._others()
            dead = {key for key, note in others.items() if note.get("lock") == self._holder.lock}
            self._taken_from |= dead
            rival = self._rival({key: note for key, note in others.items() if key not in dead})
            if rival is None:
                self._forget(self._taken_from)
                return
            if rival.get("holds"):
                raise StoreError(f"{self._what} is under way in {_told(rival)}; wait for it, or end it")
            # Both came at once: both step back, and not for the same time.
            self._forget([self._id])
            time.sleep(self._pace.beat_seconds * random.uniform(0.2, 2.0))
        raise StoreError(f"{self._what} is being started by several processes at once; start one of them again")

    def _rival(self, others: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any] | None:
        """The first of some notes to be renewed; None once none has been for long enough."""
        if not others:
            return None
        names = ", ".join(_told(note) for note in others.values())
        seconds = self._pace.expiry_seconds
        logger.warning(
            "%s is noted as under way in %s: waiting for up to %g s to see whether that lives",
            self._what,
            names,
            seconds,
        )
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(self._pace.beat_seconds / 4)
            self._put()
            now = self._others()
            for key, note in now.items():
                if key not in self._taken_from and note != others.get(key):
                    return note
            if not now.keys() - self._taken_from:
                return None
        logger.warning("%s gave no sign of life for %g s, and is taken over from", names, seconds)
        self._taken_from |= others.keys()
        return None

    def _keep(self) -> None:
        is_cut_off, wait_seconds = False, 0.0
        while not self._left.wait(wait_seconds):
            wait_seconds = self._pace.beat_seconds
            try:
                others = self._others()
                for note in others.values():
                    if isinstance(taken := note.get("taken_from"), list) and self._id in taken:
                        self._lost(_told(note))
                        return
                self._forget(others.keys() & self._taken_from)
                self._put()
                self._renewed()
                is_cut_off = False
            except (StoreError, OSError) as error:  # Whatever fails, the note has to be renewed.
                if not is_cut_off:
                    logger.warning("%s; going on, and trying again", error)
                is_cut_off = True

    def _put(self) -> None:
        self._num_beats += 1
        note = {**vars(self._holder), "holds": self._holds, "beat": self._num_beats}
        self._remote.write(
            f"{self._folder}/{self._id}", json.dumps(note | {"taken_from": sorted(self._taken_from)}).encode()
        )

    def _others(self) -> dict[str, dict[str, Any]]:
        return notes(self._remote, self._folder, but={self._id})

    def _forget(self, keys: Iterable[str]) -> None:
        for key in keys:
            try:
                self._remote.remove(f"{self._folder}/{key}")
            except UnreachableError as error:  # It expires.
                logger.warning("%s", error)


def notes(remote: Remote, name: str, *, but: Set[str] = frozenset()) -> dict[str, dict[str, Any]]:
    """All notes of a name's folder by their ids: of its holder, and of who would be."""
    found = {}
    for key in remote.names(name) - but:
        content = remote.read(f"{name}/{key}")
        if content is not None:
            try:
                found[key] = parse_object(content)
            except ValueError:
                found[key] = {"damaged": repr(content)}
    return found


@contextlib.contextmanager
def calling(call: Callable[[], None], *, every_seconds: float) -> Iterator[None]:
    """Have something called from a thread as by the renewals of a lease, where no lease is needed."""
    left = threading.Event()

    def keep() -> None:
        is_cut_off = False
        while not left.wait(every_seconds):
            try:
                call()
                is_cut_off = False
            except (StoreError, OSError) as error:
                if not is_cut_off:
                    logger.warning("%s; going on, and trying again", error)
                is_cut_off = True

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join()


def _told(note: Mapping[str, Any]) -> str:
    return f"process {note.get('pid')} on {note.get('host')}"
