"""Text: what is read, held out and refused."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from raysweep.data.files import resolve
from raysweep.data.formats import read_texts
from raysweep.data.packing import Tokens
from raysweep.data.text import Domain, Text
from raysweep.data.tokenizers import Bpe
from raysweep.errors import DataError


def corpus(folder: Path, **domains: dict[str, str]) -> Text:
    made = {name: Domain(**domain) for name, domain in domains.items()}
    return Text(domains_=made, tokenizer=Bpe(vocab_size=300)).pin(folder)


@pytest.fixture
def files(tmp_path) -> Path:
    """Three kinds of file."""
    documents = [{"text": f"Document number {index} speaks of words and wörter."} for index in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, documents)))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, documents[:30])))
    (tmp_path / "c.txt").write_text("A plain text. " * 40)
    return tmp_path


def test_tokens_are_the_text(files):
    text = corpus(files, a={"train": "a.jsonl", "valid": "b.jsonl.gz"}, c={"train": "c.txt", "valid": "c.txt"})
    out = files / "out"
    out.mkdir()
    text.build(out)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    ids = np.fromfile(out / "c.train.bin", dtype=Tokens(out).meta.dtype)
    assert tokenizer.decode(ids[:-1]) == "A plain text. " * 40
    assert ids[-1] == tokenizer.eos_token_id
    assert Tokens(out).meta.vocab_size == 300
    assert Tokens(out).meta.domains["a"].num_valid_tokens > 30


def test_held_out_documents_are_never_trained_on(files):
    domain = Domain(train="a.jsonl", valid_fraction=0.3).pin(files)
    train, valid = set(domain.documents("train")), set(domain.documents("valid"))
    assert not train & valid
    assert len(train) + len(valid) == 60
    assert 5 < len(valid) < 35


def test_mix_and_paths_are_no_part_of_the_tokens_identity(files):
    from raysweep.spec import fingerprint

    text = corpus(files, a={"train": "a.jsonl"}, c={"train": "c.txt"})
    mixed = text.with_(mix_={"a": 1.0})
    assert fingerprint(text) != fingerprint(mixed)
    assert fingerprint(text.source()) == fingerprint(mixed.source())
    os.rename(files / "a.jsonl", files / "moved.jsonl")
    assert fingerprint(corpus(files, a={"train": "moved.jsonl"}, c={"train": "c.txt"})) == fingerprint(text)


def test_files_that_are_read_in_another_order_are_another_identity(tmp_path):
    for number, names in enumerate((("a.txt", "b.txt"), ("b.txt", "a.txt"), ("x.txt", "y.txt"))):
        (tmp_path / f"{number}").mkdir()
        for name, text in zip(names, ("first", "second"), strict=True):
            (tmp_path / f"{number}" / name).write_text(text)
    one, swapped, renamed = (Domain(train=f"{number}/*.txt", valid_fraction=0.01).pin(tmp_path) for number in range(3))
    assert list(one.documents("train")) == list(renamed.documents("train")) != list(swapped.documents("train"))
    assert one.fingerprint == renamed.fingerprint != swapped.fingerprint


def test_changed_content_is_another_identity(files):
    before = corpus(files, c={"train": "c.txt"})
    (files / "c.txt").write_text("Something else.")
    assert corpus(files, c={"train": "c.txt"}) != before


def test_unknown_domain_in_the_mix(files):
    with pytest.raises(ValidationError, match="mix names 'z', which is no domain; domains: a"):
        Text(domains_={"a": Domain(train="a.jsonl")}, mix_={"z": 1.0})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"text": "x"}\n{"text": ', r"x\.jsonl:2: not JSON"),
        (b'{"txt": "x"}\n', r"x\.jsonl:1: no field 'text'.*txt"),
        (b"[1]\n", r"x\.jsonl:1: a line is a JSON object, not list"),
        (b'{"text": "\xff"}\n', r"x\.jsonl:1: not UTF-8"),
        (b"", r"domains\.x: no train text"),
        (b'{"text": "x"}\n{"text": "\\ud800"}\n', r"x\.jsonl:2: .*surrogate"),
    ],
)
def test_bad_files(tmp_path, content, words):
    (tmp_path / "x.jsonl").write_bytes(content)
    (tmp_path / "v.txt").write_text("valid text")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(DataError, match=words):
        corpus(tmp_path, x={"train": "x.jsonl", "valid": "v.txt"}).build(out)


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.txt.gz"])
def test_damaged_gzip(tmp_path, name):
    packed = bytearray(gzip.compress(b'{"text": "some words"}\n' * 3000))
    packed[30:60] = bytes(range(200, 230))
    (tmp_path / name).write_bytes(packed)
    with pytest.raises(DataError, match=rf"{name}: cannot be read"):
        list(read_texts([str(tmp_path / name)]))


def test_bad_utf8_in_plain_text_names_its_line(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"one\ntwo\nthr\xffee\n")
    with pytest.raises(DataError, match=r"x\.txt:3: not UTF-8 \(byte 3 of the line\)"):
        list(read_texts([str(tmp_path / "x.txt")]))


def test_folder_with_glob_characters(tmp_path):
    base = tmp_path / "runs[1]"
    base.mkdir()
    (base / "a.txt").write_text("text")
    assert resolve("*.txt", base) == (str(base / "a.txt"),)


@pytest.mark.parametrize("name", ["../a", "a/b", "", ".a"])
def test_domain_names_are_file_names(name):
    with pytest.raises(ValidationError, match="domain name"):
        Text(domains_={name: Domain(train="a.txt")})


@pytest.mark.data
@pytest.mark.skipif("RAYSWEEP_DATA" not in os.environ, reason="RAYSWEEP_DATA names no data pack")
def test_the_data_pack(tmp_path):
    folder = Path(os.environ["RAYSWEEP_DATA"]) / "pretrain"
    if not folder.is_dir():
        pytest.skip(f"no data pack in {folder}")
    text = corpus(folder, s={"train": "stories.train.jsonl.gz", "valid": "stories.valid.jsonl.gz"})
    metrics = text.build(tmp_path)
    assert metrics["num_tokens"] > 500_000
