"""Sweeps as jobs of a real job server: followed, left and followed again, stopped, their exit codes."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from clusters import RealCluster, real_cluster
from door import Door
from tiny import TINY

from raysweep.runs import Run
from raysweep.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.ray]
pytest.importorskip("opencensus", reason="Ray's job server is not installed: pip install 'raysweep[submit]'")

ONE = TINY[: TINY.index("indicators:")].replace("{grid: [1e-2, 3e-3]}", "{grid: [1e-2]}")


@pytest.fixture
def cluster(tmp_path):
    with real_cluster(tmp_path, job_server=True) as cluster:
        yield cluster


def raysweep(cluster: RealCluster, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "raysweep", *arguments]
    return subprocess.Popen(command, env=cluster.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, _ = process.communicate(timeout=240)
    return process.returncode, out


def wait_for(condition, process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < deadline, "nothing came in time"
        assert process is None or process.poll() is None, ended(process)
        time.sleep(0.2)


def test_a_job_is_followed_left_followed_again_and_stopped(cluster, tmp_path):
    sweep, store = tmp_path / "one.yaml", Store(tmp_path / "store")
    sweep.write_text(ONE)
    send = ("submit", str(sweep), "--address", cluster.job_address, "--store", store.url)
    follower = raysweep(cluster, *send)
    # The laptop is closed: what follows is gone, the job is not.
    wait_for(lambda: (store.root / "runs").exists(), follower)
    follower.send_signal(signal.SIGINT)
    code, said = ended(follower)
    assert code == 130, said
    assert "goes on; the same command follows it again" in said
    # Followed again, the connection is lost once: no part of the log is shown twice.
    door = Door(int(cluster.job_address.rsplit(":", 1)[1]))
    follower = raysweep(cluster, *send, "--address", f"http://127.0.0.1:{door.port}")
    words = ""
    while "Running entrypoint" not in words:
        words += (line := follower.stdout.readline())
        assert line, ended(follower)
    door.cut()
    code, said = ended(follower)
    door.close()
    assert code == 0, said
    assert "is there already and goes on" in words
    assert "report: " in said
    assert "Running entrypoint" not in said
    (run,) = Run.all(store)
    assert run.failures() == []
    # A mistake of the user's is one here, too: Ray's own client would make it 1.
    code, said = ended(raysweep(cluster, *send, "pretrain.optimizer.lr=x"))
    assert code == 2, said
    assert "SpaceError" in said
    # Stopped, it saves what it trains; it is found by its run.
    longer = ("pretrain.steps=1000000", "pretrain.checkpoints=[1.0]", "--run", "long", "--no-wait")
    assert ended(raysweep(cluster, *send, *longer))[0] == 0
    # The trial's TensorBoard file grows with its losses.
    wait_for(lambda: any(path.stat().st_size > 1000 for path in store.root.glob("runs/long/tensorboard/*/*")))
    code, said = ended(raysweep(cluster, "cancel", "long", "--store", store.url))
    assert code == 0, said
    assert "has stopped" in said
    assert saved_states(store)
    assert "had ended: stopped" in ended(raysweep(cluster, "cancel", "long", "--store", store.url))[1]
    code, said = ended(raysweep(cluster, *send, "--address", "http://127.0.0.1:9"))
    assert code == 2
    assert "job server at 'http://127.0.0.1:9'" in said


def saved_states(store: Store) -> list[Path]:
    return [path for path in (store.root / "partial").glob("*.state/*") if any(path.rglob("*"))]
