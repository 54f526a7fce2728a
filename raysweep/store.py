"""Finished work, under one root: a local folder or any fsspec URL.

    <root>/stages/<stage id>/   what the stage left, and record.json, which exists exactly when the stage finished
    <root>/partial/<key>/       work under way and resumable state: owned by whoever holds the claim on it
    <root>/altered/             what no longer matched its checksums, moved aside
    <root>/runs/<name>/         one folder a run (runs.py)

Locally a folder is written aside, synced and renamed; on an object store, where a rename is not atomic, the record is
the last put. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from raysweep.durable import file_sha256, flock, sync, wait_for_lock
from raysweep.errors import LostError, StoreError, UnreachableError
from raysweep.lease import Holder, Lease, Pace, calling, notes
from raysweep.record import Record, difference, is_id
from raysweep.remote_state import RemoteStateDir
from raysweep.root import Root
from raysweep.worker import StateDir

logger = logging.getLogger(__name__)

RECORD = "record.json"
DEFAULT_ROOT = "raysweep-store"
"""Of the store of commands and calls that name none."""


class Store(Root):
    """Finished stages and runs under `root`; see the module."""

    def __init__(self, root: str | Path) -> None:
        super().__init__(root)
        self.pace = Pace()
        """Of holders of runs; where the store is a folder, of their looks at what they are asked for."""
        # (path, bytes, mtime_ns) of files found intact: hashed once per process, again if touched.
        self._intact: set[tuple[str, int, int]] = set()

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.url,)

    def get(self, stage_id: str, *, asked: Mapping[str, Any] | None = None) -> Record | None:
        """The record of a finished stage, its files intact; None if it has to be made.

        A record or file that was truncated or altered, or is another stage's, is named in the log and moved aside, so
        that it is re-made.

        Raises:
            StoreError: if the record cannot be read, or holds another spec than `asked`, a canonical one.
        """
        record = self._record(stage_id)
        if record is None:
            return None
        if asked is not None and record.spec != asked:
            have, want = (json.dumps(spec, indent=1, sort_keys=True) for spec in (record.spec, asked))
            raise StoreError(
                f"stage {stage_id} in {self.url} was made from another spec: {difference(have, want)}; "
                "use another --store, or move the stage's folder away to have it made again"
            )
        return record

    def _record(self, stage_id: str) -> Record | None:
        """See `get`. What is damaged in the cache of a store at a URL is downloaded again before it counts as lost."""
        path = self._stage_dir(stage_id) / RECORD
        is_cached = self._remote is not None and path.exists()
        if self._remote and not is_cached:
            self._remote.get(f"stages/{stage_id}/{RECORD}", path)

        def read() -> Record:
            record = Record.from_json(path.read_bytes())
            if record.id != stage_id:
                raise ValueError(f"its {RECORD} is that of {record.id}")
            if self.is_local:
                self._check_files(record)
            return record

        try:
            return self._ask("read", read)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, TypeError) as error:
            if is_cached:
                self._drop_cached(stage_id, str(error))
                return self._record(stage_id)
            self._forget(stage_id, str(error))
            return None
        except OSError as error:
            raise StoreError(f"cannot read {error.filename}: {error.strerror}") from error

    def peek(self, stage_id: str) -> Record | None:
        """The record of a finished stage, its files not checked; None if there is none that can be read here."""
        try:
            return Record.from_json((self._stage_dir(stage_id) / RECORD).read_bytes())
        except (OSError, ValueError, TypeError):
            return None

    def provenance(self, stage_id: str) -> Mapping[str, Any] | None:
        """When, where and how long a finished stage ran, its files not checked; None if that is not known here."""
        record = self.peek(stage_id)
        return record.provenance if record else None

    def stage_bytes(self) -> dict[str, int]:
        """Stage id -> bytes that its folder takes, whether it is finished or not, by listings alone."""
        if self._remote:
            sizes: Counter[str] = Counter()
            for name, size in self._remote.sizes("stages").items():
                sizes[name.split("/")[1]] += size
            return dict(sizes)
        try:
            return {entry.name: folder_bytes(Path(entry.path)) for entry in os.scandir(self.root / "stages")}
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise StoreError(f"store {self.url!r} cannot be read: {error.strerror}") from error

    def partial_bytes(self) -> dict[str, int]:
        """Name of each file and folder of partial/ -> its bytes, here and, where the store is at a URL, there."""
        sizes: Counter[str] = Counter()
        with contextlib.suppress(FileNotFoundError):
            sizes.update({entry.name: folder_bytes(Path(entry.path)) for entry in os.scandir(self.root / "partial")})
        for name, size in (self._remote.sizes("partial") if self._remote else {}).items():
            sizes[name.split("/")[1]] += size
        return dict(sizes)

    def discard(self, stage_id: str) -> None:
        """Delete a stage, its record first: half of it is never taken for the whole."""
        folder = self._stage_dir(stage_id)
        (folder / RECORD).unlink(missing_ok=True)
        if self._remote:
            self._remote.remove(f"stages/{stage_id}/{RECORD}")
        self.remove(folder)

    def finished_ids(self) -> set[str]:
        """Ids of all stages that have a record, by one listing."""
        return self.names("stages")

    def run_names(self) -> list[str]:
        """Names that may be those of runs, by one listing."""
        return sorted(self.names("runs"))

    def records(self) -> Iterator[Record]:
        """The records of all finished stages, in the order of their ids; a damaged one is moved aside, as by `get`."""
        for stage_id in sorted(self.finished_ids()):
            if record := self.get(stage_id):
                yield record

    def folder(self, stage_id: str) -> Path:
        """A local folder with the verified files of a finished stage, to be read only.

        Raises:
            LostError: if there is no such stage, or a file was altered; it has then been moved aside.
            StoreError: if it cannot be read.
        """
        return self._verified(stage_id, lambda name: True)

    def file(self, stage_id: str, name: str) -> Path:
        """The path of one verified file of a finished stage, where it left one; no other is downloaded for it.

        Raises as `folder` does.
        """
        return self._verified(stage_id, lambda other: other == name) / name

    def _verified(self, stage_id: str, wanted: Callable[[str], bool]) -> Path:
        """The folder of a finished stage, its files of these names as they should be."""
        record = self._present(stage_id)
        if self._remote is None:
            return self._stage_dir(stage_id)
        try:
            return self._downloaded(record, wanted)
        except ValueError as error:
            # Damaged in the cache, or downloaded when another machine had not yet made it anew.
            self._drop_cached(stage_id, str(error))
        try:
            return self._downloaded(self._present(stage_id), wanted)
        except ValueError as error:
            self._forget(stage_id, str(error))
            raise LostError(stage_id, f"stage {stage_id}: {error}; run its sweep again to re-make it") from error

    def _present(self, stage_id: str) -> Record:
        record = self.get(stage_id)
        if record is None:
            raise LostError(stage_id, f"stage {stage_id} is not in {self.url}; run its sweep again to make it")
        return record

    def _downloaded(self, record: Record, wanted: Callable[[str], bool]) -> Path:
        """The folder of a record's files in the cache. Raises ValueError if one is not as the record says."""
        assert self._remote
        folder = self._stage_dir(record.id)
        record = replace(record, files={name: entry for name, entry in record.files.items() if wanted(name)})
        if any(not (folder / name).exists() for name in record.files):
            with self.claim(f"{record.id}.copy"):  # The ranks of a host ask at once for the same.
                for name in record.files:
                    if not (folder / name).exists():
                        self._remote.get(f"stages/{record.id}/{name}", folder / name)
        self._check_files(record)
        return folder

    def location(self, stage_id: str) -> str:
        """Where a stage's files lie once it is finished: an absolute folder, or below the store's URL."""
        return str(self._stage_dir(stage_id)) if self.is_local else f"{self.url.rstrip('/')}/stages/{stage_id}"

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[None]:
        """Hold `key` alone on this file system; waits for another holder, whose death frees it.

        Two trials may share a stage (one tokenizing of one corpus): the second waits, and finds it finished.
        Object stores have no locks: there both do the work, and the first record stands.
        """
        path = self.root / "partial" / f"{key}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as lock:
            flock(lock, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep what is finished from being deleted as garbage; waits where that is under way on this file system."""
        with self._users_lock() as lock:
            wait_for_lock(lock, fcntl.LOCK_SH, what=f"a `raysweep gc` of {self.url} to end", after_seconds=0)
            yield

    @contextlib.contextmanager
    def unused(self) -> Iterator[None]:
        """Keep runs from starting on this file system. Raises StoreError if one is under way."""
        with self._users_lock() as lock:
            try:
                flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreError(
                    f"a run, or another `raysweep gc`, is under way in {self.url}; wait for it, or end it"
                ) from None
            yield

    def _users_lock(self) -> IO[str]:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            return (self.root / ".users.lock").open("a+")
        except OSError as error:
            raise self.unwritable(error) from error

    def lease(
        self,
        key: str,
        holder: Holder,
        *,
        what: str,
        renewed: Callable[[], None],
        lost: Callable[[str], None],
    ) -> contextlib.AbstractContextManager[object]:
        """Hold `key` alone among all machines that use the store's URL; see `Lease`. A local store has its locks."""
        if self._remote is None:
            return calling(renewed, every_seconds=self.pace.beat_seconds)
        return Lease(self._remote, _lease(key), holder, what=what, pace=self.pace, renewed=renewed, lost=lost)

    def is_leased(self, key: str) -> bool:
        """Whether there is a note of some machine that holds `key` at the store's URL; its holder may be dead."""
        if self._remote is None:
            return False
        # One that cannot be read is being renewed at the moment, where a file system writes in place.
        return any(note.get("holds", True) for note in notes(self._remote, _lease(key)).values())

    def partial_dir(self, stage_id: str) -> Path:
        """The folder that `stage_id` is made in, by the holder of its claim; there until `commit`, or the next try."""
        return self.root / "partial" / f"{stage_id}.out"

    def work_dir(self, stage_id: str) -> Path:
        """An empty folder to make `stage_id` in, for the holder of its claim."""
        path = self.partial_dir(stage_id)
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def state_dir(self, key: str) -> StateDir:
        """Where resumable state `key` is, kept until `drop_state`."""
        name = f"partial/{key}.state"
        path = self.root / name
        path.mkdir(parents=True, exist_ok=True)
        return RemoteStateDir(self._remote, path, name) if self._remote else StateDir(path)

    def drop_state(self, key: str) -> None:
        """Forget resumable state that no stage needs any more."""
        self.remove(self.root / "partial" / f"{key}.state")

    def drop_copies(self, key: str) -> None:
        """Delete this machine's copies of resumable state `key`, where it lies behind a URL."""
        if self._remote:
            shutil.rmtree(self.root / "partial" / f"{key}.state", ignore_errors=True)

    def commit(self, record: Record, work_dir: Path) -> Record:
        """Make `work_dir` the result of `record.id`: whole, or not at all. Returns the record with its files.

        Raises:
            OSError: if the disk is full; nothing of the stage is then visible.
        """
        files = {
            str(path.relative_to(work_dir)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in sorted(work_dir.rglob("*"))
            if path.is_file()
        }
        record = replace(record, files=files)
        for name in files:
            sync(work_dir / name)
        (work_dir / RECORD).write_text(record.to_json())
        sync(work_dir / RECORD)
        sync(work_dir)
        if self._remote:
            if there := self._behind_url(record.id):
                # Another machine made it first, and others may be at reading it. By identity the two are equal.
                shutil.rmtree(work_dir)
                return there
            for name in [*files, RECORD]:
                self._remote.put(work_dir / name, f"stages/{record.id}/{name}")
        folder = self._stage_dir(record.id)
        if self._remote and folder.exists():
            shutil.rmtree(folder)  # A copy of what was made before, and is lost there.
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(work_dir, folder)
        except OSError:
            if (folder / RECORD).exists():
                shutil.rmtree(work_dir)  # Another made it first; by identity the two are equal.
            elif os.path.lexists(folder):
                self.set_aside(folder, f"its folder has lost {RECORD}")
                os.rename(work_dir, folder)
            else:
                raise
        sync(folder.parent)
        return record

    def _behind_url(self, stage_id: str) -> Record | None:
        """The record of a stage that others see, whatever this machine has a copy of."""
        assert self._remote
        text = self._remote.read(f"stages/{stage_id}/{RECORD}")
        try:
            record = Record.from_json(text) if text is not None else None
        except (ValueError, TypeError):
            return None
        return record if record and record.id == stage_id else None

    def _stage_dir(self, stage_id: str) -> Path:
        if not is_id(stage_id):
            raise StoreError(f"{stage_id[:80]!r} is the id of no stage: letters, digits, '_', '-' and '.'")
        return self.root / "stages" / stage_id

    def _check_files(self, record: Record) -> None:
        folder = self._stage_dir(record.id)
        for name, want in record.files.items():
            path = folder / name
            try:
                stat = path.stat()
            except (FileNotFoundError, NotADirectoryError):
                raise ValueError(f"{name} is missing") from None
            if stat.st_size != want["bytes"]:
                raise ValueError(f"{name} has {stat.st_size} bytes, not {want['bytes']}")
            key = (str(path), stat.st_size, stat.st_mtime_ns)
            if key not in self._intact:
                if file_sha256(path) != want["sha256"]:
                    raise ValueError(f"{name} was altered: its SHA-256 differs from the record's")
                self._intact.add(key)

    def _drop_cached(self, stage_id: str, reason: str) -> None:
        """Delete this machine's copy of a stage, which is downloaded again."""
        logger.warning("the copy of stage %s on this machine is damaged, and fetched again: %s", stage_id, reason)
        shutil.rmtree(self._stage_dir(stage_id))

    def _forget(self, stage_id: str, reason: str) -> None:
        """Move aside what is damaged in the store itself: a local stage's folder, or the record behind the URL."""
        if self._remote is None:
            self.set_aside(self._stage_dir(stage_id), reason)
            return
        logger.warning("stage %s in %s is not used and will be re-made: %s", stage_id, self.url, reason)
        record = self._stage_dir(stage_id) / RECORD
        # The store may be one that can only be read, which is all that is asked of it.
        with contextlib.suppress(UnreachableError, FileNotFoundError):
            stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
            self._remote.move(f"stages/{stage_id}/{RECORD}", record, f"altered/{stage_id}-{stamp}.json")
        shutil.rmtree(self._stage_dir(stage_id), ignore_errors=True)


def _lease(key: str) -> str:
    return f"partial/{key}.held"


def folder_bytes(folder: Path) -> int:
    """Of all files in a folder, or of a file; what goes away meanwhile counts nothing."""
    total = 0
    for path in [folder, *folder.rglob("*")]:
        with contextlib.suppress(OSError):
            total += path.lstat().st_size if not path.is_dir() else 0
    return total
