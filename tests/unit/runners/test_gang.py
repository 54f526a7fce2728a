"""A gang of one, and when a gang is replaced."""

import multiprocessing
import os
import threading

import pytest

from raysweep.errors import ClusterError
from raysweep.plan import Stage
from raysweep.resources import Resources
from raysweep.runners import gang as gang_module
from raysweep.runners.attempts import Failure, attempt
from raysweep.runners.gang import Gang
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
