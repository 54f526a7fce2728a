"""Between gangs and the driver: events one way, what gangs are asked the other, over a connection of their own.

Messages are dataclasses sent as JSON, and checked where they arrive: nothing is unpickled, and what is no message of
ours is left out with a warning.

Not a Ray actor, on a cluster neither, whose workers have to reach the driver's process anyway: measured, an event takes
0.2 ms of a gang's processor and as much of the actor's, against 0.04 ms in all here. It would be one more process to
start, in 1 s, and to lose, and has no way to tell a gang that trains.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import struct
import threading
import time
from dataclasses import asdict, dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from raysweep.errors import ClusterError
from raysweep.events import Event, Report, StageEnded, StageStarted, TrialStarted
from raysweep.runners.watch import Beat, Process, Watch

logger = logging.getLogger(__name__)

# How long a new connection may take for each message of its handshake.
HANDSHAKE_SECONDS = 10

# How long a gang tries to reach the driver: at first, and where a connection was lost, as networks fail for a while.
FIRST_SECONDS = 5.0
AGAIN_SECONDS = 60.0


# The other end's host that has vanished is noticed after 60 + 6 * 20 s; by the system's own values after 12 minutes.
KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 20, "TCP_KEEPCNT": 6}


# As of events: all fields, no others, and each of its very type.
_EXACTLY = ConfigDict(strict=True, extra="forbid")


@dataclass(frozen=True)
class Flush:
    """A gang waits until the driver has taken all that it was told so far, and says so with the same."""

    __pydantic_config__ = _EXACTLY

    event: Literal["flush"] = "flush"


@dataclass(frozen=True)
class Save:
    """The driver asks for the state of what is trained to be saved."""

    __pydantic_config__ = _EXACTLY

    event: Literal["save"] = "save"


@dataclass(frozen=True)
class Draining:
    """The driver tells the ids of all nodes that are about to be taken away."""

    __pydantic_config__ = _EXACTLY

    nodes: tuple[str, ...]
    event: Literal["draining"] = "draining"


ToDriver = Event | Beat | Flush
ToGang = Flush | Save | Draining

_TO_DRIVER: TypeAdapter[ToDriver] = TypeAdapter(Annotated[ToDriver, Field(discriminator="event")])
_TO_GANG: TypeAdapter[ToGang] = TypeAdapter(Annotated[ToGang, Field(discriminator="event")])


@dataclass(frozen=True)
class Address:
    """Where the driver listens, and the secret that lets a gang in."""

    host: str
    port: int
    key: bytes


def connect(address: Address, *, seconds: float) -> Connection:
    """A gang's connection to the driver, tried for about so long; AGAIN_SECONDS where it is there and does not answer.

    Raises:
        ClusterError: if there is none to be had; names the driver's address, and what to open.
    """
    began = time.monotonic()
    while True:
        try:
            return _connect_once(address)
        except (OSError, EOFError, AuthenticationError) as error:
            is_there = isinstance(error, BlockingIOError)  # Of the handshake alone: its time is up.
            if time.monotonic() - began >= (max(seconds, AGAIN_SECONDS) if is_there else seconds):
                place = f"host {socket.gethostname()} cannot reach the driver at {address.host}:{address.port}"
                if is_there:
                    raise ClusterError(f"{place}: it accepts, but does not answer: stopped, or overloaded?") from error
                raise ClusterError(
                    f"{place} ({error or type(error).__name__}): let all nodes connect to every TCP port of the "
                    "driver's host, which listens at one that its system chooses"
                ) from error
        time.sleep(0.5)


def _connect_once(address: Address) -> Connection:
    # Not by `multiprocessing.connection.Client`: where packets are dropped it waits for two minutes.
    with socket.create_connection((address.host, address.port), timeout=HANDSHAKE_SECONDS) as peer:
        peer.settimeout(None)
        _prepare(peer)
        connection = Connection(os.dup(peer.fileno()))
        _set_timeout(peer, HANDSHAKE_SECONDS)
        answer_challenge(connection, address.key)
        deliver_challenge(connection, address.key)
        _set_timeout(peer, 0)
        return connection


def lose_after(connection: Connection, seconds: float) -> None:
    """Make sends fail where the other end has acknowledged nothing for so long; packets may be dropped silently."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        with socket.socket(fileno=os.dup(connection.fileno())) as peer:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))


def send(connection: Connection, message: ToDriver | ToGang) -> None:
    """Raises OSError if the other end is gone."""
    # Half a surrogate pair, as in names of files that are no UTF-8, stands for no character, and would be refused.
    connection.send_bytes(json.dumps(asdict(message), ensure_ascii=False).encode(errors="replace"))


def _prepare(peer: socket.socket) -> None:
    """Have an end of a connection send at once, and notice if the other one's host vanishes."""
    # Else a message that follows another waits for it to be acknowledged, which takes 40 ms.
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # Else a firewall on the way forgets a connection that says nothing during a long stage.
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # Not every system has all.
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def one_at_a_time(report: Report) -> Report:
    """`report` as several threads may call it."""
    lock = threading.Lock()

    def take(event: Event) -> None:
        with lock:
            try:
                report(event)
            except Exception:
                # What cannot be shown or kept must not end the telling of what follows.
                logger.exception("event %r was not taken", event.event)

    return take


class EventSink:
    """The driver's end: calls `report` with each event until it is closed, from a thread per gang.

    Signs of life go to `watch`.
    """

    def __init__(self, host: str, report: Report, *, watch: Watch | None = None) -> None:
        key = os.urandom(32)
        self._socket = socket.create_server((host, 0), backlog=128)
        self.address = Address(host, self._socket.getsockname()[1], key)
        self._report, self._watch = report, watch
        self._closed = False
        self._connections: set[Connection] = set()
        self._said: dict[type[ToGang], ToGang] = {}
        """The last of each kind, for gangs that come later, or again."""
        self._lock = threading.Lock()

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
        self._send_all(Save())

    def tell_draining(self, nodes: frozenset[str]) -> None:
        """Tell every gang which nodes are about to be taken away."""
        self._send_all(Draining(tuple(sorted(nodes))))

    def _send_all(self, message: ToGang) -> None:
        with self._lock:
            self._said[type(message)] = message
            for connection in list(self._connections):
                with contextlib.suppress(OSError):
                    send(connection, message)

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
                _prepare(peer)
                _set_timeout(peer, HANDSHAKE_SECONDS)
                deliver_challenge(connection, self.address.key)
                answer_challenge(connection, self.address.key)
                _set_timeout(peer, 0)
            except (OSError, EOFError, AuthenticationError):  # Somebody who is no gang of ours.
                return
            self._listen(connection)

    def _listen(self, connection: Connection) -> None:
        beating: Process | None = None
        try:
            with self._lock:
                self._connections.add(connection)
                for said in self._said.values():
                    send(connection, said)
            while True:
                received = connection.recv_bytes()
                if self._closed:
                    return
                try:
                    message = _TO_DRIVER.validate_json(received)
                except ValidationError as error:
                    logger.warning("no event of ours, and left out: %.200r: %s", received, error)
                    continue
                if isinstance(message, Flush):
                    send(connection, message)
                elif not isinstance(message, Beat):
                    self._report(message)
                elif self._watch:
                    beating = message.process
                    self._watch.hear(message)
        except (EOFError, ConnectionError):  # The gang ended.
            if self._watch and beating:
                self._watch.forget(beating)
        except OSError:  # Its host has vanished, or the way to it: it may be at work, and is watched on.
            pass
        finally:
            self._connections.discard(connection)


def _set_timeout(peer: socket.socket, seconds: int) -> None:
    """Bound each read and write of a socket's descriptor, whoever makes it; 0: without end."""
    timeval = struct.pack("ll", seconds, 0)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)


class EventSource:
    """A gang's end, for any of its threads. A connection that is lost is made anew.

    What was under way in it may be lost, but for the trials and ends of stages of since the last `wait`: these are told
    again, twice if need be, as the driver takes a second one for the first. A failure is not: each counts as a try.

    Raises:
        ClusterError: here and in each method, if the driver cannot be reached: unseen, a gang is not to go on.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        self._save_asked = False
        self._draining: frozenset[str] = frozenset()
        self._untaken: list[TrialStarted | StageEnded] = []
        """To be told again over a new connection."""
        self._lock = threading.Lock()
        self._sending, self._receiving = threading.Lock(), threading.Lock()
        self._unreached: ClusterError | None = None
        self._connection = connect(address, seconds=FIRST_SECONDS)

    def tell(self, event: Event) -> None:
        """Send one event."""
        self._receive_all()  # Which notices a connection that was closed; a first send into it would not fail.
        with self._lock:
            if isinstance(event, TrialStarted | StageEnded):
                self._untaken.append(event)
            elif isinstance(event, StageStarted):  # Made again: its earlier end holds no more.
                self._untaken = [
                    told for told in self._untaken if isinstance(told, TrialStarted) or told.stage != event.stage
                ]
        self._send(event)

    def wait(self) -> None:
        """Until the driver has taken all that was told so far; see above for what a lost connection may cost."""
        with self._receiving:  # Until the answer, which another thread would pass over.
            while True:
                with self._lock:
                    told = {id(event): event for event in self._untaken}
                asked = self._send(Flush())
                while self._connection is asked:
                    if isinstance(self._receive(), Flush):
                        with self._lock:
                            self._untaken = [event for event in self._untaken if id(event) not in told]
                        return

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
        if self._receiving.acquire(blocking=False):  # Else another thread is at it.
            try:
                while self._is_told():
                    self._receive()
            finally:
                self._receiving.release()

    def _is_told(self) -> bool:
        connection = self._connection
        try:
            return connection.poll()
        except OSError:
            self._connect_again(connection)
            return False

    def _receive(self) -> ToGang | None:
        """Take the driver's next message; None if there was none of ours, or the connection was lost and made anew."""
        connection = self._connection
        try:
            message = _TO_GANG.validate_json(connection.recv_bytes())
        except ValidationError as error:
            logger.warning("no message of the driver's, and left out: %s", error)
            return None
        except (EOFError, OSError):
            self._connect_again(connection)
            return None
        match message:
            case Draining(nodes=nodes):
                self._draining = frozenset(nodes)
            case Save():
                self._save_asked = True
        return message

    def _send(self, message: ToDriver) -> Connection:
        """Send a message; returns the connection that took it."""
        while True:
            connection = self._connection
            try:
                with self._sending:
                    send(connection, message)
            except OSError:
                self._connect_again(connection)
            else:
                return connection

    def _connect_again(self, lost: Connection) -> None:
        """Unless another thread has done so."""
        with self._lock:
            if self._unreached:
                raise self._unreached
            if self._connection is lost:
                try:
                    anew = connect(self._address, seconds=AGAIN_SECONDS)
                except ClusterError as error:
                    self._unreached = error
                    raise
                with contextlib.suppress(OSError):  # Lost, too: whoever uses it next is told so, and comes here again.
                    for event in self._untaken:
                        send(anew, event)
                self._connection = anew
