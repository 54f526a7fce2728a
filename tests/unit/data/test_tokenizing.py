"""Tokens of documents: the same on any number of cores, with their tags, and written whole or not at all."""

import itertools
import json
import os
import threading

import numpy as np
import pytest
from transformers import AutoTokenizer

from raysweep.data import text as text_module
from raysweep.data import tokenizing
from raysweep.data.packing import Tokens
from raysweep.data.text import Domain, Text, length_bounds
from raysweep.data.tokenizers import Bpe, Pretrained, add_control_tokens, load_tokenizer
from raysweep.data.tokenizing import encoder, num_cores, write_tokens
from raysweep.errors import DataError

# Of very different lengths, one of them longer than a batch.
DOCUMENTS = [f"Document {index} speaks of wörter. " * (1 + index * 37 % 29) for index in range(900)]
DOCUMENTS.append("long " * 110_000)


def corpus(folder, **domain) -> Text:
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS))
    return Text(domains_={"a": Domain(train="a.jsonl", **domain)}, tokenizer=Bpe(vocab_size=300)).pin(folder)


def built(corpus, out, **given) -> Tokens:
    out.mkdir()
    corpus.build(out, **given)
    return Tokens(out)


def documents_of(tokens: Tokens, domain: str) -> list[str]:
    """What stands between the ends of text, as text."""
    tokenizer = AutoTokenizer.from_pretrained(tokens.tokenizer_dir)
    found = []
    for split in ("train", "valid"):
        ids = np.fromfile(tokens.folder / f"{domain}.{split}.bin", dtype=tokens.meta.dtype)
        ends = np.flatnonzero(ids == tokenizer.eos_token_id)
        assert ends[-1] == len(ids) - 1
        found += [tokenizer.decode(part) for part in np.split(ids, ends + 1)[:-1]]
    return found


def test_tokens_depend_on_no_number_of_cores(tmp_path, monkeypatch):
    text = corpus(tmp_path)
    contents = []
    for num in (1, 2, 7):
        monkeypatch.setattr(text_module, "num_cores", lambda num=num: num)
        folder = built(text, tmp_path / f"{num}").folder
        contents.append({path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})
    assert contents[0] == contents[1] == contents[2]
    assert set(contents[0]) == {"a.train.bin", "a.valid.bin", "meta.json"}


def test_tokens_are_those_of_the_tokenizer_itself(tmp_path):
    """The naive way: one document after another, by transformers' own call."""
    text = corpus(tmp_path)
    tokens = built(text, tmp_path / "out")
    tokenizer = load_tokenizer(tokens.tokenizer_dir)
    for split in ("train", "valid"):
        rows = [tokenizer(each, add_special_tokens=False)["input_ids"] for each in text.domains_["a"].documents(split)]
        naive = list(itertools.chain.from_iterable([*row, tokenizer.eos_token_id] for row in rows))
        assert np.fromfile(tokens.folder / f"a.{split}.bin", dtype=tokens.meta.dtype).tolist() == naive
        meta = tokens.meta.domains["a"]
        assert getattr(meta, f"num_{split}_tokens") == len(naive)
        num_bytes = sum(len(each.encode()) for each in text.domains_["a"].documents(split))
        assert getattr(meta, f"{split}_bytes") == num_bytes


def test_several_threads_encode_at_once(tmp_path):
    at_once = threading.Barrier(2, timeout=30)

    def encode(texts):
        at_once.wait()
        return [[len(text)] for text in texts]

    documents = [("train", "x" * tokenizing.BATCH_CHARACTERS)] * 4
    write_tokens(documents, encode, {"train": tmp_path / "a"}, before=[], after=[], dtype="uint32", num_threads=2)
    assert np.fromfile(tmp_path / "a", np.uint32).tolist() == [tokenizing.BATCH_CHARACTERS] * 4


def test_the_reader_is_never_far_ahead(tmp_path):
    """Memory is bounded: documents are read as batches are encoded."""
    num_read = num_encoded = most = 0

    def documents():
        nonlocal num_read, most
        for _ in range(200):
            num_read += 1
            most = max(most, num_read - num_encoded)
            yield "train", "x" * tokenizing.BATCH_CHARACTERS

    def encode(texts):
        nonlocal num_encoded
        num_encoded += len(texts)
        return [[0] for _ in texts]

    write_tokens(documents(), encode, {"train": tmp_path / "a"}, before=[], after=[], dtype="uint16", num_threads=3)
    assert num_encoded == 200
    assert most <= 3 * tokenizing.AHEAD + 2


@pytest.mark.parametrize("failing", ["document", "encoding"])
def test_tokens_are_written_whole_or_not_at_all(tmp_path, failing):
    def documents():
        yield from [("train", "x" * tokenizing.BATCH_CHARACTERS)] * 20
        yield "valid", "the last"
        if failing == "document":
            raise DataError("a.jsonl:21: not JSON")

    def encode(texts):
        if failing == "encoding" and "the last" in texts:
            raise DataError("no ids")
        return [[0]] * len(texts)

    (tmp_path / "a").write_text("from before")
    paths = {"train": tmp_path / "a", "valid": tmp_path / "b"}
    with pytest.raises(DataError, match=r"not JSON|no ids"):
        write_tokens(documents(), encode, paths, before=[], after=[0], dtype="uint16", num_threads=2)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "from before"


def test_cores_are_those_the_process_may_use():
    assert num_cores() == len(os.sched_getaffinity(0))


def test_a_tag_stands_before_each_document(tmp_path):
    plain = built(corpus(tmp_path), tmp_path / "plain")
    tagged = built(corpus(tmp_path, tag="<|a|>"), tmp_path / "tagged")
    assert documents_of(tagged, "a") == [f"<|a|>{text}" for text in documents_of(plain, "a")]
    assert tagged.meta.vocab_size == plain.meta.vocab_size + 1
    tokenizer = AutoTokenizer.from_pretrained(tagged.tokenizer_dir)
    ids = {split: np.fromfile(tagged.folder / f"a.{split}.bin", tagged.meta.dtype) for split in ("train", "valid")}
    untagged = np.fromfile(plain.folder / "a.train.bin", plain.meta.dtype)
    tag = tokenizer.convert_tokens_to_ids("<|a|>")
    assert tag == len(tokenizer) - 1
    assert ids["valid"][0] == ids["train"][0] == tag
    # The ids of text do not move, and the tag's bytes are none of the text's.
    assert np.array_equal(ids["train"][ids["train"] != tag], untagged)
    assert tagged.meta.domains["a"].valid_bytes == plain.meta.domains["a"].valid_bytes


def test_a_document_that_spells_a_tag_holds_no_control_token(tmp_path):
    DOCUMENTS.append("It says <|a|> here.")
    try:
        tokens = built(corpus(tmp_path, tag="<|a|>"), tmp_path / "out")
    finally:
        DOCUMENTS.pop()
    tag = AutoTokenizer.from_pretrained(tokens.tokenizer_dir).convert_tokens_to_ids("<|a|>")
    num_tags = sum((np.fromfile(path, tokens.meta.dtype) == tag).sum() for path in tokens.folder.glob("*.bin"))
    assert num_tags == len(DOCUMENTS) + 1


def test_domains_have_tags_of_their_own(tmp_path):
    (tmp_path / "a.txt").write_text("Text of one kind.")
    domains = {name: Domain(train="a.txt", valid="a.txt", tag=tag) for name, tag in (("a", "<|x|>"), ("b", "<|y|>"))}
    domains |= {"c": Domain(train="a.txt", valid="a.txt", tag="<|x|>"), "d": Domain(train="a.txt", valid="a.txt")}
    text = Text(domains_=domains, tokenizer=Bpe(vocab_size=300)).pin(tmp_path)
    tokens = built(text, tmp_path / "out")
    firsts = {name: documents_of(tokens, name)[0].partition(">")[0] for name in domains}
    assert firsts == {"a": "<|x|", "b": "<|y|", "c": "<|x|", "d": firsts["d"]}
    assert firsts["d"].startswith("Text of one kind.")
    assert text.vocab_size == tokens.meta.vocab_size == 302


def test_a_tag_that_the_model_has_no_row_for(tmp_path):
    earlier = built(corpus(tmp_path, tag="<|a|>"), tmp_path / "earlier")
    same = built(corpus(tmp_path, tag="<|a|>"), tmp_path / "same", tokenizer_dir=earlier.tokenizer_dir)
    assert same.meta.vocab_size <= earlier.meta.vocab_size
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match=r"tag '<\|b\|>' is no token of the tokenizer that the model was trained with"):
        corpus(tmp_path, tag="<|b|>").build(tmp_path / "other", tokenizer_dir=earlier.tokenizer_dir)


def test_a_tag_that_is_a_word_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"tag 'a' is a token of text already; choose another, such as <\|a\|>"):
        add_control_tokens(Bpe(vocab_size=257).build(lambda num_bytes: iter(["text"])), ["a"], may_grow=True)


def naive_bounds(lengths, low, high):
    """By definition, on the sorted list: the least length that a part q of them does not exceed."""

    def quantile(part):
        return -1 if part == 0 else min(x for x in lengths if np.mean([y <= x for y in lengths]) >= part)

    return quantile(low), quantile(high)


@pytest.mark.parametrize("quantiles", [(0, 1), (0.25, 0.75), (0.75, 1), (0, 0.1), (0.5, 0.55), (0.3, 0.9)])
def test_length_bounds_are_quantiles(quantiles):
    draw = np.random.default_rng(0)
    for size in (1, 2, 7, 40, 101):
        lengths = draw.integers(1, 30, size).tolist()
        counts = {length: lengths.count(length) for length in lengths}
        assert length_bounds(counts, quantiles) == naive_bounds(lengths, *quantiles)
        if quantiles[0] > 0:
            expected = [np.quantile(lengths, part, method="inverted_cdf") for part in quantiles]
            assert list(length_bounds(counts, quantiles)) == expected


def test_ranges_of_lengths_share_no_document_and_leave_none_out(tmp_path):
    every = set(corpus(tmp_path).domains_["a"].documents("train"))
    parts = [
        set(corpus(tmp_path, length_quantiles=ends).domains_["a"].documents("train"))
        for ends in ((0.0, 0.25), (0.25, 0.75), (0.75, 1.0))
    ]
    assert set.union(*parts) == every
    assert sum(map(len, parts)) == len(every)
    assert max(map(len, parts[0])) <= min(map(len, parts[1]))
    assert max(map(len, parts[1])) <= min(map(len, parts[2]))
    assert 0.4 < len(parts[1]) / len(every) < 0.6


def test_held_out_documents_are_of_the_same_lengths(tmp_path):
    domain = corpus(tmp_path, length_quantiles=(0.25, 0.75), valid_fraction=0.3).domains_["a"]
    shortest, longest = domain._lengths
    lengths = [len(text.encode()) for text in domain.documents("valid")]
    assert 50 < len(lengths) < 270
    assert shortest < min(lengths) <= max(lengths) <= longest
    given = Domain(train="a.jsonl", valid="a.jsonl", length_quantiles=(0.25, 0.75)).pin(tmp_path)
    assert set(given.documents("valid")) == set(given.documents("train"))


def test_quantiles_in_the_wrong_order():
    with pytest.raises(ValueError, match=r"length_quantiles \[0\.5, 0\.5\]: write \[low, high\] with low below high"):
        Domain(train="a.txt", length_quantiles=(0.5, 0.5))


def test_a_tokenizer_of_any_make(tmp_path):
    """Word pieces, with a truncation of its own that is none of ours."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "[SEP]", "of", "speak", "##s", "Document", "long"]
    made = Tokenizer(WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    made.enable_truncation(8)
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", eos_token="[SEP]").save_pretrained(tmp_path / "t")
    tokenizer = load_tokenizer(tmp_path / "t")
    ids = encoder(load_tokenizer(tmp_path / "t"))(DOCUMENTS)
    assert ids == tokenizer(DOCUMENTS, add_special_tokens=False)["input_ids"]
    assert len(ids[-1]) == 110_000
    text = corpus(tmp_path).with_(tokenizer=Pretrained(name="pretrained", path="t", vocab_size=8)).pin(tmp_path)
    assert built(text, tmp_path / "out").meta.vocab_size == 8
