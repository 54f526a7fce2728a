"""Files as they were when the sweep was loaded: the very bytes that are read are compared, not an earlier look.

What a stage reads belongs to its id. A file that was changed since is an error, and the sweep run again asks for other
stages.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from raysweep.data.digests import kept_digests
from raysweep.durable import file_sha256
from raysweep.errors import DataError

BUFFER_BYTES = 2**20


@contextlib.contextmanager
def opened(path: str, want: str | None) -> Iterator[IO[bytes]]:
    """A file whose bytes are hashed as they are read; at the end, what nobody has read is hashed as well.

    Args:
        path: of the file, read from its beginning to its end.
        want: its SHA-256 when the sweep was loaded; None: whatever is there is right.

    Raises:
        DataError: on leaving, if that is not what was read; also in place of an error in reading it.
        OSError: if it cannot be read.
    """
    try:
        raw = _Hashed(open(path, "rb", buffering=0))  # noqa: SIM115 - closed with what is around it
    except FileNotFoundError as error:
        if want is not None:
            raise changed(path) from error
        raise
    with io.BufferedReader(raw, BUFFER_BYTES) as file:
        try:
            yield file
        # A reader that has had enough closes its generator: what it left counts, too.
        except (Exception, GeneratorExit) as error:
            if want is not None and raw.rest() != want:
                raise changed(path) from error
            raise
        if want is not None and raw.rest() != want:
            raise changed(path)


@contextlib.contextmanager
def unchanged(path: str, want: str | None) -> Iterator[None]:
    """Around a reader that jumps about in a file, as of Parquet: it is compared before and after.

    Raises:
        DataError: if it is not as `want`, its SHA-256, says; also in place of an error in reading it.
    """
    compare(path, want)
    try:
        yield
    finally:  # In place of any error within; a file that was not touched is not read for it.
        compare(path, want)


def compare(path: str, want: str | None) -> None:
    """See that a file is as it was when the sweep was loaded.

    Args:
        path: of the file, absolute.
        want: its SHA-256 then; None: whatever is there is right.

    Raises:
        DataError: if it was changed, or is gone.
    """
    try:
        if want is not None and kept_digests([path])[path] != want:
            raise changed(path)
    except FileNotFoundError as error:
        raise changed(path) from error


def copy(folder: Path, out: Path, digests: Mapping[str, str]) -> None:
    """Copy the files named in `digests` from one folder to another.

    Args:
        folder: holds them.
        out: an existing folder.
        digests: name -> SHA-256 of the file when the sweep was loaded.

    Raises:
        DataError: if one is gone or not as it was; the copy is compared, which is what will be read.
    """
    for name, want in digests.items():
        try:
            shutil.copyfile(folder / name, out / name)
        except FileNotFoundError as error:
            raise changed(str(folder / name)) from error
        if file_sha256(out / name) != want:
            raise changed(str(folder / name))


def changed(path: str) -> DataError:
    """What to say of a file that is not as it was."""
    how = "was changed" if Path(path).exists() else "is gone"
    return DataError(f"{path}: {how} since the sweep was loaded; put it back, or run again to use it as it is now")


class _Hashed(io.RawIOBase):
    """The bytes of a file, and their digest so far."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        num = self._file.readinto(buffer) or 0
        self._digest.update(memoryview(buffer)[:num])
        return num

    def rest(self) -> str:
        """The digest, once all has been read."""
        buffer = memoryview(bytearray(BUFFER_BYTES))
        while self.readinto(buffer):
            pass
        return self._digest.hexdigest()

    def close(self) -> None:
        self._file.close()
        super().close()
