"""Resumable state of gangs whose hosts share no folder: it lies behind the store's URL, and outlives every host."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path

from raysweep.durable import below, file_sha256, flock, parse_object, replacing
from raysweep.remote import Remote
from raysweep.worker import StateDir


class RemoteStateDir(StateDir):
    """See `StateDir`; `path` is this host's copy, of what its ranks have written and of what they have read.

    Args:
        remote: the root behind the URL.
        path: of the copy.
        name: of the folder, below the root.
    """

    def __init__(self, remote: Remote, path: Path, name: str) -> None:
        super().__init__(path)
        self._remote, self._name = remote, name

    def names(self) -> set[str]:
        """By one listing."""
        return self._remote.names(self._name)

    def send(self, name: str) -> None:
        """Upload it."""
        self._remote.put(self.path / name, f"{self._name}/{name}")

    def read(self, name: str) -> str:
        """Downloaded anew each time."""
        content = self._remote.read(f"{self._name}/{name}")
        if content is None:
            raise FileNotFoundError(f"{name} is not in {self._name}")
        return content.decode()

    def fetch(self, name: str, digests: str) -> Path:
        """Download what is missing or another here: once a host, whose other ranks wait for it."""
        folder = below(self.path, name)
        text = self.read(f"{name}/{digests}")
        folder.mkdir(parents=True, exist_ok=True)
        with (self.path / f".{name}.lock").open("w") as lock:
            flock(lock, fcntl.LOCK_EX)
            asked = {below(folder, file): digest for file, digest in parse_object(text).items()}
            seal = folder / digests
            # Checked by another rank of this host, or written here.
            is_known = seal.exists() and seal.read_text() == text
            for path, digest in asked.items():
                if not path.exists() or not (is_known or file_sha256(path) == digest):
                    self._remote.get(f"{self._name}/{name}/{path.relative_to(folder).as_posix()}", path)
                    if file_sha256(path) != digest:
                        raise ValueError(f"{path.name} is not as it was written")
            with replacing(seal) as aside:
                aside.write_text(text)
        return folder

    def remove(self, name: str) -> None:
        """Behind the URL, and here."""
        self._remote.remove_all(f"{self._name}/{name}")
        super().remove(name)

    def drop_copies(self, *, but: str) -> None:
        """Several ranks of a host may be at it."""
        for path in self.path.iterdir():
            if path.is_dir() and path.name != but:
                shutil.rmtree(path, ignore_errors=True)
