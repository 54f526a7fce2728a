"""A gang of one, and when a gang is replaced."""

import multiprocessing
import os
import threading
from types import SimpleNamespace

import psutil
import pytest

from raysweep.errors import ClusterError
from raysweep.plan import Stage
from raysweep.resources import Resources
from raysweep.runners import gang as gang_module
from raysweep.runners.attempts import Failure, attempt
from raysweep.runners.gang import Gang, GangBroken, RankActor, RayGang
from raysweep.runners.trainable import GangTrainable
from raysweep.stages.tokenize import Tokenize
from raysweep.worker import Worker


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


def test_a_state_folder_that_cannot_be_made_is_a_failure(grammar, store):
    stage = Stage(Tokenize(corpus=grammar), {})
    store.work_dir(stage.id)
    (store.root / "partial" / f"{stage.id}.state").write_text("a file where the folder should be")
    outcome = attempt(stage, store, Worker())
    assert isinstance(outcome, Failure)
    assert f"{stage.id}.state" in outcome.cause
    assert not outcome.final


class Actor:
    """As Ray's handle of one; what it does is done when it is asked for."""

    def __init__(self, actor) -> None:
        self._actor = actor

    def __getattr__(self, name):
        return SimpleNamespace(remote=getattr(self._actor, name))


def test_a_gang_holds_what_its_largest_rank_does(monkeypatch):
    monkeypatch.setattr(gang_module, "_get", lambda done: done)
    gang, ranks = object.__new__(RayGang), [object.__new__(RankActor) for _ in range(2)]
    gang.worker, gang._others = Worker(), [Actor(rank) for rank in ranks]
    for rank in ranks:
        rank._worker = Worker()
    own = gang.memory_bytes()
    assert own == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)
    monkeypatch.setattr(ranks[1], "memory_bytes", lambda: 3 * own)
    assert gang.memory_bytes() == 3 * own


def test_a_gang_with_a_rank_that_died_is_replaced_before_its_next_trial():
    trainable = object.__new__(GangTrainable)
    trainable._gang, trainable._first_memory, trainable._unfit = SimpleNamespace(memory_bytes=_broken), None, None
    assert trainable.reset_config({})
    assert trainable._unfit == "a worker of the gang died"


def _broken():
    raise GangBroken("a worker of the gang died")


def _raise(message):
    raise ClusterError("the driver is gone")


def _never_return(message):
    threading.Event().wait()


def _end(note):
    try:
        gang_module._exit_saying("why", note)
    finally:
        os._exit(2)  # An exception, too, would end it with 1.


@pytest.mark.parametrize("note", [ignore, _raise, _never_return])
def test_rank_0_ends_whether_or_not_the_driver_can_be_told_why(note, monkeypatch):
    monkeypatch.setattr(gang_module, "TELL_SECONDS", 0.1)
    child = multiprocessing.get_context("fork").Process(target=_end, args=(note,))
    child.start()
    child.join(60)
    code = child.exitcode
    child.kill()
    assert code == 1
