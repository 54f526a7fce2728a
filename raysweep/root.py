"""Where a store lies: a local folder, or what is behind an fsspec URL and a cache of it on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from raysweep.durable import cache_dir, replacing
from raysweep.errors import StoreError, UnreachableError
from raysweep.mirror import Mirror
from raysweep.patience import Patience, is_away
from raysweep.remote import Remote
from raysweep.secrets import has_credentials, without_secrets

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Root:
    """Files and folders below `root`, behind `url` too where that is one: what they are is for `Store` to say.

    Raises:
        StoreError: if it is a file, or a URL that no file system takes.
    """

    def __init__(self, root: str | Path) -> None:
        self.url = str(root)
        if has_credentials(self.url):
            raise StoreError(
                f"store {without_secrets(self.url)!r}: a URL is shown, and kept in reports: leave the password or key "
                "out of it, and give it as its file system takes it, such as by environment variables"
            )
        self.is_local = "://" not in self.url or self.url.startswith("file://")
        if self.is_local:
            self.root = Path(os.path.expanduser(self.url.removeprefix("file://"))).absolute()
            if os.path.exists(self.root) and not os.path.isdir(self.root):
                raise StoreError(f"store {self.url!r} is a file; give a folder, or the URL of one")
            # Workers run elsewhere: to them a relative path would be another store.
            self.url = str(self.root)
            self._remote: Remote | None = None
        else:
            # Work and downloads of a remote store live beside other caches of this machine, one folder per URL.
            self.root = cache_dir() / hashlib.sha256(self.url.encode()).hexdigest()[:12]
            self._remote = Remote(self.url)
        self.patience = self._remote.patience if self._remote else Patience(self.url)

    def be_patient(self, seconds: float, tell: Callable[[str], None] = logger.warning) -> None:
        """Wait for so long, from now on, for a URL that does not answer or takes nothing; each call by itself.

        Not from the beginning, as the URL of a command may be mistyped. `tell` is told of it in a line, and once more
        when it answers again. A folder whose server is away is waited for where records are looked for; all else that
        meets it is tried again by who runs stages, who also waits for room on a disk.
        """
        self.patience.seconds, self.patience.tell = seconds, tell

    def names(self, folder: str) -> set[str]:
        """Of what is directly in a folder under the root, by one listing; none if it is not there."""
        if self._remote:
            return self._remote.names(folder)
        try:
            return self._ask("read", lambda: {entry.name for entry in os.scandir(self.root / folder)})
        except (FileNotFoundError, NotADirectoryError):
            return set()
        except OSError as error:
            raise StoreError(f"store {self.url!r} cannot be read: {error.strerror}") from error

    def read(self, name: str) -> bytes | None:
        """The content of a small file under the root, as others see it: at the URL, if the store is at one."""
        if self._remote:
            return self._remote.read(name)
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"store {self.url!r} cannot be read: {error.strerror}") from error

    def write(self, name: str, content: bytes) -> None:
        """Put a small file under the root for others to see. Raises StoreError."""
        if self._remote:
            self._remote.write(name, content)
            return
        try:
            with replacing(self.root / name) as aside:
                aside.write_bytes(content)
        except OSError as error:
            raise self.unwritable(error) from error

    def remove(self, path: Path) -> None:
        """Delete a file or folder under the root, at the URL too, if the store is at one."""
        if self._remote:
            self._remote.remove_all(path.relative_to(self.root).as_posix())
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def set_aside(self, path: Path, reason: str) -> None:
        """Move a damaged file or folder of the store to altered/, and say so; what stood there is made again."""
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
        aside = self.root / "altered" / f"{path.name}-{stamp}"
        logger.warning("%s is not used and will be re-made: %s (moved to %s)", path, reason, aside)
        # Another worker of the same store was first; or the store can only be read, which is all that is asked of it.
        with contextlib.suppress(OSError):
            aside.parent.mkdir(parents=True, exist_ok=True)
            os.rename(path, aside)

    def push(self, folder: Path) -> None:
        """Bring what was changed or deleted in a folder under the root to the URL, where the root stands for one."""
        if self._remote:
            Mirror(self._remote, self.root, folder.relative_to(self.root).as_posix()).push()

    def pull(self, folder: Path, *, unless: Callable[[], bool] = lambda: False) -> None:
        """Bring what others changed of a folder under the root here, where the root stands for a URL.

        `unless`: whether a process of this machine is writing it; see `Mirror.pull`.
        """
        if self._remote:
            Mirror(self._remote, self.root, folder.relative_to(self.root).as_posix()).pull(unless=unless)

    def check_writable(self) -> None:
        """Write a file and delete it again. Raises StoreError if that cannot be."""
        if self._remote:
            self._remote.check_writable()
        try:
            self._write_anything()
        except OSError as error:
            raise self.unwritable(error) from error

    def is_away(self) -> bool:
        """Whether the folder's server is gone now; False of a URL."""
        if not self.is_local:
            return False
        try:
            self._write_anything()
        except OSError as error:
            return is_away(error)
        return False

    def wait_until_back(self) -> bool:
        """After an error as of a folder whose server is away: wait for it. False if it answers, or is away too long."""
        if not self.is_away():
            return False
        try:
            self._ask("written", self._write_anything)
        except (OSError, UnreachableError):
            return False
        return True

    def _write_anything(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.root) as file:
            file.write(b"raysweep")
            file.flush()

    def _ask(self, what: str, call: Callable[[], T]) -> T:
        """What a call gives of the folder, which is waited for while its server is away. Raises UnreachableError.

        Of a URL it is this machine's cache, which tells nothing of whether the URL answers.
        """
        if self._remote:
            return call()

        def problem(error: Exception) -> str:
            if not isinstance(error, OSError) or not is_away(error):
                raise error
            return f"store {self.url!r} cannot be {what}: {error.strerror}"

        return self.patience.ask(call, problem)

    def unwritable(self, error: OSError) -> StoreError:
        """What says that the store's folder on this machine cannot be written."""
        return StoreError(f"store {str(self.root)!r} cannot be written: {error.strerror}; give another --store")
