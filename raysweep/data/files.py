"""Which files a sweep names: globs, folders of the library `datasets`, and data sets of the Hugging Face hub."""

from __future__ import annotations

import codecs
import glob
import itertools
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from raysweep.data import hub
from raysweep.data.digests import Digests, is_settled, kept_digests, state_of
from raysweep.data.formats import COLUMN, decoded, is_lines, is_table, parsed, read_texts, reading, text_of
from raysweep.durable import parse_object
from raysweep.errors import DataError, collect

Globs = str | tuple[str, ...]

# Documents at the beginning of each file that are read when a sweep file is loaded.
SAMPLE_DOCUMENTS = 100
# Of a .txt file, which is a single document.
SAMPLE_BYTES = 2**20

# What `Dataset.save_to_disk` and `DatasetDict.save_to_disk` leave beside the data.
_DATASET, _SPLITS = "state.json", "dataset_dict.json"


def listed(globs: Globs | None) -> tuple[str, ...]:
    """One or several patterns, as several; none of None."""
    return (globs,) if isinstance(globs, str) else tuple(globs or ())


def resolve(patterns: Globs, base: Path) -> tuple[str, ...]:
    """The files that match: absolute paths, or URLs at a commit of the hub; sorted, each once.

    Args:
        patterns: globs, folders that `Dataset.save_to_disk` wrote, or hf://datasets/owner/name[@revision]/glob; with ~
            and ${VARIABLES}.
        base: folder that relative ones are relative to.

    Raises:
        DataError: if there is no pattern, or one matches no file.
    """
    files: set[str] = set()
    if not listed(patterns):
        raise DataError("an empty list names no file")
    for pattern in listed(patterns):
        files.update(hub.dataset_files(pattern) if hub.is_dataset(pattern) else _matching(pattern, base))
    return tuple(sorted(files))


def digests_of(paths: Iterable[str]) -> Digests:
    """Path -> SHA-256 of each file; of the hub's, as the hub says, so that no large one is fetched for it.

    Args:
        paths: as `resolve` gives them.

    Raises:
        OSError: if a file cannot be read.
        DataError: if the hub cannot be asked.
    """
    here, there = _by_place(paths)
    return kept_digests(here) | hub.dataset_digests(there)


def sizes_of(paths: Iterable[str]) -> dict[str, int]:
    """Path -> bytes of each file, packed as it is; paths are as `resolve` gives them. Nothing is read."""
    here, there = _by_place(paths)
    return {path: os.path.getsize(path) for path in here} | hub.dataset_sizes(there)


def _by_place(paths: Iterable[str]) -> tuple[list[str], list[str]]:
    """Those of this machine, and those of the hub."""
    here: list[str] = []
    there: list[str] = []
    for path in paths:
        (there if hub.is_dataset(path) else here).append(path)
    return here, there


def sampled(globs: Globs, base: Path, *, column: str = COLUMN) -> tuple[str, ...]:
    """The files of some patterns, a few documents of each read to see that they are text.

    Args:
        globs: see `resolve`.
        base: folder that relative ones are relative to.
        column: field of JSON lines, or column of tables, that holds the text.

    Raises:
        DataError: with the findings of all files.
    """
    paths = resolve(globs, base)
    # A hub's files are fetched when they are needed.
    collect(((), partial(_check_once, path, column)) for path in paths if not hub.is_dataset(path))
    return paths


def _matching(pattern: str, base: Path) -> set[str]:
    path = hub.expanded(pattern)
    # A folder stands for its files if it is a data set.
    files = {
        file
        for match in glob.glob(str(Path(glob.escape(str(base))) / path), recursive=True)
        for file in (_saved_files(Path(match)) if os.path.isdir(match) else [match])
    }
    if not files:
        raise DataError(hub.unset(path) or _no_file(pattern, base / path))
    return {os.path.abspath(file) for file in files}


def _saved_files(folder: Path) -> list[str]:
    """The files of a folder that `Dataset.save_to_disk` wrote; none of any other folder."""
    state = folder / _DATASET
    if not state.is_file():
        return []
    try:
        return [str(folder / file["filename"]) for file in parse_object(state.read_bytes())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{state}: not as Dataset.save_to_disk writes it ({type(error).__name__}: {error})") from error


def _no_file(pattern: str, path: Path) -> str:
    if os.path.isfile(path / _SPLITS):  # Not of pathlib, which raises where a name is too long.
        splits = ", ".join(sorted(state.parent.name for state in path.glob(f"*/{_DATASET}")))
        return f"{pattern!r} holds several splits ({splits}); name one, such as {str(Path(pattern) / 'train')!r}"
    if os.path.isdir(path):
        return f"{pattern!r} is a folder; name files in it, such as {str(Path(pattern) / '*.jsonl')!r}"
    return f"no file matches {pattern!r} (looked for {path})"


# Path, column and state of each file whose sample was read, and was text.
_checked: set[tuple[str, str, str]] = set()


def _check_once(path: str, column: str) -> None:
    """See `_check_sample`; a sweep's settings and phases name the same files over and over. Raises DataError."""
    # A link that leads nowhere has no state.
    sample = path, column, state_of(path) if os.path.exists(path) else ""
    if sample not in _checked:
        _check_sample(path, column)
        if is_settled(path):
            _checked.add(sample)


def _check_sample(path: str, column: str) -> None:
    """Read the first documents of a file, and of plain JSON lines one in the middle. Raises DataError."""
    if not is_lines(path) and not is_table(path):
        with reading(path, None) as file:
            raw = file.read(SAMPLE_BYTES)
        try:  # The last letter may be cut.
            codecs.getincrementaldecoder("utf-8")().decode(raw, final=len(raw) < SAMPLE_BYTES)
        except UnicodeDecodeError:
            decoded(raw, path, 1)
        return
    for _ in itertools.islice(read_texts([path], column=column), SAMPLE_DOCUMENTS):
        pass
    if path.endswith(".jsonl"):
        with open(path, "rb") as file:
            file.seek(os.path.getsize(path) // 2)
            file.readline()
            middle = file.readline()
        try:
            text_of(parsed(middle, path, 0), path, 0, column)
        except DataError:  # Read from the beginning, for the number of the line.
            for _ in read_texts([path], column=column):
                pass
