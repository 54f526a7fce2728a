"""A gang of one, and when a gang is replaced."""

from types import SimpleNamespace

from raysweep.plan import Stage
from raysweep.runners.attempts import Failure
from raysweep.runners.gang import Gang
from raysweep.search import Resources
from raysweep.stages.tokenize import Tokenize


def ignore(event) -> None:
    pass


def test_timings_are_provenance_and_not_results(grammar, store):
    gang = Gang(store, Resources(), report=ignore)
    record = gang.wide(Stage(Tokenize(corpus=grammar), {}))
    assert record.provenance["wall_seconds"] > 0
    assert record.provenance["world_size"] == 1
    assert record.provenance["versions"]["torch"]
    assert not [name for name in record.metrics if name.endswith("_seconds")]
    assert gang.wide(Stage(Tokenize(corpus=grammar), {})) == record


def test_a_missing_input_is_a_failure_that_says_so(grammar, store):
    gang = Gang(store, Resources(), report=ignore)
    outcome = gang.wide(Stage(Tokenize(corpus=grammar), {"checkpoint": "pretrain-none"}))
    assert isinstance(outcome, Failure)
    assert "pretrain-none is not in" in outcome.cause
    assert "Traceback" in outcome.log
    assert store.finished_ids() == set()


def test_a_gang_that_grew_is_replaced(tiny_space, store, monkeypatch):
    from raysweep.runners.tune import MEMORY_SLACK, GangTrainable

    gang = Gang(store, tiny_space.declared.resources, report=ignore)
    sizes = iter([10**9, 10**9 + MEMORY_SLACK // 2, 10**9 + 2 * MEMORY_SLACK])
    monkeypatch.setattr(gang, "memory_bytes", lambda: next(sizes))
    trainable = GangTrainable.__new__(GangTrainable)
    trainable._space, trainable._pruned, trainable._gang = tiny_space, {}, gang
    trainable._first_memory = None
    trainable._events = SimpleNamespace(tell=ignore)
    config = {"pretrain.optimizer.lr": 0.01, "seed": 0}
    assert [trainable.reset_config(config) for _ in range(3)] == [True, True, False]


def test_events_reach_the_driver_before_wait_returns():
    from raysweep.runners.events import Address, EventSink, EventSource

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
