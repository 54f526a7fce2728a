import contextlib
import signal
import socket
import subprocess
import sys
import threading

from raysweep.runners.ray_watch import WAKE, _opens, ray_watched


def test_a_sweep_called_from_another_thread_is_not_watched():
    before, raised = signal.getsignal(WAKE), []

    def sweep():
        try:
            with ray_watched():
                pass
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=sweep)
    thread.start()
    thread.join()
    assert raised == []
    assert signal.getsignal(WAKE) is before


def test_a_full_queue_is_somebody_and_a_closed_door_is_not(tmp_path):
    path = str(tmp_path / "raylet")
    with contextlib.ExitStack() as held:
        door = held.enter_context(socket.socket(socket.AF_UNIX))
        door.bind(path)
        door.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                caller = held.enter_context(socket.socket(socket.AF_UNIX))
                caller.setblocking(False)
                caller.connect(path)
        assert _opens(socket.AF_UNIX, path)
    assert not _opens(socket.AF_UNIX, path)


WATCHED = """
import os, socket, sys, time
from types import SimpleNamespace
import ray
from raysweep.runners import ray_watch

def listening(family, address):
    door = socket.socket(family)
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    door.bind(address)
    door.listen(64)
    return door

mode, path = sys.argv[1:]
raylet, gcs = listening(socket.AF_UNIX, path), listening(socket.AF_INET, ("127.0.0.1", 0))
address = gcs.getsockname()
ray._private.worker._global_node = SimpleNamespace(
    gcs_address="%s:%d" % address, raylet_socket_name=path, cluster_id="first"
)
restarted = False
# What listens here has no cluster, and does not answer Ray's own client.
if mode != "silent":
    ray_watch._cluster_at = lambda address: "second" if mode == "again" and restarted else "first"
os.environ.pop("RAY_ADDRESS", None)
with ray_watch.ray_watched():
    time.sleep(0.5)
    gcs.close()
    if mode in ("again", "back"):
        time.sleep(1.5)
        restarted = True
        gcs = listening(socket.AF_INET, address)
    time.sleep(2 if mode == "back" else 30)
ray._private.worker._global_node = None
"""


def test_a_gcs_that_is_gone_or_back_without_its_memory_ends_the_process_in_a_line(tmp_path):
    started = {
        mode: subprocess.Popen([sys.executable, "-c", WATCHED, mode, str(tmp_path / mode)], stderr=subprocess.PIPE)
        for mode in ("gone", "silent", "again", "back")
    }
    said = {mode: process.communicate(timeout=60)[1].decode() for mode, process in started.items()}
    codes = {mode: process.returncode for mode, process in started.items()}
    assert codes == {"gone": 2, "silent": 2, "again": 2, "back": 0}, said
    assert said["again"].startswith("ClusterError: Ray's GCS was started again without what it knew")
    assert "Ray's GCS is gone" in said["gone"]
    assert "Ray's GCS is gone" in said["silent"]
    assert said["back"] == ""
