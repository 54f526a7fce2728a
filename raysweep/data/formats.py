"""The formats of text files, read document by document. To add one: a function in `_READERS`, by its suffix.

`.txt` is one document; `.jsonl`, `.parquet` and `.arrow` (as the library `datasets` saves it) hold one in each line or
row, in the field or column that is named. `.gz` and `.zst` may follow the first two.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

from raysweep.data import hub
from raysweep.data.pinned import opened, unchanged
from raysweep.errors import DataError

COLUMN = "text"
"""Where a document is, if nothing else is said."""

# Rows of a Parquet file that are decoded at once.
BATCH_ROWS = 256
# Read ahead of a Parquet column; without a bound pyarrow reads a row group's whole column, often gigabytes.
BUFFER_BYTES = 2**20

_SURROGATE = re.compile("[\ud800-\udfff]")

# A damaged gzip body raises zlib.error, a cut one EOFError; neither is an OSError. pyarrow's own are ValueErrors.
_READ_ERRORS = (OSError, EOFError, zlib.error, ValueError)


def read_texts(
    paths: Sequence[str], digests: Mapping[str, str] | None = None, *, column: str = COLUMN
) -> Generator[str]:
    """The documents of files, in order.

    Args:
        paths: files of this machine, or `hf://` URLs of a hub's.
        digests: path -> SHA-256 of what each file shall hold; one that is not named may hold anything.
        column: field of JSON lines, or column of tables, that holds the text.

    Raises:
        DataError: if a file is malformed, or not what its digest says; names file and line.
    """
    for path in paths:
        yield from _reader(path)(path, (digests or {}).get(path), column)


def read_jsonl(path: str, want: str | None = None) -> Generator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of each line that is not blank.

    Args:
        path: a .jsonl, .jsonl.gz or .jsonl.zst file, here or of a hub's.
        want: SHA-256 of the file, packed as it is; None: whatever is there is right.

    Raises:
        DataError: if a line is malformed, or the file is not what `want` says; names file and line.
    """
    with reading(path, want) as file:
        for number, raw in enumerate(file, 1):
            if (line := parsed(raw, path, number)) is not None:
                yield number, line


def is_table(path: str) -> bool:
    """Whether a file has rows and typed columns, which are checked before anything is read."""
    return path.endswith((".parquet", ".arrow"))


def is_packed(path: str) -> bool:
    """Whether a file holds more text than bytes."""
    return path.endswith((".gz", ".zst", ".parquet"))


def is_lines(path: str) -> bool:
    """Whether a file holds JSON lines, packed or not."""
    return path.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst"))


def is_document(path: str) -> bool:
    """Whether a file is one document, whatever it holds."""
    return _reader(path) is _read_document


def parsed(raw: bytes, path: str, number: int) -> dict[str, Any] | None:
    """The object of a line of JSON; None if it is blank.

    Args:
        raw: the line's bytes, with or without its end.
        path, number: of the file and the line, for errors.

    Raises:
        DataError: if it is no JSON object, or a text in it that no encoding can hold; names file and line.

    >>> parsed(b'{"text": "a"}', "a.jsonl", 1)
    {'text': 'a'}
    """
    text = decoded(raw.removeprefix(codecs.BOM_UTF8), path, number)
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


def text_of(line: Mapping[str, Any] | None, path: str, number: int, column: str) -> str:
    """The document of a line; empty of a blank line.

    Args:
        line: see `parsed`.
        path, number: of the file and the line, for errors.
        column: the field that holds it.

    Raises:
        DataError: if there is no such field, or no string in it; names those that there are.
    """
    text = line.get(column) if line is not None else ""
    if not isinstance(text, str):
        raise DataError(f"{path}:{number}: no field {column!r} with a string; fields: {', '.join(line or ())}")
    return text


def decoded(raw: bytes, path: str, number: int) -> str:
    """Bytes of a file as text.

    Args:
        raw: whole lines.
        path: for errors.
        number: of the first of the lines.

    Raises:
        DataError: if they are not UTF-8; names the line, and the byte in it.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = number + raw.count(b"\n", 0, error.start)
        column = error.start - (raw.rfind(b"\n", 0, error.start) + 1)
        raise DataError(f"{path}:{line}: not UTF-8 (byte {column} of the line)") from error


@contextlib.contextmanager
def reading(path: str, want: str | None) -> Iterator[IO[bytes]]:
    """The unpacked bytes of a file, which are compared with `want` as they are read; see `pinned.opened`.

    Raises:
        DataError: if they cannot be read, or are not what `want`, a SHA-256 of the packed file, says.
    """
    with _named_errors(path), opened(hub.located(path), want) as file:
        yield _unpacked(file, path)


def _unpacked(file: IO[bytes], path: str) -> IO[bytes]:
    if path.endswith(".gz"):
        return gzip.GzipFile(fileobj=file)  # type: ignore[return-value]
    if path.endswith(".zst"):
        import pyarrow as pa  # Ray Tune brings it; Python's own zstd begins with 3.14.

        return io.BufferedReader(pa.CompressedInputStream(file, "zstd"), BUFFER_BYTES)
    return file


@contextlib.contextmanager
def _named_errors(path: str) -> Iterator[None]:
    """Whatever a library says of a damaged file, as a DataError that names it."""
    try:
        yield
    except _READ_ERRORS as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _read_document(path: str, want: str | None, column: str) -> Iterator[str]:
    with reading(path, want) as file:
        yield decoded(file.read(), path, 1)


def _read_lines(path: str, want: str | None, column: str) -> Iterator[str]:
    with contextlib.closing(read_jsonl(path, want)) as lines:
        for number, line in lines:
            yield text_of(line, path, number, column)


def _read_parquet(path: str, want: str | None, column: str) -> Iterator[str]:
    import pyarrow.parquet as pq

    local = hub.located(path)
    # The end of the file is read first, so it cannot be hashed on the way.
    with _named_errors(path), unchanged(local, want), pq.ParquetFile(local, buffer_size=BUFFER_BYTES) as file:
        _check_schema(file.schema_arrow, path, column)
        yield from _rows(file.iter_batches(BATCH_ROWS, columns=[column], use_threads=False), path, column)


def _read_arrow(path: str, want: str | None, column: str) -> Iterator[str]:
    import pyarrow.ipc

    with reading(path, want) as file, pyarrow.ipc.open_stream(file) as stream:
        _check_schema(stream.schema, path, column)
        yield from _rows(stream, path, column)


def _check_schema(schema: Any, path: str, column: str) -> None:
    """Raises DataError if there is no such column of strings."""
    import pyarrow.types as types

    kind = schema.field(column).type if column in schema.names else None
    kind = kind.value_type if kind is not None and types.is_dictionary(kind) else kind
    if kind is None or not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        there = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise DataError(f"{path}: no column {column!r} of strings; columns: {there}; name one with column")


def _rows(batches: Iterable[Any], path: str, column: str) -> Iterator[str]:
    number = 0
    for batch in batches:
        for text in batch.column(column).to_pylist():
            number += 1
            if text is None:
                raise DataError(f"{path}: row {number}: column {column!r} is null; leave such rows out")
            yield text


_READERS: Mapping[str, Callable[[str, str | None, str], Iterator[str]]] = {
    ".jsonl": _read_lines,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}


def _reader(path: str) -> Callable[[str, str | None, str], Iterator[str]]:
    """How a file is read; whatever is no table and no JSON lines is one document."""
    bare = path.removesuffix(".gz").removesuffix(".zst")
    return next((read for suffix, read in _READERS.items() if bare.endswith(suffix)), _read_document)
