import contextlib
import signal
import socket
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
