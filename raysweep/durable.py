"""Small files that outlive a kill, a full disk and a power cut: whole, or not at all; file locks; a cache's place."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from raysweep.errors import StoreError

logger = logging.getLogger(__name__)


def cache_dir() -> Path:
    """Where this machine keeps what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "raysweep"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` at the end; after an error `path` is what it was.

    Raises:
        OSError: if the disk is full, or the folder cannot be written to.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        yield aside
        # In this order: a rename may reach the disk before what it renames.
        sync(aside)
        os.replace(aside, path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace the content of `path`, in UTF-8. Raises OSError; see `replacing`."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flock(file: IO[str], how: int) -> None:
    """`fcntl.flock`; NFS takes a shared lock of a file open for reading alone, and an exclusive one if for writing.

    Raises:
        BlockingIOError: if another holds the lock, and `how` is not to wait.
        OSError: if the file system is away.
        StoreError: if it has no locks.
    """
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        raise StoreError(
            f"{file.name} cannot be locked: {error.strerror}; the folder has to be on a file system with locks (flock)"
        ) from error


def wait_for_lock(file: IO[str], how: int, *, what: str, after_seconds: float) -> None:
    """Lock a file; after so many seconds of another's lock it is logged what for. Raises StoreError; see `flock`."""
    try:
        flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        message = "waiting for %s; if that hangs, end it: here `fuser %s` lists it, beside this process, %d"
        telling = threading.Timer(after_seconds, logger.warning, (message, what, file.name, os.getpid()))
        telling.daemon = True
        telling.start()
        try:
            flock(file, how)
        finally:
            telling.cancel()


def file_sha256(path: str | Path) -> str:
    """Of a file's content, in hexadecimal. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def below(folder: Path, name: str) -> Path:
    """The path of a name that somebody else has written down. Raises ValueError if it would lead out of the folder."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name:
        raise ValueError(f"the name {name!r} leads out of its folder")
    return folder / name


def parse_object(text: str | bytes) -> dict[str, Any]:
    """A JSON object. Raises ValueError, and nothing else, on whatever a damaged file may hold instead."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"holds {type(value).__name__}, not an object")
    return value
