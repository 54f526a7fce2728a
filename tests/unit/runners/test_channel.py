"""Between gangs and the driver, whoever else knocks at its port, and whatever comes over it."""

import contextlib
import math
import os
import pickle
import queue
import socket
import subprocess
import sys
import threading
import time

import pytest
from ended import ended
from hosts import can_have_hosts, hosts

from raysweep.errors import ClusterError
from raysweep.events import GangsChosen, Note, StageFailed, StageProgress, StageStarted, TrialStarted
from raysweep.remote import Remote
from raysweep.run_files import StageRow, TrialRow
from raysweep.runners import channel, heartbeat
from raysweep.runners.channel import Address, EventSink, EventSource, connect
from raysweep.runners.heartbeat import start_beats
from raysweep.runners.watch import Process, Watch, beat_seconds
from raysweep.worker import Reached

STAGE = {"trial": "t", "stage": "sft-1", "kind": "sft"}
ROWS = (StageRow("sft-1", "sft", 3, None, "a", {"model": "x-1"}),)


def test_events_reach_the_driver_before_wait_returns():
    got = []
    with EventSink("127.0.0.1", got.append) as sink:
        sources = [EventSource(sink.address) for _ in range(2)]
        for number in range(100):
            sources[number % 2].tell(Note(message=str(number)))
        for source in sources:
            source.wait()
        assert sorted(int(event.message) for event in got) == list(range(100))
        # Without the secret nobody is let in, and nothing breaks.
        with pytest.raises(ClusterError, match="cannot reach the driver"):
            connect(Address(sink.address.host, sink.address.port, b"wrong"), seconds=0)
        sources[0].tell(Note(message="the last"))
        sources[0].wait()
    assert got[-1].message == "the last"


def test_a_gang_that_cannot_reach_the_driver_does_not_begin(monkeypatch):
    monkeypatch.setattr(channel, "FIRST_SECONDS", 0)
    monkeypatch.setattr(heartbeat, "FIRST_SECONDS", 0)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(ClusterError, match=rf"driver at 127\.0\.0\.1:{port} \(.*refused\): let all nodes connect"):
        EventSource(Address("127.0.0.1", port, b"key"))
    with pytest.raises(ClusterError, match=f"driver at 127.0.0.1:{port}"):
        start_beats(Address("127.0.0.1", port, b"key"), Process("g", 0, "node", 1), every_seconds=1)


def test_a_driver_that_is_stopped_for_a_while_is_waited_for(monkeypatch):
    monkeypatch.setattr(channel, "HANDSHAKE_SECONDS", 1)
    monkeypatch.setattr(channel, "FIRST_SECONDS", 0)
    monkeypatch.setattr(channel, "AGAIN_SECONDS", 1)
    sink = EventSink("127.0.0.1", print)
    with pytest.raises(ClusterError, match="it accepts, but does not answer: stopped, or overloaded"):
        EventSource(sink.address)
    monkeypatch.setattr(channel, "AGAIN_SECONDS", 60)
    connect_once = channel._connect_once

    def connect_or_go_on(address):
        try:
            return connect_once(address)
        except BlockingIOError:
            sink.__enter__()
            raise

    monkeypatch.setattr(channel, "_connect_once", connect_or_go_on)
    source = EventSource(sink.address)
    source.wait()
    sink.__exit__()


def test_a_connection_that_is_cut_is_made_anew():
    got = []
    with EventSink("127.0.0.1", got.append) as sink:
        source = EventSource(sink.address)
        source.tell(Note(message="0"))
        source.wait()
        sink.tell_draining(frozenset({"a"}))
        for number, look in enumerate((source.wait, source.draining, source.save_asked, lambda: None), 1):
            cut(sink)
            look()
            source.tell(Note(message=str(number)))
            source.wait()
        assert [event.message for event in got] == ["0", "1", "2", "3", "4"]
        # What the driver said before holds for a gang that comes again, or later.
        assert source.draining() == {"a"}
        sink.ask_to_save()
        late = EventSource(sink.address)
        late.wait()
        assert late.draining() == {"a"}
        assert late.save_asked()


def test_trials_and_ends_of_stages_that_a_cut_took_away_unread_are_told_again():
    entered, go_on = threading.Event(), threading.Event()
    got = []

    def take(event):
        if event == Note(message="slow"):
            entered.set()
            go_on.wait(60)
        got.append(event)

    trial, end, again, failed = (
        TrialStarted(row=TrialRow("t", "v", {}, 0, ROWS)),
        ended("sft-1", task="a"),
        ended("sft-2", task="a"),
        StageFailed(**STAGE, cause="c", log="l", retry=True),
    )
    with EventSink("127.0.0.1", take) as sink:
        source = EventSource(sink.address)
        source.tell(ended("sft-0", task="a"))
        source.wait()
        source.tell(Note(message="slow"))
        assert entered.wait(60)  # What follows sits unread.
        for event in (trial, end, failed, again, StageStarted(trial="t", stage="sft-2", kind="sft")):
            source.tell(event)
        discard_unread(sink)
        source.wait()
        told, got[:] = list(got), []
        go_on.set()
        # The failure is lost, as it must not come twice; the end of what is made again holds no more.
        assert told[1:] == [trial, end]
        cut(sink)
        source.wait()  # And what the driver has taken is not told a second time.
        assert trial not in got


def discard_unread(sink: EventSink) -> None:
    """Cut, with what has come and was not read yet."""
    for connection in list(sink._connections):
        with socket.socket(fileno=os.dup(connection.fileno())) as peer:
            peer.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while peer.recv(4096):
                    pass
    cut(sink)


def test_threads_may_tell_while_another_waits():
    got = []
    with EventSink("127.0.0.1", got.append) as sink:
        source = EventSource(sink.address)

        def tell():
            for number in range(200):
                source.tell(Note(message=str(number) * 10_000))  # Of several writes each.
                source.save_asked()

        threads = [threading.Thread(target=tell, daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            source.wait()
        source.wait()
    assert len(got) == 400


def test_a_gang_whose_driver_is_gone_ends_where_it_tells_or_looks_next(monkeypatch):
    monkeypatch.setattr(channel, "AGAIN_SECONDS", 0)
    with EventSink("127.0.0.1", lambda event: None) as sink:
        sources = [EventSource(sink.address) for _ in range(4)]
        for source in sources:
            source.wait()
    cut(sink)
    looks = (
        EventSource.wait,
        EventSource.draining,
        EventSource.save_asked,
        lambda source: source.tell(Note(message="unseen")),
    )
    for source, look in zip(sources, looks, strict=True):
        for _ in range(2):  # It does not come back, either.
            with pytest.raises(ClusterError, match="cannot reach the driver"):
                look(source)


def test_signs_of_life_go_on_over_a_new_connection():
    heard = queue.Queue()
    watch = Watch(max_silence_seconds=60, max_idle_seconds=60, end=print, report=print)
    watch.hear = heard.put
    with EventSink("127.0.0.1", print, watch=watch) as sink:
        start_beats(sink.address, Process("g", 1, "node", 1), every_seconds=0.1)
        for _ in range(2):
            heard.get(timeout=30)
            cut(sink)
            while not heard.empty():
                heard.get()
        assert heard.get(timeout=30).process.rank == 1


def test_signs_of_life_come_back_however_long_the_driver_could_not_be_reached(monkeypatch):
    heard, failures = queue.Queue(), [ClusterError("cannot reach the driver")] * 2
    watch = Watch(max_silence_seconds=60, max_idle_seconds=60, end=print, report=print)
    watch.hear = heard.put

    def connect_in_the_end(*args, **kwargs):
        if failures:
            heard.put(f"{len(failures)} left")
            raise failures.pop()
        return connect(*args, **kwargs)

    with EventSink("127.0.0.1", print, watch=watch) as sink:
        start_beats(sink.address, Process("g", 1, "node", 1), every_seconds=0.1)
        heard.get(timeout=30)
        monkeypatch.setattr(heartbeat, "connect", connect_in_the_end)
        cut(sink)
        while heard.get(timeout=30) != "1 left":
            pass
        assert heard.get(timeout=30).process.rank == 1


def test_beats_that_are_dropped_on_the_way_are_noticed_before_the_driver_misses_them(monkeypatch):
    made = queue.Queue()

    def connect_and_keep(*args, **kwargs):
        connection = connect(*args, **kwargs)
        made.put(connection)
        return connection

    monkeypatch.setattr(heartbeat, "connect", connect_and_keep)
    with EventSink("127.0.0.1", print) as sink:
        start_beats(sink.address, Process("g", 0, "node", 1), every_seconds=beat_seconds(120))
        events = EventSource(sink.address)
        assert option(made.get(), "TCP_USER_TIMEOUT") == 30_000
        assert option(events._connection, "TCP_USER_TIMEOUT") == 0  # The driver may take its time over an event.
        wait_until(lambda: len(sink._connections) == 2)
        for end in (events._connection, *sink._connections):
            idle, every, times = (option(end, f"TCP_KEEP{name}") for name in ("IDLE", "INTVL", "CNT"))
            assert idle + every * times <= 200


def test_who_waits_for_a_store_is_not_idle(tmp_path):
    heard, remote, answers = queue.Queue(), Remote(f"local://{tmp_path}"), threading.Event()
    watch = Watch(max_silence_seconds=60, max_idle_seconds=60, end=print, report=print)
    watch.hear = heard.put
    asking = threading.Thread(target=remote._ask, args=("read", lambda: answers.wait(60)))

    def hear(waits: bool) -> None:
        while (heard.get(timeout=30).load == 1.0) != waits:
            pass

    with EventSink("127.0.0.1", print, watch=watch) as sink:
        start_beats(sink.address, Process("g", 0, "node", 1), every_seconds=0.1)
        hear(False)
        asking.start()
        hear(True)
        answers.set()
        asking.join()
        hear(False)


BEATER = """
import sys, time
from raysweep.runners.channel import Address
from raysweep.runners.heartbeat import start_beats
from raysweep.runners.watch import Process

address = Address(sys.argv[1], int(sys.argv[2]), bytes.fromhex(sys.argv[3]))
start_beats(address, Process("g", 1, "node", 1), every_seconds=1)
time.sleep(60)
"""


@pytest.mark.skipif(not can_have_hosts(), reason="only root may make hosts")
def test_a_process_whose_host_has_vanished_is_missed_all_the_same(monkeypatch):
    """Its connection is given up before the time of its silence is; one that closes it has ended, and is not missed."""
    monkeypatch.setattr(channel, "KEEPALIVE", {"TCP_KEEPIDLE": 1, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 2})
    watch = Watch(max_silence_seconds=60, max_idle_seconds=60, end=print, report=print)
    with hosts() as network, EventSink(network.ip, print, watch=watch) as sink:
        place = (sink.address.host, str(sink.address.port), sink.address.key.hex())
        for vanishes in (False, True):
            host = network.add()
            beater = subprocess.Popen([*host.command, sys.executable, "-c", BEATER, *place])
            wait_until(lambda: watch._lives)
            if vanishes:
                host.vanish()
            else:
                beater.kill()
            wait_until(lambda: not sink._connections)
            assert bool(watch._lives) == vanishes
            beater.kill()
            beater.wait()


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def option(connection, name: str) -> int:
    with socket.socket(fileno=os.dup(connection.fileno())) as peer:
        return peer.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))


def cut(sink: EventSink) -> None:
    """As a network does that fails: every connection to the driver."""
    for connection in list(sink._connections):
        # The thread of an older one may have closed it just now.
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as peer:
            peer.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    "event",
    [
        Note(message="\u202e \x1b[2J"),
        GangsChosen(num_workers=2),
        TrialStarted(row=TrialRow("t", "v", {"pretrain.optimizer.lr": 0.01}, 0, ROWS)),
        StageStarted(**STAGE),
        StageProgress(**STAGE, at=Reached(3, loss=math.inf, num_tokens=7, tokens_per_second=0.5)),
        StageProgress(**STAGE, at=Reached(3, saved_step=3)),
        ended("sft-1", metrics={"diverged_step": 3, "score": math.inf}, lr=1e-3, seed=0, step=6, task="a"),
        ended("sft-1", event="found", status="diverged"),
        StageFailed(**STAGE, cause="c", log="l", retry=True),
    ],
)
def test_an_event_arrives_as_it_was(event):
    got = []
    with EventSink("127.0.0.1", got.append) as sink:
        source = EventSource(sink.address)
        source.tell(event)
        source.wait()
    assert got == [event]
    assert got[0].time == event.time


def test_what_no_text_can_hold_is_replaced():
    got = []
    with EventSink("127.0.0.1", got.append) as sink:
        source = EventSource(sink.address)
        source.tell(StageFailed(**STAGE, cause="no such file: a\udcff", log="\ud800", retry=False))
        source.wait()
    assert (got[0].cause, got[0].log) == ("no such file: a?", "?")


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"{",
        b"\xff",
        b'{"event": "unheard-of"}',
        b'{"event": "note"}',
        b'{"event": "note", "message": 3}',
        b'{"event": "note", "message": "m", "extra": 1}',
        b'{"event": "started", "trial": "t", "stage": "../../x", "kind": "x"}',
        b'{"event": "progress", "trial": "t", "stage": "x-1", "kind": "x", "at": {"step": "3"}}',
        b'{"event": "beat", "process": {}, "trial": "", "stage": "", "seconds": 1.0, "load": 1.0}',
        pickle.dumps({"event": "note"}),
    ],
)
def test_what_is_no_event_is_left_out_and_stops_nothing(message, caplog):
    got = []
    with EventSink("127.0.0.1", got.append) as sink:
        source = EventSource(sink.address)
        source._connection.send_bytes(message)
        source.tell(Note(message="after"))
        source.wait()
    assert [event.message for event in got] == ["after"]
    assert "no event of ours" in caplog.text


@pytest.mark.parametrize(
    "message",
    [
        b'{"event": "unheard-of"}',
        b'{"event": "save", "now": true}',
        b'{"event": "draining", "nodes": "all"}',
        b'{"event": "note", "message": "m"}',  # What a gang tells is nothing that it is told.
        b"[" * 100_000,
        pickle.dumps({"event": "save"}),
    ],
)
def test_what_is_no_message_to_a_gang_is_left_out(message, caplog):
    with EventSink("127.0.0.1", print) as sink:
        source = EventSource(sink.address)
        wait_until(lambda: sink._connections)
        (connection,) = sink._connections
        connection.send_bytes(message)
        sink.tell_draining(frozenset({"n"}))
        wait_until(source.draining)
        assert (source.draining(), source.save_asked()) == ({"n"}, False)
    assert "no message of the driver's" in caplog.text


def test_silent_and_half_sent_connections_hold_nobody_up(monkeypatch):
    monkeypatch.setattr(channel, "HANDSHAKE_SECONDS", 1)
    got = []
    with EventSink("127.0.0.1", got.append) as sink:
        early = EventSource(sink.address)
        place = (sink.address.host, sink.address.port)
        strangers = [socket.create_connection(place) for _ in range(20)]
        for stranger in strangers[:10]:
            stranger.sendall(b"\x00\x00")  # Half the length of a message.
        half = EventSource(sink.address)
        half._connection._send(b"\x00\x00\x01\x00half")  # Let in, and stopped amid a message.
        began = time.monotonic()
        late = EventSource(sink.address)
        for source in (early, late):
            source.tell(Note(message="x"))
            source.wait()
        assert len(got) == 2
        assert time.monotonic() - began < 1
        for stranger in strangers:  # And each is sent away.
            stranger.settimeout(10)
            while stranger.recv(4096):
                pass


def test_gangs_are_told_what_the_driver_asks_whenever_they_look():
    with EventSink("127.0.0.1", lambda event: None) as sink:
        source = EventSource(sink.address)
        source.wait()
        assert not source.save_asked()
        assert source.draining() == frozenset()
        sink.ask_to_save()
        sink.tell_draining(frozenset({"a"}))
        sink.tell_draining(frozenset({"a", "b"}))
        source.wait()  # Passes over none of it.
        assert source.draining() == {"a", "b"}
        assert source.save_asked()
        assert not source.save_asked()
