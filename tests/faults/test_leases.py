"""One driver a run among all machines of a URL, whoever is killed, is frozen, or comes at the same time."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import fsspec
import pytest
from tiny import row

from raysweep import mirror
from raysweep.errors import StoreError
from raysweep.lease import Pace
from raysweep.mirror import Mirror
from raysweep.remote import Remote
from raysweep.runners.drivers import cancel
from raysweep.runs import Run
from raysweep.store import Store

PACE = Pace(beat_seconds=0.2, expiry_seconds=2.0)
DRIVER = """\
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # Where the tests run in the background, it is ignored.
from raysweep.errors import StoreError
from raysweep.lease import Pace
from raysweep.run_files import TrialRow  # By `tiny` it would take four times as long to start.
from raysweep.runs import Run
from raysweep.store import Store
store = Store(sys.argv[1])
store.pace = Pace(beat_seconds=0.2, expiry_seconds=2.0)
run = Run.create(store, "r", sweep_text="x", identity="{}")
try:
    with run.held():
        run.add_trial(TrialRow(sys.argv[2], variant="v", point={}, seed=0, stages=()))
        print("holds", flush=True)
        try:
            sys.stdin.readline()
        finally:
            print("saves", flush=True)
            run.publish()
except StoreError as error:
    print(error, flush=True)
"""


class Driver:
    """A process that drives the run on a machine of some name, until it is told to end."""

    def __init__(self, url: str, folder, name: str) -> None:
        environment = {**os.environ, "XDG_CACHE_HOME": str(folder / name), "PYTHONPATH": os.pathsep.join(sys.path)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, url, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def says(self) -> str:
        return self._process.stdout.readline().strip()

    def end(self) -> None:
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def send(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        return self._process.wait(60)


@pytest.fixture
def drive(url, tmp_path) -> Iterator:
    """Starts a driver."""
    drivers: list[Driver] = []

    def start(name: str) -> Driver:
        drivers.append(Driver(url, tmp_path, name))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.send(signal.SIGKILL)
        driver.wait()


@pytest.fixture
def here(machine) -> Run:
    """The run, as a further machine opens it."""
    store = machine("here")
    store.pace = PACE
    return Run.create(store, "r", sweep_text="x", identity="{}")


def notes(url: str) -> list[str]:
    fs, root = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    return fs.find(f"{root}/partial")


def trials(store: Store) -> list[str]:
    return [trial.trial for run in Run.all(store) for trial in run.trials()]


def test_a_second_machine_is_refused_while_the_first_lives(drive, here, url):
    first = drive("one")
    assert first.says() == "holds"
    with (
        pytest.raises(StoreError, match=r"run 'r' is under way in process \d+ on .*; wait for it, or end it"),
        here.held(),
    ):
        pass
    first.end()
    first.wait()
    with here.held():
        pass
    assert notes(url) == []


def test_a_driver_of_another_machine_is_asked_through_the_store_to_end(drive, here, url):
    first = drive("one")
    assert first.says() == "holds"
    assert cancel(here, stop_job=None) == "run r: its driver has stopped"
    assert first.says() == "saves"
    assert first.wait() == -signal.SIGINT
    assert trials(here.store) == ["one"], "it brought what it noted"
    assert notes(url) == []
    assert cancel(here, stop_job=None) == "run r is not under way"
    here.ask_to_end("one who came too late")
    second = drive("two")
    assert second.says() == "holds"
    time.sleep(5 * PACE.beat_seconds)
    second.end()
    assert second.wait() == 0


def test_a_run_whose_note_is_being_renewed_is_under_way(here, url):
    assert not here.is_under_way
    fs, root = fsspec.core.url_to_fs(url)
    folder = f"{root}/partial/run-r.held"
    fs.makedirs(folder, exist_ok=True)
    fs.pipe_file(f"{folder}/a", b"")
    assert here.is_under_way
    fs.pipe_file(f"{folder}/a", b'{"holds": false}')
    assert not here.is_under_way


def test_what_a_holder_sent_after_the_run_was_opened_here_is_kept(drive, here, machine):
    first = drive("one")
    assert first.says() == "holds"
    first.end()
    first.wait()
    with here.held():
        here.add_trial(row("here"))
        here.publish()
    assert trials(machine("two")) == ["one", "here"]


def test_who_reads_a_run_beside_its_driver_takes_no_notes_back(machine, monkeypatch):
    """Another process reads the run after the driver's notes were uploaded, and before it is noted that they were."""
    run = Run.create(machine("one"), "r", sweep_text="x", identity="{}")
    put, read = Remote.put, "import sys; from raysweep.runs import Run; from raysweep.store import Store; "
    read += "print([trial.trial for trial in Run.find(Store(sys.argv[1]), 'r').trials()])"
    seen = []

    def put_and_be_read(remote: Remote, path, name: str) -> None:
        put(remote, path, name)
        if name.endswith("trials.jsonl") and not seen:
            run.add_trial(row("t2"))
            reader = subprocess.run([sys.executable, "-c", read, run.store.url], capture_output=True, text=True)
            seen.append(reader.stdout.strip())

    with run.held():
        run.publish()
        with run._sending:  # Not between the two: a renewal of the lease may send the row before the driver does.
            monkeypatch.setattr(Remote, "put", put_and_be_read)
            run.add_trial(row("t1"))
        run.publish()
        assert seen == ["['t1', 't2']"]
        assert [trial.trial for trial in run.trials()] == ["t1", "t2"]
        run.publish()
    assert trials(machine("two")) == ["t1", "t2"]


def test_a_driver_waits_for_who_is_reading_the_run(machine, monkeypatch, caplog):
    """What a reader is about to put in place of a file is there before the driver writes that; and it is told of."""
    first = Run.create(machine("two"), "r", sweep_text="x", identity="{}")
    first.add_trial(row("t1"))
    first.publish()
    run = Run.create(machine("one"), "r", sweep_text="x", identity="{}")
    first.add_trial(row("t2"))
    first.publish()
    get, reads, goes_on = Remote.get, threading.Event(), threading.Event()

    def get_slowly(remote: Remote, name: str, path) -> None:
        if threading.current_thread() is reader:
            reads.set()
            goes_on.wait(60)
        get(remote, name, path)

    def drive() -> None:
        with run.held():
            run.add_trial(row("t3"))

    monkeypatch.setattr(mirror, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(Remote, "get", get_slowly)
    reader, driver = threading.Thread(target=Run.find, args=(machine("one"), "r")), threading.Thread(target=drive)
    reader.start()
    assert reads.wait(60)
    driver.start()
    while "waiting for another process of this machine" not in caplog.text:
        time.sleep(0.01)
    assert driver.is_alive()
    goes_on.set()
    reader.join()
    driver.join()
    assert [trial.trial for trial in run.trials()] == ["t1", "t2", "t3"]


def test_of_two_that_come_at_once_one_holds_at_most(drive):
    both = [drive("one"), drive("two")]
    said = [driver.says() for driver in both]
    assert said.count("holds") <= 1
    assert all(word == "holds" or "run 'r' is" in word for word in said)


def test_a_killed_driver_is_taken_over_from_with_what_it_had_noted(drive, here, url, machine, caplog):
    killed = drive("one")
    assert killed.says() == "holds"
    deadline = time.monotonic() + 30
    while trials(machine("two")) != ["one"] and time.monotonic() < deadline:
        time.sleep(0.1)  # Until it has been sent with a renewal.
    killed.send(signal.SIGKILL)
    killed.wait()
    # On its own machine the lock that it held is free, which tells at once.
    again = drive("one")
    assert again.says() == "holds"
    again.send(signal.SIGKILL)
    again.wait()
    start = time.monotonic()
    with here.held():
        assert time.monotonic() - start >= PACE.expiry_seconds
    assert "gave no sign of life for 2 s, and is taken over from" in caplog.text
    assert notes(url) == []
    assert trials(machine("three")) == ["one"]


def test_a_driver_that_was_frozen_ends_and_takes_nothing_back(drive, here, url, machine):
    frozen = drive("one")
    assert frozen.says() == "holds"
    frozen.send(signal.SIGSTOP)
    with here.held():
        (here.folder / "pruned.json").write_text('{"t": 1}')
        here.publish()
        frozen.send(signal.SIGCONT)
        assert frozen.says() == "saves"
        assert frozen.says().startswith("run 'r' was taken over by process")
        assert Run.find(machine("two"), "r").pruned() == {"t": 1}
    assert notes(url) == []


def test_a_note_is_renewed_whatever_else_fails(here, url, monkeypatch, caplog):
    """As of a disk without room for the note of what was sent."""
    calls = []

    def fails(self, *, without=()):
        calls.append(None)
        raise [OSError(28, "No space left on device"), StoreError("no bucket")][len(calls) % 2]

    with monkeypatch.context() as patched, here.held():
        patched.setattr(Mirror, "push", fails)
        [name] = notes(url)
        Remote(url).write(f"{name.removeprefix(fsspec.core.url_to_fs(url)[1]).strip('/')[:-1]}x", b'{"taken_from": 1}')
        deadline = time.monotonic() + 30
        while len(calls) < 4 and time.monotonic() < deadline:
            time.sleep(0.1)
    assert len(calls) >= 4
    assert sum("going on, and trying again" in text for text in caplog.messages) == 1
