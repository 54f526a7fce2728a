"""Who drives a run, and how it is stopped; what a run's log says."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
from ended import ended
from tiny import put

from raysweep.cli import main
from raysweep.errors import StoreError
from raysweep.events import Note, StageFailed, StageProgress, StageStarted, TrialStarted
from raysweep.lease import Pace
from raysweep.run_files import TrialRow
from raysweep.runners.drivers import JOB_ADDRESS, JOB_ID, cancel, this_driver
from raysweep.runners.journal import Journal
from raysweep.runs import Run
from raysweep.store import Store
from raysweep.worker import Reached

HOLDER = """
import signal, sys, time
from raysweep.lease import Pace
from raysweep.runners.drivers import this_driver
from raysweep.runs import Run
from raysweep.store import Store

run = Run(Store(sys.argv[1]), "r")
run.store.pace = Pace(beat_seconds=0.2)
with run.held():
    run.note_driver(this_driver() | {"host": sys.argv[2]})
    try:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        signal.signal(signal.SIGINT, signal.default_int_handler)  # In the background it is ignored.
        print("held", flush=True)
        time.sleep(60)
    finally:
        time.sleep(0.5)  # It saves.
        (run.folder / "saved").write_text("")
"""


def no_job(job_id: str, address: str) -> str:
    raise AssertionError("no job")


@pytest.fixture
def run(store: Store) -> Run:
    return Run.create(store, "r", sweep_text="x", identity="{}")


def hold(run: Run, host: str) -> subprocess.Popen[str]:
    """A process that holds a run, noted to be on some host."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, run.store.url, host], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_run_of_this_machine_is_stopped_once_it_has_saved(run):
    holder = hold(run, socket.gethostname())
    assert f"process {holder.pid} has stopped" in cancel(run, stop_job=no_job)
    assert (run.folder / "saved").exists()
    assert holder.wait(timeout=30) == 143
    assert cancel(run, stop_job=no_job) == "run r is not under way"


def test_a_run_of_another_host_is_asked_through_the_folder_to_save_and_end(run, caplog):
    holder = hold(run, "elsewhere")
    said = cancel(run, stop_job=no_job)
    assert said == f"run r: process {holder.pid} on elsewhere has stopped"
    assert f"run 'r': asked process {holder.pid} on elsewhere to end, which looks every 15 s" in caplog.text
    assert (run.folder / "saved").exists()
    assert holder.wait(timeout=30) == -signal.SIGINT
    assert not (run.folder / "end").exists(), "the next driver is not asked"


def test_a_process_that_does_not_hold_the_run_is_let_be(run):
    run.store.pace = Pace(beat_seconds=0.1)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    run_elsewhere = Run(Store(run.store.root), "r")
    run_elsewhere.store.pace = Pace(beat_seconds=3600)
    try:
        with run_elsewhere.held():
            for host, pid in (("elsewhere", os.getpid()), (socket.gethostname(), os.getppid())):
                run.note_driver({"host": host, "pid": pid})
                with pytest.raises(StoreError, match=f"process {pid} on {host} was asked to end, and has not in 0.2 s"):
                    cancel(run, stop_job=no_job, wait_seconds=0.1)
            run.note_driver(this_driver())
            with pytest.raises(StoreError, match=r"has not stopped in 0\.1 s"):
                cancel(run, stop_job=no_job, wait_seconds=0.1)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_job_is_stopped_by_its_job_server(run, monkeypatch):
    monkeypatch.setenv(JOB_ID, "raysweep-x-1")
    monkeypatch.setenv(JOB_ADDRESS, "http://head:8265")
    run.note_driver(this_driver())
    said = cancel(run, stop_job=lambda job_id, address: f"{job_id} at {address} has stopped")
    assert said == "run r: raysweep-x-1 at http://head:8265 has stopped"


def test_the_log_says_what_happened_and_why_a_stage_failed(run, capsys):
    journal = Journal(run, lambda event: None)
    sft, probe = ({"trial": "t", "stage": stage, "kind": stage.split("-")[0]} for stage in ("sft-12ab", "probe-9"))
    journal(StageStarted(**sft, time=1_800_000_000.0))
    journal(StageFailed(**sft, cause="\x1b[2J full", log="Traceback: disk full", retry=True))
    journal(StageStarted(**probe))
    journal(StageProgress(**probe, at=Reached(3)))
    journal.close()
    (run.folder / "events.jsonl").open("a").write('{"event": "cut o')
    store = ["--store", run.store.url]
    assert main(["logs", "r", *store]) == 0
    said = capsys.readouterr().out
    assert said.startswith("2027-01-15 08:00:00 started  sft-12ab\n")
    assert "\\x1b[2J full (tried again)" in said
    assert "probe-9" in said
    assert "Traceback" not in said
    assert main(["logs", "r", "sft-1", *store]) == 0
    said = capsys.readouterr().out
    assert "Traceback: disk full" in said
    assert "probe-9" not in said
    assert main(["logs", "r", "--json", *store]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [event["event"] for event in document["events"]] == ["started", "failed", "started"]
    assert main(["logs", "r", "nothing", *store]) == 2


def test_what_another_gang_has_made_is_in_the_log_once(run):
    journal = Journal(run, lambda event: None)
    for _ in range(2):  # That gang tells of it, and the trial's own, which has waited for it.
        journal(StageStarted(trial="t", stage="sft-1", kind="sft"))
    for time in (3.0, 4.0):
        journal(ended("sft-1", time=time, wall_seconds=20.5))
    assert [event["event"] for event in run.events()] == ["started", "started", "finished"]


def test_a_disk_without_room_for_the_log_loses_no_failure(run, monkeypatch):
    def full(event):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "note_event", full)
    journal = Journal(run, lambda event: None)
    put(run.store, "x-1")
    journal(StageFailed(trial="t", stage="x-2", kind="x", cause="c", log="l", retry=False))
    assert [failure["attempts"] for failure in run.failures()] == [1]


def test_a_run_whose_failures_find_no_place_does_not_pass_for_one_that_is_done(run, caplog):
    (run.folder / "failures").write_text("a file where the folder should be")
    journal = Journal(run, lambda event: None)
    for number in range(10):
        journal(StageFailed(trial="t", stage=f"x-{number}", kind="x", cause="its cause", log="l", retry=False))
    journal.close()
    assert caplog.text.count("not kept yet") <= 11  # One more at the end.
    with pytest.raises(StoreError, match=r"not even that 10 stage\(s\) of run 'r' failed: its cause; once it can"):
        journal.check()


def test_an_end_that_is_told_again_is_one(run):
    shown = []
    journal = Journal(run, shown.append)
    end = ended("x-1", step=1)
    for event in (TrialStarted(row=TrialRow("t", "v", {}, 0, ())), end, end, replace(end, trial="t2")):
        journal(event)
    assert [event.trial for event in shown[1:]] == ["t", "t2"]
    assert [event["trial"] for event in run.events()] == ["t", "t2"]


def test_a_worker_that_stops_after_a_stage_does_not_fail_it(run):
    # Its last sign of life was of the stage that it has finished since.
    shown = []
    journal = Journal(run, shown.append)
    stage = {"trial": "t", "stage": "x-1", "kind": "x"}
    failed = StageFailed(**stage, cause="worker 0 gave no sign of life", log="l", retry=True)
    journal(TrialStarted(row=TrialRow(trial="t", variant="v", point={}, seed=0, stages=())))
    journal(StageStarted(**stage))
    journal(ended("x-1", step=1))
    journal(failed)
    assert run.failures() == []
    assert isinstance(shown[-1], Note)
    assert "no sign of life" in shown[-1].message
    journal(StageStarted(**stage))  # It was lost, and is made again.
    journal(failed)
    assert [failure["stage"] for failure in run.failures()] == ["x-1"]
