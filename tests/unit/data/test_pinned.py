"""What is read is what was pinned: files that were changed since are named, whichever way they are read."""

import gzip
import json

import pytest

from raysweep.data.formats import read_jsonl, read_texts
from raysweep.data.pinned import copy, opened
from raysweep.data.text import Domain, Text
from raysweep.data.tokenizers import Bpe
from raysweep.durable import file_sha256
from raysweep.errors import DataError
from raysweep.tasks.multiple_choice import MultipleChoice

LINES = [{"text": f"Document {index} of some words."} for index in range(2000)]
CHANGED = "was changed since the sweep was loaded; put it back, or run again"


def write(path, lines) -> str:
    text = "\n".join(map(json.dumps, lines)).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "a.txt.gz"])
def test_texts_that_were_changed_are_named(tmp_path, name):
    path = write(tmp_path / name, LINES)
    digests = {path: file_sha256(path)}
    assert list(read_texts([path], digests)) == list(read_texts([path]))
    write(tmp_path / name, [*LINES[:-1], {"text": "Another end."}])
    with pytest.raises(DataError, match=rf"{name}: {CHANGED}"):
        list(read_texts([path], digests))


def test_a_reader_that_stops_early_has_read_what_was_pinned(tmp_path):
    path = write(tmp_path / "a.jsonl", LINES)
    want = file_sha256(path)
    with opened(path, want) as file:
        assert file.readline()
    write(tmp_path / "a.jsonl", [*LINES, {"text": "more"}])
    with pytest.raises(DataError, match=CHANGED), opened(path, want) as file:
        assert file.readline()
    lines = read_jsonl(path, want)
    assert next(lines)[0] == 1
    with pytest.raises(DataError, match=CHANGED):
        lines.close()


@pytest.mark.parametrize("damage", [b"{", b"\xff", None])
def test_a_file_that_was_damaged_since_is_a_changed_one(tmp_path, damage):
    path = write(tmp_path / "a.jsonl.gz", LINES)
    want = file_sha256(path)
    if damage is None:
        (tmp_path / "a.jsonl.gz").unlink()
    else:
        (tmp_path / "a.jsonl.gz").write_bytes(damage)
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: (was changed|is gone) since the sweep was loaded"):
        list(read_jsonl(path, want))


def test_text_changed_while_it_is_tokenized(tmp_path):
    """The tokenizer has read the right text; what is tokenized is another."""
    write(tmp_path / "a.jsonl", LINES)
    text = Text(domains_={"a": Domain(train="a.jsonl")}, tokenizer=Bpe(vocab_size=300)).pin(tmp_path)
    (tmp_path / "out").mkdir()

    class Changing(Bpe):
        def build(self, texts):
            made = super().build(texts)
            write(tmp_path / "a.jsonl", LINES[1:])
            return made

    changing = text.model_copy(update={"tokenizer": Changing(vocab_size=300)})
    with pytest.raises(DataError, match=rf"a\.jsonl: {CHANGED}"):
        changing.build(tmp_path / "out")


def test_text_changed_behind_what_the_tokenizer_reads(tmp_path):
    write(tmp_path / "a.jsonl", LINES)
    text = Text(domains_={"a": Domain(train="a.jsonl")}, tokenizer=Bpe(num_training_bytes=1000)).pin(tmp_path)
    assert sum(len(part) for part in text._training_texts(1000)) == 1000
    write(tmp_path / "a.jsonl", LINES[:-1])
    with pytest.raises(DataError, match=CHANGED):
        list(text._training_texts(1000))


@pytest.mark.parametrize("split", ["train", "valid", "test", "indicator"])
def test_a_task_with_flipped_labels_is_refused(tmp_path, split):
    lines = [{"question": f"q {i}", "choices": ["a", "b"], "answer": i % 2} for i in range(30)]
    paths = [tmp_path / "train.jsonl", tmp_path / "test.jsonl"]
    for number, path in enumerate(paths):
        write(path, [line | {"question": f"{number} {line['question']}"} for line in lines])
    task = MultipleChoice(form="multiple_choice", train="train.jsonl", test="test.jsonl").pin(tmp_path)
    before = task.examples(split)
    original = paths[split == "test"].read_text()
    paths[split == "test"].write_text(original.replace('"answer": 1', '"answer": 0'))
    with pytest.raises(DataError, match=CHANGED):
        task.examples(split)
    paths[split == "test"].write_text(original)
    assert task.examples(split) == before


def test_a_copy_is_of_what_was_pinned(tmp_path):
    (tmp_path / "from").mkdir()
    (tmp_path / "to").mkdir()
    (tmp_path / "from" / "a").write_text("a")
    (tmp_path / "from" / "b").write_text("b")
    digests = {"a": file_sha256(tmp_path / "from" / "a")}
    copy(tmp_path / "from", tmp_path / "to", digests)
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["a"]
    (tmp_path / "from" / "a").write_text("A")
    with pytest.raises(DataError, match=rf"from/a: {CHANGED}"):
        copy(tmp_path / "from", tmp_path / "to", digests)
    (tmp_path / "from" / "a").unlink()
    with pytest.raises(DataError, match="from/a: is gone since"):
        copy(tmp_path / "from", tmp_path / "to", digests)
