"""A folder of this machine that stands for one behind a URL: what was changed on either side goes over to the other."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from raysweep.durable import below, parse_object, wait_for_lock, write_text
from raysweep.errors import StoreError
from raysweep.remote import Remote

logger = logging.getLogger(__name__)

# What both sides held when they were last alike; like every name that begins with a dot, it stays on this machine.
_ALIKE = ".mirror.json"

# Of a wait for another process's turn until it is logged: most turns are shorter.
QUIET_SECONDS = 3.0


class _Alike(NamedTuple):
    """A file as it was when it was the same on both sides."""

    stamp: str | None
    """Of the object: see `Remote.stamps`."""
    num_bytes: int
    mtime_ns: int


class Mirror:
    """One folder, here and behind a URL.

    A side that has not changed since both were alike takes the other's. Where both have, `pull` lets the URL's stand:
    it is what others have seen. Processes of this machine take turns, so that none goes by a note that another is about
    to replace.

    Args:
        remote: the root behind the URL.
        root: its place on this machine.
        name: of the folder, below either.
    """

    def __init__(self, remote: Remote, root: Path, name: str) -> None:
        self._remote, self._name = remote, name
        self._folder = root / name

    def pull(self, *, unless: Callable[[], bool] = lambda: False) -> None:
        """Download what others changed; delete what they deleted, unless it was changed here.

        `unless`: whether a process of this machine is writing the folder, so that it is newer here and left as it is.
        """
        if unless():  # Without a wait for its upload, which may be a long one.
            return
        with self._turn():
            if not unless():
                self._pull()

    def _pull(self) -> None:
        alike, there = self._alike(), self._stamps()
        for name, stamp in there.items():
            path = self._folder / name
            known = alike.get(name)
            if known is None or stamp is None or known.stamp != stamp or not path.exists():
                self._remote.get(f"{self._name}/{name}", path)
                if state := _state(path):  # Else it was deleted since it was listed.
                    alike[name] = _Alike(stamp, *state)
        for name in alike.keys() - there.keys():
            if _state(self._folder / name) == alike.pop(name)[1:]:
                (self._folder / name).unlink()
        self._note(alike)

    def push(self) -> None:
        """Upload what was changed here since both sides were alike, and delete there what was deleted here."""
        with self._turn():
            self._push()

    def _push(self) -> None:
        alike, sent = self._alike(), {}
        for name, path in self._files():
            state = _state(path)
            if state and (name not in alike or alike[name][1:] != state):
                try:
                    self._remote.put(path, f"{self._name}/{name}")
                except StoreError:
                    if path.exists():
                        raise
                    continue  # Deleted since it was listed.
                sent[name] = state
        for name in [name for name in alike if not (self._folder / name).exists()]:
            self._remote.remove(f"{self._name}/{name}")
            del alike[name]
        if sent:
            there = self._stamps()
            alike |= {name: _Alike(there.get(name), *state) for name, state in sent.items()}
        self._note(alike)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Alone on this machine; the lock lies beside the folder, which may not be there yet, or be deleted."""
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        what = f"another process of this machine, which copies {self._folder} from or to the store's URL"
        with self._folder.with_name(f".{self._folder.name}.lock").open("a") as lock:
            wait_for_lock(lock, fcntl.LOCK_EX, what=what, after_seconds=QUIET_SECONDS)
            yield

    def _files(self) -> Iterator[tuple[str, Path]]:
        for path in sorted(self._folder.rglob("*")):
            name = path.relative_to(self._folder).as_posix()
            if path.is_file() and not _is_own(name):
                yield name, path

    def _stamps(self) -> dict[str, str | None]:
        """Name in the folder -> stamp of its object; names that would lead out of the folder are left out."""
        stamps: dict[str, str | None] = {}
        for path, stamp in self._remote.stamps(self._name).items():
            name = path.removeprefix(f"{self._name}/")
            try:
                _state(below(self._folder, name))
            except (OSError, ValueError) as error:  # It leads out, or no file here can be called so.
                logger.warning("object %r of %s is left out: %s", name, self._name, error)
                continue
            if not _is_own(name):
                stamps[name] = stamp
        return stamps

    def _alike(self) -> dict[str, _Alike]:
        """What was noted; nothing where that is lost: then all that lies behind the URL stands."""
        try:
            noted = parse_object((self._folder / _ALIKE).read_bytes())
            for name in noted:
                _state(below(self._folder, name))
            return {name: _Alike(*known) for name, known in noted.items() if not _is_own(name)}
        except (OSError, ValueError, TypeError):
            return {}

    def _note(self, alike: dict[str, _Alike]) -> None:
        if self._folder.is_dir():
            write_text(self._folder / _ALIKE, json.dumps(alike, indent=1))


def _is_own(name: str) -> bool:
    """Whether a file is this machine's own: a lock, a note, or half written."""
    return any(part.startswith(".") for part in name.split("/"))


def _state(path: Path) -> tuple[int, int] | None:
    """Changes with a file's content; None if there is no file."""
    try:
        stat = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return stat.st_size, stat.st_mtime_ns
