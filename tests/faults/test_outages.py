"""A server of objects that is gone for a while, or refuses: the same run waits, says so once, and goes on."""

import threading
import time

import pytest
from tiny import put, results_of, row

from raysweep.errors import UnreachableError
from raysweep.results import Results
from raysweep.runners import run_sweep
from raysweep.runs import Run
from raysweep.store import Store

ON_A_SERVER = pytest.mark.parametrize("url", ["s3"], indirect=True)


@ON_A_SERVER
def test_a_run_waits_for_a_server_that_is_gone_for_a_while(lone_space, machine, s3, untouched, caplog):
    began: list[threading.Thread] = []

    def goes(event) -> None:
        if event.event == "finished" and event.kind == "pretrain" and not began:
            s3.stop()
            began.append(threading.Thread(target=lambda: (time.sleep(5), s3.start())))
            began[0].start()

    run = run_sweep(lone_space, machine("one"), runner="inline", show=goes)
    assert began
    assert run.failures() == []
    assert sum("; trying again for up to 10:00" in text for text in caplog.messages) == 1
    assert sum("answers again, after 0:" in text for text in caplog.messages) == 1
    assert results_of(run) == untouched(lone_space)


@ON_A_SERVER
def test_a_server_that_stays_away_is_waited_for_as_long_as_was_said(machine, s3, caplog):
    other = machine("one")
    other.be_patient(3)
    s3.stop()
    try:
        start = time.monotonic()
        with pytest.raises(UnreachableError, match=r"store 's3://.*' cannot be read: "):
            other.get("x-1")
        assert time.monotonic() - start >= 3
    finally:
        s3.start()
    assert sum("trying again" in text for text in caplog.messages) == 1
    put(other)
    assert other.get("x-1") is not None


def test_a_slow_store_takes_its_time_and_one_that_times_out_is_asked_again(machine, monkeypatch, caplog):
    store: Store = machine("one")
    store.be_patient(60)
    upload, tries = store._remote._fs.put_file, []

    def slow(*args, **kwargs):
        tries.append(time.sleep(0.2))
        if len(tries) < 3:
            raise TimeoutError("timed out")
        return upload(*args, **kwargs)

    monkeypatch.setattr(store._remote._fs, "put_file", slow)
    put(store)
    assert len(tries) == 4  # The file's third try, and its record's first.
    assert sum("trying again" in text for text in caplog.messages) == 1
    assert (machine("two").folder("x-1") / "sub" / "file").read_text() == "weights"


@pytest.mark.parametrize("error", [PermissionError("Access Denied"), OSError(30, "Read-only file system")])
def test_a_refusal_is_no_outage(machine, monkeypatch, error):
    store: Store = machine("one")
    store.be_patient(60)

    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(store._remote._fs, "put_file", refuse)
    start = time.monotonic()
    with pytest.raises(UnreachableError, match="cannot be written: "):
        put(store)
    assert time.monotonic() - start < 5


def test_the_report_of_a_store_that_can_only_be_read_stays_here(machine, monkeypatch, caplog):
    put(machine("one"))
    run = Run.create(machine("one"), "r", sweep_text="x", identity="{}")
    run.add_trial(row("t1"))
    run.publish()
    store = machine("two")

    def refuse(*args, **kwargs):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(store._remote._fs, "put_file", refuse)
    assert Results(Run.find(store, "r")).write_report().exists()
    assert "the report stays on this machine: store" in caplog.text
