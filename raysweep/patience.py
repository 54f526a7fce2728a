"""Waiting for a store that is away: a URL that does not answer, or a folder whose server is gone for a while."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from raysweep.errors import UnreachableError
from raysweep.printable import duration

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Between two tries of what fails, doubled each time.
FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 20.0

AWAY = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EREMOTEIO)
"""What a shared folder says whose server is gone: NFS mounted `soft`, a FUSE file system, a network disk."""

_asking: set[object] = set()


def waits_for_store() -> bool:
    """Whether a thread of this process is asking a URL for something, or waits to ask a store again."""
    return bool(_asking)


def is_away(error: BaseException) -> bool:
    """Whether an error says that a folder's server is gone; writers of weights have errors of their own, quoting it."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in AWAY
    return any(os.strerror(number) in str(error) for number in AWAY)


class Patience:
    """How long what fails is tried again, and who is told; of one store in this process.

    Args:
        url: of the store, or its folder.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self.seconds = 0.0
        """See `Root.be_patient`."""
        self.tell: Callable[[str], None] = logger.warning
        self._lock = threading.Lock()
        self._down_since: float | None = None

    def ask(self, call: Callable[[], T], problem: Callable[[Exception], str]) -> T:
        """What a call gives, tried again for as long as patience lasts.

        Args:
            problem: what to say of an error that may pass; raises what is an answer, or will not pass.

        Raises:
            UnreachableError: with what `problem` says.
        """
        asked = object()
        _asking.add(asked)
        try:
            return self._ask(call, problem)
        finally:
            _asking.discard(asked)

    def _ask(self, call: Callable[[], T], problem: Callable[[Exception], str]) -> T:
        started, wait_seconds = time.monotonic(), FIRST_WAIT_SECONDS
        while True:
            try:
                answer = call()
            except Exception as error:  # Each file system has errors of its own.
                said = problem(error)
                left = started + self.seconds - time.monotonic()
                if left <= 0:
                    raise UnreachableError(said) from error
                self._note_down(f"{said}; trying again for up to {duration(left)}")
                time.sleep(min(wait_seconds, left))
                wait_seconds = min(2 * wait_seconds, LONGEST_WAIT_SECONDS)
            else:
                self._note_up()
                return answer

    def _note_down(self, message: str) -> None:
        """Say once, whatever else is asked meanwhile, that the store does not answer."""
        with self._lock:
            if self._down_since is None:
                self._down_since = time.monotonic()
                self.tell(message)

    def _note_up(self) -> None:
        with self._lock:
            if self._down_since is not None:
                self.tell(f"store {self._url!r} answers again, after {duration(time.monotonic() - self._down_since)}")
                self._down_since = None
