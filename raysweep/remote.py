"""A store's objects on an fsspec file system: what lies at a URL, by path under the root."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from raysweep.durable import replacing
from raysweep.errors import StoreError, UnreachableError


class Remote:
    """The few operations of an fsspec file system that a store needs, by path under the root.

    Raises:
        StoreError: if there is no such file system, or no such bucket to write to: none is ever created.
        UnreachableError: whatever else the file system raises; it may pass.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self._url = url
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
        except Exception as error:  # Each file system has errors of its own.
            raise StoreError(f"store {url!r} cannot be opened: {_said(error)}") from error
        # Other workers write too: a listing kept from before would hide their records.
        self._fs.use_listings_cache = False
        # In a bucket there are no folders to make, and asking for one would make the bucket.
        self._has_folders = self._root.startswith("/")

    def get(self, name: str, path: Path) -> None:
        """Download, whole or not at all; nothing happens if there is no such object."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._asked("read"), contextlib.suppress(FileNotFoundError), replacing(path) as aside:
            self._fs.get_file(f"{self._root}/{name}", str(aside))

    def put(self, path: Path, name: str) -> None:
        """Upload a file as the object `name`, in the place of one that is there. Raises StoreError."""
        with self._written(name) as target:
            self._fs.put_file(str(path), target)

    def read(self, name: str) -> bytes | None:
        """The content of a small object; None if there is none."""
        with self._asked("read"), contextlib.suppress(FileNotFoundError):
            return bytes(self._fs.cat_file(f"{self._root}/{name}"))
        return None

    def write(self, name: str, content: bytes) -> None:
        """Put a small object."""
        with self._written(name) as target:
            self._fs.pipe_file(target, content)

    def check_writable(self) -> None:
        """Put an object and remove it again."""
        self.write("partial/check", b"raysweep")
        self.remove("partial/check")

    def names(self, name: str) -> set[str]:
        """Names directly under a folder; none if there is no such folder."""
        with self._asked("listed"), contextlib.suppress(FileNotFoundError):
            self._fs.invalidate_cache()
            return {entry.rstrip("/").rsplit("/", 1)[-1] for entry in self._fs.ls(f"{self._root}/{name}", detail=False)}
        return set()

    def stamps(self, name: str) -> dict[str, str | None]:
        """Name, under the root, of each object below a folder -> what changes with its content.

        That is all that the file system tells of an object, such as its ETag and when it was put; None where it tells
        no more than the size.
        """
        base = f"{self._root}/"
        with self._asked("listed"), contextlib.suppress(FileNotFoundError):
            self._fs.invalidate_cache()
            objects = self._fs.find(f"{self._root}/{name}", detail=True)
            return {path.removeprefix(base).removeprefix("/"): _stamp(told) for path, told in objects.items()}
        return {}

    def remove(self, name: str) -> None:
        """Delete one object, if it is there."""
        with self._asked("written"), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._root}/{name}")

    def move(self, name: str, copy: Path, to: str) -> None:
        """Put an object elsewhere, unless it is no longer what its copy here holds: it was made anew meanwhile."""
        if self.read(name) == copy.read_bytes():
            self.put(copy, to)
            self.remove(name)

    @contextlib.contextmanager
    def _written(self, name: str) -> Iterator[str]:
        """The path of an object that is about to be put."""
        target = f"{self._root}/{name}"
        with self._asked("written"):
            if self._has_folders:
                self._fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            try:
                yield target
            except FileNotFoundError as error:
                bucket = self._root.split("/")[0]
                raise StoreError(
                    f"store {self._url!r} cannot be written: {_said(error)}; correct the URL, or create the bucket "
                    f"{bucket!r} first: raysweep creates none"
                ) from error

    @contextlib.contextmanager
    def _asked(self, what: str) -> Iterator[None]:
        """What the file system raises is told in the store's words."""
        try:
            yield
        except StoreError:
            raise
        except Exception as error:  # Each file system has errors of its own.
            raise UnreachableError(f"store {self._url!r} cannot be {what}: {_said(error)}") from error


def _stamp(told: Mapping[str, Any]) -> str | None:
    told = {key: value for key, value in told.items() if key not in ("name", "Key", "type", "StorageClass")}
    if told.keys() <= {"size", "Size"}:
        return None
    return hashlib.sha256(repr(sorted(told.items(), key=str)).encode()).hexdigest()[:16]


def _said(error: Exception) -> str:
    """The first line of an error, or its kind where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
