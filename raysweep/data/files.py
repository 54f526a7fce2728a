"""Files of text: .txt, .jsonl and .jsonl.gz, found by globs, checked by a sample and read document by document."""

from __future__ import annotations

import codecs
import contextlib
import glob
import gzip
import itertools
import json
import os
import re
import zlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

from raysweep.data import hub
from raysweep.data.pinned import opened
from raysweep.errors import DataError, collect

Globs = str | tuple[str, ...]

_SURROGATE = re.compile("[\ud800-\udfff]")

# Documents at the beginning of each file that are read when a sweep file is loaded.
SAMPLE_DOCUMENTS = 100
# Of a .txt file, which is a single document.
SAMPLE_BYTES = 2**20

# A damaged gzip body raises zlib.error, a cut one EOFError; neither is an OSError.
_READ_ERRORS = (OSError, EOFError, zlib.error)


def _no_file(pattern: str, path: Path) -> str:
    if path.is_dir():
        return f"{pattern!r} is a folder; name files in it, such as {str(Path(pattern) / '*.jsonl')!r}"
    return f"no file matches {pattern!r} (looked for {path})"


def resolve(patterns: Globs, base: Path) -> tuple[str, ...]:
    """Absolute paths of the files that match, sorted. Raises DataError if there is no pattern, or one matches none."""
    found: set[str] = set()
    if not listed(patterns):
        raise DataError("an empty list names no file")
    for pattern in listed(patterns):
        path = hub.expanded(pattern)
        matches = [
            match
            for match in glob.glob(str(Path(glob.escape(str(base))) / path), recursive=True)
            if os.path.isfile(match)
        ]
        if not matches:
            raise DataError(hub.unset(path) or _no_file(pattern, base / path))
        found.update(os.path.abspath(match) for match in matches)
    return tuple(sorted(found))


def sampled(globs: Globs, base: Path) -> tuple[str, ...]:
    """The files of some patterns, a few lines of each read to see that they are text. Raises DataError."""
    paths = resolve(globs, base)
    collect(((), partial(_check_sample, path)) for path in paths)
    return paths


def _check_sample(path: str) -> None:
    """Read the first documents of a file, and of plain JSON lines one in the middle. Raises DataError."""
    if not path.endswith((".jsonl", ".jsonl.gz")):
        with _reading(path, None) as file:
            raw = file.read(SAMPLE_BYTES)
        try:  # The last letter may be cut.
            codecs.getincrementaldecoder("utf-8")().decode(raw, final=len(raw) < SAMPLE_BYTES)
        except UnicodeDecodeError:
            _decoded(raw, path, 1)
        return
    for _ in itertools.islice(read_texts([path]), SAMPLE_DOCUMENTS):
        pass
    if path.endswith(".jsonl"):
        with open(path, "rb") as file:
            file.seek(os.path.getsize(path) // 2)
            file.readline()
            middle = file.readline()
        try:
            _text_of(_parsed(middle, path, 0), path, 0)
        except DataError:  # Read from the beginning, for the number of the line.
            for _ in read_texts([path]):
                pass


def read_texts(paths: Sequence[str], digests: Mapping[str, str] | None = None) -> Generator[str]:
    """Documents: every line of a .jsonl(.gz) file, or a .txt file whole.

    Raises:
        DataError: if a file is malformed, or not what its digest says; names file and line.
    """
    for path in paths:
        yield from _texts(path, (digests or {}).get(path))


def _texts(path: str, want: str | None) -> Iterator[str]:
    with _reading(path, want) as file:
        if path.endswith((".jsonl", ".jsonl.gz")):
            for number, line in _lines(file, path):
                yield _text_of(line, path, number)
        else:
            yield _decoded(file.read(), path, 1)


def read_jsonl(path: str, want: str | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line that is not blank; see `read_texts`. `want`: SHA-256 of the file."""
    with _reading(path, want) as file:
        yield from _lines(file, path)


def _lines(file: IO[bytes], path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, raw in enumerate(file, 1):
        if (line := _parsed(raw, path, number)) is not None:
            yield number, line


@contextlib.contextmanager
def _reading(path: str, want: str | None) -> Iterator[IO[bytes]]:
    """The unpacked bytes of a file; see `pinned.opened`."""
    try:
        with opened(path, want) as file:
            yield gzip.GzipFile(fileobj=file) if path.endswith(".gz") else file  # type: ignore[misc]
    except _READ_ERRORS as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _parsed(raw: bytes, path: str, number: int) -> dict[str, Any] | None:
    """The object of a line of JSON; None if it is blank."""
    text = _decoded(raw.removeprefix(codecs.BOM_UTF8), path, number)
    if not text.strip():
        return None
    try:
        line = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        kind = "nested too deeply" if isinstance(error, RecursionError) else "a number of thousands of digits"
        raise DataError(f"{path}:{number}: not read: {kind}") from error
    if not isinstance(line, dict):
        raise DataError(f"{path}:{number}: a line is a JSON object, not {type(line).__name__}")
    # JSON can spell half of a pair ("\\ud800"); no encoding can hold it.
    if "\\u" in text and _SURROGATE.search(json.dumps(line, ensure_ascii=False)):
        raise DataError(f"{path}:{number}: a field holds half of a surrogate pair, which is no text")
    return line


def _text_of(line: Mapping[str, Any] | None, path: str, number: int) -> str:
    text = line.get("text") if line is not None else ""
    if not isinstance(text, str):
        raise DataError(f"{path}:{number}: no field 'text' with a string; fields: {', '.join(line or ())}")
    return text


def _decoded(raw: bytes, path: str, number: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = number + raw.count(b"\n", 0, error.start)
        column = error.start - (raw.rfind(b"\n", 0, error.start) + 1)
        raise DataError(f"{path}:{line}: not UTF-8 (byte {column} of the line)") from error


def listed(globs: Globs | None) -> tuple[str, ...]:
    """One or several patterns, as several."""
    return (globs,) if isinstance(globs, str) else tuple(globs or ())
