"""A store's objects on an fsspec file system: what lies at a URL, by path under the root."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from raysweep.errors import StoreError


class Remote:
    """The few operations of an fsspec file system that a store needs, by path under the root."""

    def __init__(self, url: str) -> None:
        import fsspec

        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise StoreError(f"store {url!r} cannot be opened: {error}") from error
        # Other workers write too: a listing kept from before would hide their records.
        self._fs.use_listings_cache = False

    def get(self, name: str, path: Path) -> None:
        """Download, whole or not at all; nothing happens if there is no such object."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as aside:
            pass
        try:
            self._fs.get_file(f"{self._root}/{name}", aside.name)
            os.replace(aside.name, path)
        except FileNotFoundError:
            os.unlink(aside.name)

    def put(self, path: Path, name: str) -> None:
        """Upload one file."""
        target = f"{self._root}/{name}"
        self._fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        self._fs.put_file(str(path), target)

    def names(self, name: str) -> set[str]:
        """Names directly under a folder; none if there is no such folder."""
        self._fs.invalidate_cache()
        try:
            return {entry.rstrip("/").rsplit("/", 1)[-1] for entry in self._fs.ls(f"{self._root}/{name}", detail=False)}
        except FileNotFoundError:
            return set()

    def walk(self, name: str) -> list[str]:
        """Names, under the root, of all objects below a folder."""
        self._fs.invalidate_cache()
        base = f"{self._root}/"
        try:
            return [path.removeprefix(base).removeprefix("/") for path in self._fs.find(f"{self._root}/{name}")]
        except FileNotFoundError:
            return []

    def remove(self, name: str) -> None:
        """Delete one object, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._root}/{name}")
