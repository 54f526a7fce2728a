"""Events from gangs to the driver, whoever else knocks at its port."""

import socket
import time

from raysweep.runners import events
from raysweep.runners.events import Address, EventSink, EventSource


def test_events_reach_the_driver_before_wait_returns():
    got = []
    with EventSink("127.0.0.1", got.append) as sink:
        sources = [EventSource(sink.address) for _ in range(2)]
        for number in range(100):
            sources[number % 2].tell({"event": "x", "number": number})
        for source in sources:
            source.wait()
        assert sorted(event["number"] for event in got) == list(range(100))
        # Without the secret nobody is let in, and nothing breaks.
        stranger = EventSource(Address(sink.address.host, sink.address.port, b"wrong"))
        stranger.tell({"event": "x", "number": -1})
        sources[0].tell({"event": "x", "number": 100})
        sources[0].wait()
    assert got[-1]["number"] == 100
    assert all("time" in event for event in got)
    # A driver that is gone stops the telling, not the work.
    EventSource(sink.address).tell({"event": "x"})


def test_silent_and_half_sent_connections_hold_nobody_up(monkeypatch):
    monkeypatch.setattr(events, "HANDSHAKE_SECONDS", 1)
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
            source.tell({"event": "x"})
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
