"""A store's objects on an fsspec file system: what lies at a URL, by path under the root."""

from __future__ import annotations

import contextlib
import errno
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from raysweep.durable import replacing
from raysweep.errors import StoreError, UnreachableError
from raysweep.patience import Patience
from raysweep.secrets import without_secrets

T = TypeVar("T")


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
        self.patience = Patience(url)
        # In a bucket there are no folders to make, and asking for one would make the bucket.
        self._has_folders = self._root.startswith("/")

    def get(self, name: str, path: Path) -> None:
        """Download, whole or not at all; nothing happens if there is no such object."""
        path.parent.mkdir(parents=True, exist_ok=True)

        def download() -> None:
            with contextlib.suppress(FileNotFoundError), replacing(path) as aside:
                self._fs.get_file(f"{self._root}/{name}", str(aside))

        self._ask("read", download)

    def put(self, path: Path, name: str) -> None:
        """Upload a file as the object `name`, in the place of one that is there. Raises StoreError."""
        self._write(name, lambda target: self._fs.put_file(str(path), target))

    def read(self, name: str) -> bytes | None:
        """The content of a small object; None if there is none."""

        def read() -> bytes | None:
            with contextlib.suppress(FileNotFoundError):
                return bytes(self._fs.cat_file(f"{self._root}/{name}"))
            return None

        return self._ask("read", read)

    def write(self, name: str, content: bytes) -> None:
        """Put a small object."""
        self._write(name, lambda target: self._fs.pipe_file(target, content))

    def check_writable(self) -> None:
        """Put an object and remove it again."""
        self.write("partial/check", b"raysweep")
        self.remove("partial/check")

    def names(self, name: str) -> set[str]:
        """Names directly under a folder; none if there is no such folder."""

        def names() -> set[str]:
            with contextlib.suppress(FileNotFoundError):
                self._fs.invalidate_cache()
                entries = self._fs.ls(f"{self._root}/{name}", detail=False)
                return {entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries}
            return set()

        return self._ask("listed", names)

    def stamps(self, name: str) -> dict[str, str | None]:
        """Name, under the root, of each object below a folder -> what changes with its content.

        That is all that the file system tells of an object, such as its ETag and when it was put; None where it tells
        no more than the size.
        """
        return {path: _stamp(told) for path, told in self._objects(name).items()}

    def sizes(self, name: str) -> dict[str, int]:
        """Name, under the root, of each object below a folder -> its bytes."""
        return {path: int(told["size"] or 0) for path, told in self._objects(name).items()}

    def _objects(self, name: str) -> dict[str, Mapping[str, Any]]:
        """Name, under the root, of each object below a folder -> all that the file system tells of it."""
        base = f"{self._root}/"

        def objects() -> dict[str, Mapping[str, Any]]:
            with contextlib.suppress(FileNotFoundError):
                self._fs.invalidate_cache()
                found = self._fs.find(f"{self._root}/{name}", detail=True)
                return {path.removeprefix(base).removeprefix("/"): told for path, told in found.items()}
            return {}

        return self._ask("listed", objects)

    def remove(self, name: str) -> None:
        """Delete one object, if it is there."""

        def remove() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(f"{self._root}/{name}")

        self._ask("written", remove)

    def move(self, name: str, copy: Path, to: str) -> None:
        """Put an object elsewhere, unless it is no longer what its copy here holds: it was made anew meanwhile."""
        if self.read(name) == copy.read_bytes():
            self.put(copy, to)
            self.remove(name)

    def remove_all(self, name: str) -> None:
        """Delete an object, or all below a folder, if there is any."""

        def remove() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm(f"{self._root}/{name}", recursive=True)

        self._ask("written", remove)

    def _write(self, name: str, put: Callable[[str], object]) -> None:
        target = f"{self._root}/{name}"

        def write() -> None:
            if self._has_folders:
                self._fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            put(target)

        try:
            self._ask("written", write)
        except FileNotFoundError as error:
            bucket = self._root.split("/")[0]
            raise StoreError(
                f"store {self._url!r} cannot be written: {_said(error)}; correct the URL, or create the bucket "
                f"{bucket!r} first: raysweep creates none"
            ) from error

    def _ask(self, what: str, call: Callable[[], T]) -> T:
        """What a call gives, tried again for as long as patience lasts; FileNotFoundError is an answer.

        Raises:
            UnreachableError: in the store's words, what the file system raises.
        """

        def problem(error: Exception) -> str:
            if isinstance(error, FileNotFoundError):
                raise error
            text = f"store {self._url!r} cannot be {what}: {_said(error)}"
            # A refusal stays one, as of a store that can only be read.
            if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
                raise UnreachableError(text) from error
            return text

        return self.patience.ask(call, problem)


def _stamp(told: Mapping[str, Any]) -> str | None:
    told = {key: value for key, value in told.items() if key not in ("name", "Key", "type", "StorageClass")}
    if told.keys() <= {"size", "Size"}:
        return None
    return hashlib.sha256(repr(sorted(told.items(), key=str)).encode()).hexdigest()[:16]


def _said(error: Exception) -> str:
    """The first line of an error, or its kind where it says nothing."""
    text = without_secrets(str(error).strip())
    return text.splitlines()[0] if text else type(error).__name__
