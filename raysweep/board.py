"""The live board of a run: a table on a terminal, else lines."""

from __future__ import annotations

import threading
import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from raysweep.events import Event, Note, StageEnded, StageFailed, StageProgress
from raysweep.printable import duration, printable
from raysweep.progress import Leader, Progress
from raysweep.variants import SearchSpace

# Seconds between plain lines where stderr is no terminal.
PLAIN_EVERY = 10.0


class Board:
    """The live board: a table on a terminal, else a line for every change of the counts, at most every 10 seconds.

    `show` takes the events of a run, from any thread.
    """

    def __init__(self, space: SearchSpace, *, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._progress = Progress(space)
        self._began = self._last_line = time.monotonic()
        self._lock = threading.Lock()
        self._live: Live | None = None

    def __enter__(self) -> Board:
        if self._console.is_terminal:
            self._live = Live(
                console=self._console, get_renderable=self._render, refresh_per_second=4, redirect_stdout=False
            )
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._live.stop()
        else:
            self._print(self._line())

    def show(self, event: Event) -> None:
        """Take one event of the run."""
        with self._lock:
            self._progress.take(event, at_seconds=time.monotonic() - self._began)
            if isinstance(event, Note):
                self._print(event.message, style="yellow")
            if self._live:
                return
            if isinstance(event, StageFailed) and not event.retry:
                self._print(f"failed: {event.stage}: {event.cause}", style="red")
            due = time.monotonic() - self._last_line >= PLAIN_EVERY
            if due and isinstance(event, StageEnded | StageProgress):
                self._last_line = time.monotonic()
                self._print(self._line())

    def _print(self, line: str, *, style: str = "") -> None:
        self._console.print(Text(printable(line), style=style), soft_wrap=True)

    def _line(self) -> str:
        progress = self._progress
        kinds = ", ".join(f"{kind} {progress.done(kind)}/{progress.total(kind)}" for kind in progress.kinds)
        failed = [f"{progress.num_failed} failed"] if progress.num_failed else []
        best = [f"best so far {_text(leader)}" for leader in progress.best(1)]
        return f"[{self._spent()}] " + "; ".join([kinds, *failed, *self._pace(), *best])

    def _pace(self) -> list[str]:
        speed = sum(self._progress.speeds.values())
        rest = self._progress.rest_seconds(time.monotonic() - self._began)
        return ([f"{speed:,.0f} tokens/s"] if speed else []) + ([f"ETA {duration(rest)}"] if rest else [])

    def _spent(self) -> str:
        return duration(time.monotonic() - self._began)

    def _render(self) -> Group:
        with self._lock:
            progress = self._progress
            table = Table(box=None, pad_edge=False)
            for name in ("stage", "done", "of", "running", "failed", "seconds each"):
                table.add_column(name, justify="left" if name == "stage" else "right")
            for kind in progress.kinds:
                done, failed = progress.done(kind), progress.failed(kind)
                each = f"{progress.seconds[kind] / done:.1f}" if done else ""
                cells = [done, progress.total(kind), progress.running(kind) or "", failed or "", each]
                table.add_row(kind, *map(str, cells))
            lines: list[Any] = [table, Text(" · ".join([self._spent(), *self._pace()]), style="dim")]
            best = [printable(_text(leader)) for leader in progress.best(3)]
            lines += [Text("Mean score over tasks, best so far", style="dim")] if best else []
            return Group(*lines, *(Text(f"{place}. {text}") for place, text in enumerate(best, 1)))


def _text(leader: Leader) -> str:
    """`67.0 %  lr 0.003 · step 600`."""
    from raysweep.analysis.formatting import point_text

    point = {path.removeprefix("pretrain."): value for path, value in leader.point.items()}
    parts = ([point_text(point)] if point else []) + ([f"step {leader.step}"] if leader.step else [])
    return f"{100 * leader.score:.1f} %  " + " · ".join(parts + ([f"seed {leader.seed}"] if leader.seed else []))
