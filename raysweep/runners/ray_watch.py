"""A Ray that is gone ends the run in one line, not in the logs and the abort of Ray's own libraries."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence

from raysweep.errors import ClusterError

# Seconds without a connection until a process counts as gone. A GCS elsewhere may be restarting, with the state that it
# keeps outside; Ray ends this process by itself when it has waited for a minute.
GONE_SECONDS = 3.0
GONE_SECONDS_OF_A_CLUSTER = 45.0


# Not SIGINT: a process started in a script's background ignores it. Tune has taken SIGUSR1.
WAKE = signal.SIGUSR2

# For the main thread to leave what it waits for; a call to the GCS itself hears no signal, and takes a minute.
WAKE_SECONDS = 5.0


@contextlib.contextmanager
def ray_watched() -> Iterator[Sequence[str]]:
    """While in it, see that the GCS and this node's raylet take connections; gives the list of what is gone.

    Only the main thread can be woken; elsewhere this does nothing.

    Where the main thread is inside a call that hears no signal, the process ends here with the same line and exit code,
    as Ray would end it a minute later.

    Raises:
        ClusterError: if one of them is gone.
    """
    gone: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield gone
        return
    import ray

    node = ray._private.worker._global_node
    host, port = node.gcs_address.rsplit(":", 1)
    patience = GONE_SECONDS if "RAY_ADDRESS" not in os.environ else GONE_SECONDS_OF_A_CLUSTER
    doors = {"GCS": (socket.AF_INET, (host, int(port)), patience)}
    doors["raylet"] = (socket.AF_UNIX, node.raylet_socket_name, GONE_SECONDS)
    left = threading.Event()

    def wake(number: int, frame: object) -> None:
        raise KeyboardInterrupt  # What Ray's own waiting lets through.

    def watch() -> None:
        # Looks in a row, not time: one look may take seconds on a busy machine, and this process may have been stopped.
        missed = dict.fromkeys(doors, 0)
        while not left.wait(1.0):
            for name, (family, address, patience) in doors.items():
                missed[name] = 0 if _opens(family, address) else missed[name] + 1
                if missed[name] > patience:
                    gone.append(name)
                    signal.pthread_kill(threading.main_thread().ident or 0, WAKE)
                    if not left.wait(WAKE_SECONDS):
                        print(f"ClusterError: {_message(name)}", file=sys.stderr, flush=True)
                        os._exit(2)
                    return

    before = signal.signal(WAKE, wake)
    threading.Thread(target=watch, name="raysweep-ray-watch", daemon=True).start()
    try:
        yield gone
    except BaseException:
        if gone:
            atexit.register(_leave)  # Runs before Ray's, which waits for the GCS for a minute and aborts.
            raise ClusterError(_message(gone[0])) from None
        raise
    finally:
        left.set()
        signal.signal(WAKE, before)


def _message(name: str) -> str:
    return (
        f"Ray's {name} is gone: killed, out of memory, or its machine was taken away; what is finished is kept, and "
        "the same command goes on from there"
    )


def _leave() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2)


def _opens(family: socket.AddressFamily, address: str | tuple[str, int]) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as door:
        door.settimeout(5.0)
        try:
            door.connect(address)
        except BlockingIOError:  # Its queue is full, so somebody listens.
            return True
        except OSError:
            return False
        return True
