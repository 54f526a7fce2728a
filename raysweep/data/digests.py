"""SHA-256 of files, kept by path, size, times and inode: what has not changed since is not read again."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

from raysweep.durable import cache_dir, file_sha256

logger = logging.getLogger(__name__)

Digests = dict[str, str]
"""Path -> SHA-256 of its content, in hexadecimal."""

# A file may be written twice within one tick of its file system's clock, and look the same after both. So a digest is
# kept only once the file is older than any such tick, and than clocks of a network commonly differ.
SETTLED_SECONDS = 3.0

_TABLE = "CREATE TABLE IF NOT EXISTS digests (path TEXT PRIMARY KEY, state TEXT NOT NULL, sha256 TEXT NOT NULL)"


def kept_digests(paths: Iterable[str]) -> Digests:
    """Path -> SHA-256 of each file; only those are read that are new, or were touched since they were read last.

    They are kept in `digests.sqlite` of the cache folder; where that cannot be written, every file is read each time.

    Args:
        paths: absolute, for what is kept is kept by them.

    Raises:
        OSError: if a file cannot be read.
    """
    paths = list(paths)
    known = _known(paths)
    digests: Digests = {}
    fresh: list[tuple[str, str, str]] = []
    try:
        for path in paths:
            # Looked at before and after the reading: a digest of a file that is being written is not kept.
            before = state_of(path)
            state, sha256 = known.get(path, ("", ""))
            digests[path] = sha256 if state == before else file_sha256(path)
            if state != before and state_of(path) == before and is_settled(path):
                fresh.append((path, before, digests[path]))
    finally:  # Ctrl-C in the middle of a terabyte keeps what has been read.
        _keep(fresh)
    return digests


def content_fingerprint(digests: Iterable[str]) -> str:
    """Of the contents of files in this order, whatever their names: 16 hexadecimal digits.

    Args:
        digests: SHA-256 of each file, in hexadecimal.
    """
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


def state_of(path: str) -> str:
    """What changes with a file's content. A program may set mtime back; nobody sets ctime."""
    stat = os.stat(path)
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"


def is_settled(path: str) -> bool:
    """Whether a file is older than SETTLED_SECONDS, so that another content will have another state."""
    stat = os.stat(path)
    return time.time() - max(stat.st_mtime, stat.st_ctime) > SETTLED_SECONDS


def _known(paths: Iterable[str]) -> Mapping[str, tuple[str, str]]:
    """Path -> (state, SHA-256) of those that are kept."""
    rows: dict[str, tuple[str, str]] = {}
    with _passed_over(), _database() as database:
        for path in paths:
            if row := database.execute("SELECT state, sha256 FROM digests WHERE path = ?", (path,)).fetchone():
                rows[path] = row
    return rows


def _keep(rows: Sequence[tuple[str, str, str]]) -> None:
    if rows:
        with _passed_over(), _database() as database, database:
            database.executemany("REPLACE INTO digests VALUES (?, ?, ?)", rows)


@contextlib.contextmanager
def _database() -> Iterator[sqlite3.Connection]:
    path = cache_dir() / "digests.sqlite"
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute(_TABLE)
        yield database


@contextlib.contextmanager
def _passed_over() -> Iterator[None]:
    """Whatever fails with what is kept: all that is lost by it is time."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        logger.info("digests are not kept in %s: %s", cache_dir(), error)
