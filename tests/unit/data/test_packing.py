"""Batches: a function of seed and step alone, each sequence once per epoch, domains in their shares."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysweep.data.packing import CYCLE, DomainMeta, Tokens, TokensMeta
from raysweep.errors import DataError


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Tokens:
    """Two domains, of 30 and 70 sequences of 4 tokens, whose first token says which they are."""
    folder = tmp_path_factory.mktemp("tokens")
    for name, first, num in (("a", 0, 30), ("b", 1000, 70)):
        rows = np.repeat(first + np.arange(num), 4).astype(np.uint16)
        rows.tofile(folder / f"{name}.train.bin")
        rows[:10].tofile(folder / f"{name}.valid.bin")
    domains = {name: DomainMeta(num_train_tokens=4 * num, num_valid_tokens=10) for name, num in (("a", 30), ("b", 70))}
    TokensMeta(vocab_size=1100, dtype="uint16", sentence_length=None, domains=domains).write(folder)
    return Tokens(folder)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), steps=st.lists(st.integers(0, 500), min_size=1, max_size=8))
def test_order_is_a_function_of_seed_and_step(tokens, seed, steps):
    mix = {"a": 0.25, "b": 0.75}
    walked = tokens.batches(mix, sequence_length=4, seed=seed)
    for step in steps:
        fresh = tokens.batches(mix, sequence_length=4, seed=seed)
        assert (walked.batch(step, 3) == fresh.batch(step, 3)).all()


def test_every_sequence_once_per_epoch(tokens):
    batches = tokens.batches({"b": 1.0}, sequence_length=4, seed=1)
    seen = np.concatenate([batches.batch(step, 7)[:, 0] for step in range(20)])
    assert sorted(seen[:70]) == sorted(seen[70:]) == list(range(1000, 1070))
    assert list(seen[:70]) != list(seen[70:])


def test_shares_are_exact_over_a_cycle(tokens):
    batches = tokens.batches({"a": 0.25, "b": 0.75}, sequence_length=4, seed=1)
    first = np.concatenate([batches.batch(step, 50)[:, 0] for step in range(CYCLE // 50)])
    assert (first < 1000).sum() == CYCLE // 4


def test_each_sequence_of_a_batch_has_its_domain(tokens):
    batches = tokens.batches({"a": 0.25, "b": 0.75}, sequence_length=4, seed=1)
    for step in (0, 3, CYCLE // 50):
        assert (batches.domains(step, 50) == (batches.batch(step, 50)[:, 0] >= 1000)).all()


def test_held_out_shares_are_those_of_the_mix_where_text_is_short(tokens, caplog):
    """Of both domains there are two sequences."""
    rows = tokens.valid_mix({"b": 0.75, "a": 0.25}, sequence_length=4, num_sequences=64)
    assert [int(first >= 1000) for first in rows[:, 0]] == [0, 1, 1]
    assert "2 held-out sequences in place of 64: domain 'b' has 2" in caplog.text
    caplog.clear()
    rows = tokens.valid_mix({"b": 0.5, "a": 0.5}, sequence_length=4, num_sequences=4)
    assert (rows == np.concatenate([tokens.valid(name, sequence_length=4, max_sequences=2) for name in "ab"])).all()
    assert not caplog.text


def test_batch_size_only_cuts_the_order(tokens):
    batches = tokens.batches({"a": 0.5, "b": 0.5}, sequence_length=4, seed=3)
    big = batches.batch(0, 12)
    assert (big == np.concatenate([batches.batch(step, 4) for step in range(3)])).all()


def test_too_little_text_for_a_sequence(tokens):
    with pytest.raises(DataError, match=r"smaller pretrain\.sequence_length"):
        tokens.valid("a", sequence_length=11, max_sequences=4)


def test_share_too_small_for_a_cycle(tokens):
    with pytest.raises(DataError, match=r"domain 'b' has a share of 0\.0003"):
        tokens.batches({"a": 0.9997, "b": 0.0003}, sequence_length=4, seed=0)
