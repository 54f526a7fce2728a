"""From gangs to the driver: what happens, as plain dicts over a connection of their own.

Not a Ray actor: that would take one of the two warm processes a small machine starts with, and hold the first gang up
by the seconds another one needs for its imports.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Address:
    """Where the driver listens, and the secret that lets a gang in."""

    host: str
    port: int
    key: bytes


class EventSink:
    """The driver's end: calls `report` with each event, one at a time, until it is closed."""

    def __init__(self, host: str, report: Callable[[Mapping[str, Any]], None]) -> None:
        key = os.urandom(32)
        self._listener = Listener((host, 0), authkey=key)
        self.address = Address(host, self._listener.address[1], key)
        self._report = report
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> EventSink:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed = True
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection = self._listener.accept()
            except (OSError, EOFError, AuthenticationError):  # Closed, or somebody who is no gang of ours.
                continue
            threading.Thread(target=self._listen, args=(connection,), daemon=True).start()

    def _listen(self, connection: Any) -> None:
        with connection, contextlib.suppress(EOFError, OSError):  # The gang ended.
            while True:
                event = connection.recv()
                if event is None:
                    connection.send(None)
                    continue
                with self._lock:
                    try:
                        self._report(event)
                    except Exception:
                        # What cannot be shown or kept must not end the telling of what follows.
                        logger.exception("event %s was not taken", event.get("event"))


class EventSource:
    """A gang's end. A driver that is gone stops the telling, not the work: Ray ends the gang by itself."""

    def __init__(self, address: Address) -> None:
        self._connection: Connection | None = None
        try:
            self._connection = Client((address.host, address.port), authkey=address.key)
        except (OSError, EOFError, AuthenticationError) as error:
            logger.warning("no connection to the driver at %s:%d: %s", address.host, address.port, error)

    def tell(self, event: Mapping[str, Any]) -> None:
        """Send one event, with the time it was sent at."""
        self._send({"time": time.time(), **event})

    def wait(self) -> None:
        """Until the driver has taken all that was told so far."""
        self._send(None)
        if self._connection is not None:
            with contextlib.suppress(EOFError, OSError):
                self._connection.recv()

    def _send(self, message: Any) -> None:
        if self._connection is not None:
            try:
                self._connection.send(message)
            except OSError:
                self._connection = None
