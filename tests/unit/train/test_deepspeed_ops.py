"""A lock of torch's that nobody holds any more is removed; one that is held is waited for."""

import os
import signal
import subprocess
import sys
import time

import pytest
from hosts import own_operator

from raysweep.train.deepspeed_ops import alone, extensions_dir

# Takes the lock as torch does, and says so.
HOLD = """
import sys, time
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("held", flush=True)
time.sleep(600)
"""


def hold(lock) -> subprocess.Popen[bytes]:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    return holder


def long_ago(*paths) -> None:
    for path in paths:
        os.utime(path, (0, 0))


def test_a_lock_is_waited_for_while_its_owner_lives_and_removed_when_it_is_dead(tmp_path):
    lock = tmp_path / "lock"
    holder = hold(lock)
    told = []

    def tell(message: str) -> None:
        told.append(message)
        if len(told) == 1:  # Killed amid its build, long after its files last changed.
            holder.send_signal(signal.SIGKILL)
            holder.wait()
            long_ago(*tmp_path.iterdir())

    with alone(tmp_path, tell):
        assert not lock.exists()
    assert f"waiting for process {holder.pid}" in told[0]
    assert told[-1] == f"{lock} was left by a process that died as it compiled: removed"


def test_a_compiler_that_outlived_its_parent_is_waited_for(tmp_path):
    (tmp_path / "lock").touch()
    compiler = subprocess.Popen(["sleep", "1"], cwd=tmp_path)
    told = []

    def tell(message: str) -> None:
        told.append(message)
        if len(told) == 1:
            compiler.wait()
            long_ago(*tmp_path.iterdir())

    with alone(tmp_path, tell):
        pass
    assert f"waiting for process {compiler.pid}" in told[0]


def test_a_lock_that_changes_is_another_machines(tmp_path, monkeypatch):
    from raysweep.train import deepspeed_ops

    monkeypatch.setattr(deepspeed_ops, "QUIET_SECONDS", 1.0)
    (tmp_path / "lock").touch()
    told, began = [], time.monotonic()
    with alone(tmp_path, told.append):
        assert time.monotonic() - began >= 1
    assert "held by no process here" in told[0]


def test_a_file_that_goes_as_it_is_looked_at_is_passed_over(tmp_path):
    # As the lock itself does when its owner finishes: listed, and gone when its time is asked for.
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "lock").touch()
    long_ago(tmp_path / "lock")
    with alone(tmp_path, lambda message: None):
        assert not (tmp_path / "lock").exists()


def test_each_environment_compiles_in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    folders = set()
    for prefix in ("/one/.venv", "/other/.venv"):
        monkeypatch.setattr(sys, "prefix", prefix)
        folders.add(extensions_dir())
    assert len(folders) == 2
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert extensions_dir() == tmp_path


@pytest.mark.slow
def test_a_stale_lock_does_not_hold_deepspeed_up(tmp_path):
    """The real operator, in a cache of its own whose last user was killed."""
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    # What is compiled already need not be once more: that takes minutes on a busy machine.
    build = own_operator(tmp_path)
    holder = hold(build / "lock")
    holder.kill()
    holder.wait()
    long_ago(build / "lock")
    code = "from raysweep.train.deepspeed_ops import load_cpu_operator; load_cpu_operator(print)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert f"{build / 'lock'} was left by a process that died as it compiled: removed" in done.stdout
    assert (build / "deepspeed_shm_comm.so").exists()
    assert not (build / "lock").exists()
