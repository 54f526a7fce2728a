"""Vocabularies are told apart by their tokens, not by what else the files of tokenizers say."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from raysweep.analysis.vocabularies import vocabularies_of, vocabulary_of
from raysweep.record import Record
from raysweep.store import Store

PROVENANCE = {"started": "2026-01-01T00:00:00+00:00", "wall_seconds": 1.0, "peak_memory_bytes": 2**20, "world_size": 1,
              "device": "cpu", "host": "h", "git_commit": None, "versions": {}}  # fmt: skip


def test_tokens_and_their_ids_tell_whatever_the_kind_of_model(tmp_path):
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    pieces = Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0), ("c", -2.0)]))
    other = Tokenizer(models.WordLevel({"a": 0, "c": 1, "b": 2}, unk_token="a"))
    split = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    split.pre_tokenizer = pre_tokenizers.Whitespace()
    more = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    more.add_special_tokens(["<e>"])
    found = []
    for tokenizer in (words, pieces, split, other, more):
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        found.append(vocabulary_of(tmp_path / "tokenizer.json"))
    assert found[0] == found[1] == found[2]
    assert len(set(found[2:])) == 3
    assert [each.partition(" (")[0] for each in found[2:]] == ["3 tokens", "3 tokens", "4 tokens"]


def put(store, stage_id, files):
    folder = store.work_dir(stage_id)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    kind = stage_id.partition("-")[0]
    record = Record(stage_id, kind, "done", spec={}, inputs={}, metrics={}, provenance=PROVENANCE, files={})
    store.commit(record, folder)
    return store.get(stage_id)


@pytest.mark.parametrize("lost", [False, True])
def test_files_of_other_formats_or_lost_ones_are_told_apart_by_their_bytes(tmp_path, lost):
    store = Store(tmp_path)
    fast = json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": []})
    files = {
        "tokenize-1": {"tokenizer/tokenizer.json": fast, "tokenizer/vocab.json": "{}"},
        "tokenize-2": {"tokenizer/tokenizer.model": "pieces", "meta.json": "{}"},
        "tokenize-3": {"tokenizer/tokenizer.json": "no JSON"},
        "tokenize-4": {"meta.json": "{}"},
        "fetch-5": {"tokenizer.json": fast + " "},
        "pretrain-6": {"tokenizer.json": fast},
    }
    records = [put(store, stage_id, each) for stage_id, each in files.items()]
    if lost:
        (store.folder("tokenize-1") / "tokenizer" / "tokenizer.json").unlink()
    found = vocabularies_of(store, records)
    assert found.keys() == {"tokenize-1", "tokenize-2", "tokenize-3", "fetch-5"}
    assert (found["tokenize-1"] == found["fetch-5"]) is not lost
    assert found["fetch-5"].startswith("1 tokens (")
    assert len({found["tokenize-1"], found["tokenize-2"], found["tokenize-3"]}) == 3
