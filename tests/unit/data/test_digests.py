"""Digests of files: kept for as long as a file is what it was, and never longer."""

import builtins
import os
import sqlite3
from pathlib import Path

import pytest

from raysweep import durable
from raysweep.data import digests, files
from raysweep.data.digests import kept_digests
from raysweep.data.text import Domain
from raysweep.durable import file_sha256
from raysweep.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache folder of the test's own, where files count as settled at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "SETTLED_SECONDS", 0.0)
    return tmp_path / "cache" / "raysweep" / "digests.sqlite"


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The paths of the files that are opened, as they are opened."""
    opened: list[str] = []
    really = builtins.open

    def noting(path, *args, **kwargs):
        opened.append(str(path))
        return really(path, *args, **kwargs)

    monkeypatch.setattr(durable, "open", noting, raising=False)
    return opened


def test_a_file_that_stays_is_read_once(tmp_path, read):
    paths = [str(tmp_path / name) for name in ("a", "b")]
    for path in paths:
        Path(path).write_text(path)
    first = kept_digests(paths)
    assert read == paths
    assert first == {path: file_sha256(path) for path in paths}
    read.clear()
    assert kept_digests(paths) == first
    assert read == []


def test_a_changed_file_is_read_again_though_size_and_mtime_are_the_same(tmp_path, read):
    path = str(tmp_path / "a")
    Path(path).write_text("one")
    os.utime(path, ns=(10**18, 10**18))
    before = kept_digests([path])
    Path(path).write_text("two")
    os.utime(path, ns=(10**18, 10**18))
    assert kept_digests([path]) == {path: file_sha256(path)} != before
    Path(path).unlink()
    Path(path).write_text("new")
    assert kept_digests([path]) == {path: file_sha256(path)}


def test_a_file_that_was_just_written_is_not_kept(tmp_path, monkeypatch, read):
    monkeypatch.setattr(digests, "SETTLED_SECONDS", 60.0)
    path = str(tmp_path / "a")
    Path(path).write_text("one")
    assert kept_digests([path]) == kept_digests([path])
    assert read == [path, path]


def test_documents_that_were_seen_to_be_text_are_read_again_once_their_file_has_changed(tmp_path, monkeypatch):
    looked, look = [], files._check_sample
    monkeypatch.setattr(files, "_check_sample", lambda *given: looked.append(given) or look(*given))
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n')
    assert files.sampled("a.jsonl", tmp_path) == files.sampled("*.jsonl", tmp_path) == (str(path),)
    assert looked == [(str(path), "text")]
    path.write_text('{"tent": "one"}\n')
    for _ in range(2):  # What was wrong is told each time.
        with pytest.raises(DataError, match="text"):
            files.sampled("a.jsonl", tmp_path)
    assert len(looked) == 3


@pytest.mark.parametrize("damage", ["no folder", "no database"])
def test_without_a_cache_files_are_read(tmp_path, cache, damage):
    path = str(tmp_path / "a")
    Path(path).write_text("one")
    where = cache.parent.parent if damage == "no folder" else cache
    where.parent.mkdir(parents=True, exist_ok=True)
    where.write_text("no folder, and no database")
    assert kept_digests([path]) == {path: file_sha256(path)}


def test_what_was_read_before_an_error_is_kept(tmp_path, cache):
    (tmp_path / "a").write_text("one")
    with pytest.raises(FileNotFoundError):
        kept_digests([str(tmp_path / "a"), str(tmp_path / "missing")])
    rows = sqlite3.connect(cache).execute("SELECT path FROM digests").fetchall()
    assert rows == [(str(tmp_path / "a"),)]


def test_planning_reads_no_corpus_twice(tmp_path, read):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"Text {number}.")
    first = Domain(train="*.txt").pin(tmp_path)
    assert len(read) == 3
    assert Domain(train="*.txt").pin(tmp_path) == first
    assert len(read) == 3
