"""From gangs to the driver: what happens, as plain dicts over a connection of their own.

Not a Ray actor, on a cluster neither, whose workers have to reach the driver's process anyway: measured, an event takes
0.2 ms of a gang's processor and as much of the actor's, against 0.01 ms in all here. It would be one more process to
start, in 1 s, and to lose, and has no way to tell a gang that trains.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge
from typing import Any

from raysweep.runners.watch import Beat, Process, Watch

logger = logging.getLogger(__name__)

# How long a new connection may take for each message of its handshake.
HANDSHAKE_SECONDS = 10


SAVE = "save"
"""What the driver asks of gangs, the other way."""


@dataclass(frozen=True)
class Draining:
    """What the driver tells gangs: the ids of all nodes that are about to be taken away."""

    nodes: frozenset[str]


@dataclass(frozen=True)
class Address:
    """Where the driver listens, and the secret that lets a gang in."""

    host: str
    port: int
    key: bytes


def one_at_a_time(report: Callable[[Mapping[str, Any]], None]) -> Callable[[Mapping[str, Any]], None]:
    """`report` as several threads may call it."""
    lock = threading.Lock()

    def take(event: Mapping[str, Any]) -> None:
        with lock:
            try:
                report(event)
            except Exception:
                # What cannot be shown or kept must not end the telling of what follows.
                logger.exception("event %s was not taken", event.get("event"))

    return take


class EventSink:
    """The driver's end: calls `report` with each event until it is closed, from a thread per gang.

    Signs of life go to `watch`.
    """

    def __init__(self, host: str, report: Callable[[Mapping[str, Any]], None], *, watch: Watch | None = None) -> None:
        key = os.urandom(32)
        self._socket = socket.create_server((host, 0), backlog=128)
        self.address = Address(host, self._socket.getsockname()[1], key)
        self._report, self._watch = report, watch
        self._closed = False
        self._connections: set[Connection] = set()

    def __enter__(self) -> EventSink:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # Wakes `accept`, which a close alone does not.
        self._socket.close()

    def ask_to_save(self) -> None:
        """Ask every gang to save the trajectory that it trains."""
        self._send_all(SAVE)

    def tell_draining(self, nodes: frozenset[str]) -> None:
        """Tell every gang which nodes are about to be taken away."""
        self._send_all(Draining(nodes))

    def _send_all(self, message: object) -> None:
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.send(message)

    def _accept(self) -> None:
        """Take connections; all that a peer may be slow at is done in a thread of its own."""
        while not self._closed:
            try:
                peer, _ = self._socket.accept()
            except OSError:  # Closed, or too many files are open.
                time.sleep(0.1)
                continue
            threading.Thread(target=self._serve, args=(peer,), daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        with peer, Connection(os.dup(peer.fileno())) as connection:
            try:
                _set_timeout(peer, HANDSHAKE_SECONDS)
                deliver_challenge(connection, self.address.key)
                answer_challenge(connection, self.address.key)
                _set_timeout(peer, 0)
            except (OSError, EOFError, AuthenticationError):  # Somebody who is no gang of ours.
                return
            self._listen(connection)

    def _listen(self, connection: Connection) -> None:
        beating: Process | None = None
        self._connections.add(connection)
        try:
            while True:
                message = connection.recv()
                if self._closed:
                    return
                if message is None:
                    connection.send(None)
                elif not isinstance(message, Beat):
                    self._report(message)
                elif self._watch:
                    beating = message.process
                    self._watch.hear(message)
        except (EOFError, OSError):  # The gang ended.
            if self._watch and beating:
                self._watch.forget(beating)
        finally:
            self._connections.discard(connection)


def _set_timeout(peer: socket.socket, seconds: int) -> None:
    """Bound each read and write of a socket's descriptor, whoever makes it; 0: without end."""
    timeval = struct.pack("ll", seconds, 0)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)


class EventSource:
    """A gang's end. A driver that is gone stops the telling, not the work: Ray ends the gang by itself."""

    def __init__(self, address: Address) -> None:
        self._connection: Connection | None = None
        self._save_asked = False
        self._draining: frozenset[str] = frozenset()
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
        while self._receive():
            pass

    def save_asked(self) -> bool:
        """Whether the driver has asked for a save since this was last called."""
        self._receive_all()
        asked, self._save_asked = self._save_asked, False
        return asked

    def draining(self) -> frozenset[str]:
        """Ids of the nodes that are about to be taken away, as the driver said last."""
        self._receive_all()
        return self._draining

    def _receive_all(self) -> None:
        while self._connection is not None and self._connection.poll() and self._receive():
            pass

    def _receive(self) -> bool:
        """Take the driver's next message. False if it says that all was taken, or if there is no driver."""
        if self._connection is None:
            return False
        try:
            message = self._connection.recv()
        except (EOFError, OSError):
            self._connection = None
            return False
        if isinstance(message, Draining):
            self._draining = message.nodes
        self._save_asked |= message == SAVE
        return message is not None

    def _send(self, message: Any) -> None:
        if self._connection is not None:
            try:
                self._connection.send(message)
            except OSError:
                self._connection = None
