"""A run that is ended from outside: preemption, Ctrl-C, a Ray that dies. Real processes, real signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import named
from tiny import TRUNK

ENDLESS = TRUNK + "  steps: 1000000\n"


class Sweep:
    """`raysweep run` as a user starts it, and what it says."""

    def __init__(self, folder: Path, runner: str) -> None:
        (folder / "endless.yaml").write_text(ENDLESS)
        self.store, self._words = folder / "store", folder / "stderr"
        self._known = set(self._logs())
        command = [sys.executable, "-m", "raysweep", "run", str(folder / "endless.yaml"), "--runner", runner, "-v"]
        with self._words.open("w") as stderr:
            self.process = subprocess.Popen(
                [*command, "--store", str(self.store)], stderr=stderr, stdout=subprocess.DEVNULL, cwd=folder
            )

    def _logs(self) -> list[Path]:
        return list(self.store.glob("runs/*/tensorboard/*/*"))

    @property
    def words(self) -> str:
        return self._words.read_text()

    def saved_step(self) -> int:
        """Of the newest state; 0 if there is none."""
        return max((int(path.name[5:]) for path in self.store.glob("partial/*.state/step-*")), default=0)

    def wait_until_training(self) -> None:
        deadline = time.monotonic() + 120
        # This process's TensorBoard file of the trial grows with its losses.
        while not any(path.stat().st_size > 1000 for path in self._logs() if path not in self._known):
            assert self.process.poll() is None, self.words
            assert time.monotonic() < deadline, self.words
            time.sleep(0.2)

    def end(self, *signals: int) -> int:
        for number in signals:
            self.process.send_signal(number)
            time.sleep(0.3)
        return self.process.wait(timeout=60)


@pytest.fixture
def start(tmp_path):
    """runner -> a sweep, which is ended with the test, so that one that fails leaves no endless training behind."""
    sweeps = []

    def start(runner):
        sweeps.append(Sweep(tmp_path, runner))
        return sweeps[-1]

    yield start
    for sweep in sweeps:
        if sweep.process.poll() is None:
            sweep.end(signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["inline", pytest.param("tune", marks=pytest.mark.ray)])
def test_what_is_trained_is_saved_before_a_run_ends(start, runner):
    """SIGTERM, then the same command and Ctrl-C twice; the second run goes on from what the first has saved."""
    first = start(runner)
    first.wait_until_training()
    assert first.saved_step() == 0
    assert first.end(signal.SIGTERM) == 143, first.words
    assert "terminated: what is finished is kept; the same command goes on from there" in first.words
    assert (saved := first.saved_step()) > 0

    second = start(runner)
    second.wait_until_training()
    if runner == "inline":
        assert f"going on from step {saved} of" in second.words
    assert second.end(signal.SIGINT, signal.SIGINT) == 130, second.words
    assert second.saved_step() >= saved
    assert "Traceback" not in first.words + second.words


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("part", ["gcs_server", "raylet"])
def test_a_ray_that_is_gone_is_one_line(start, part):
    sweep = start("tune")
    sweep.wait_until_training()
    os.kill(named(sweep.process.pid, part), signal.SIGKILL)
    assert sweep.process.wait(timeout=45) == 2, sweep.words
    name = {"gcs_server": "GCS", "raylet": "raylet"}[part]
    [line] = [line for line in sweep.words.splitlines() if line.startswith("ClusterError")]
    assert line.startswith(f"ClusterError: Ray's {name} is gone")
    assert "Traceback" not in sweep.words
