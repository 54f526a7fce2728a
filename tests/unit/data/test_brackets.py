"""The bracket language: its conditionals equal enumeration over all sentences, and samples and labels follow it."""

import hashlib
import itertools
import math

import numpy as np
import pytest
from pydantic import ValidationError

from raysweep.data.brackets import Brackets
from raysweep.data.exact import TASK, TRAIN
from raysweep.data.hmm import HMM
from raysweep.errors import SpaceError
from raysweep.tasks.balance import BracketBalance

LANGUAGE = Brackets(name="brackets", num_words_total=4, sentence_length=4, beta=0.7)
SENTENCES = np.array(list(itertools.product(range(4), repeat=4)))


def signs(words: np.ndarray, num_words: int = 4) -> np.ndarray:
    """+1 for an opening word, -1 for a closing one."""
    return np.where(words < num_words // 2, 1, -1)


def joint() -> np.ndarray:
    """Probability of every sentence by the law's own words, [4, 4, 4, 4]."""
    weights = np.exp(-0.7 * signs(SENTENCES).sum(axis=1) ** 2 / 4)
    return (weights / weights.sum()).reshape(4, 4, 4, 4)


def test_sentences_have_the_probability_of_the_law():
    np.testing.assert_allclose(np.exp(LANGUAGE.log_probability(SENTENCES)), joint().ravel(), rtol=1e-12)


@pytest.mark.parametrize("seen", ["before", "around"])
@pytest.mark.parametrize("hides", [False, True])
def test_conditionals_equal_enumeration(seen, hides):
    # Of the words at places 1 and 2 (from 0) nothing is seen.
    hidden = np.tile([False, hides, hides, False], (len(SENTENCES), 1))
    probabilities = LANGUAGE.word_probabilities(SENTENCES, seen=seen, hidden=hidden)
    np.testing.assert_allclose(probabilities.sum(axis=-1), 1, rtol=1e-12)
    for place in range(4):
        visible = [at for at in range(4) if at != place and not (hides and at in (1, 2))]
        visible = [at for at in visible if seen == "around" or at < place]
        marginal = joint().sum(axis=tuple({0, 1, 2, 3} - {place, *visible}), keepdims=True)
        rows = np.moveaxis(np.broadcast_to(marginal, (4, 4, 4, 4)), place, -1)
        whole = np.moveaxis(np.broadcast_to(rows[..., None, :], (4, 4, 4, 4, 4)), 3, place).reshape(-1, 4)
        np.testing.assert_allclose(probabilities[:, place], whole / whole.sum(axis=1, keepdims=True), rtol=1e-12)


def test_of_one_word_the_logit_is_minus_beta_times_the_sum_of_the_others():
    probabilities = LANGUAGE.word_probabilities(SENTENCES, seen="around")
    opens = probabilities[..., :2].sum(axis=-1)
    others = signs(SENTENCES).sum(axis=1, keepdims=True) - signs(SENTENCES)
    np.testing.assert_allclose(np.log(opens / (1 - opens)), -0.7 * others, rtol=1e-12)


def test_samples_follow_the_law():
    words, types = LANGUAGE.sample(40_000, seed=0, stream=TRAIN)
    np.testing.assert_array_equal(types, words >= 2)
    counts = np.bincount(words @ (4 ** np.arange(4)[::-1]), minlength=256)
    expected = joint().ravel() * 40_000
    # Chi-squared: its mean is the number of cells, its sd sqrt(2 n).
    assert ((counts - expected) ** 2 / expected).sum() < 256 + 5 * math.sqrt(512)


def test_a_part_is_a_part_of_the_whole():
    words, types = LANGUAGE.sample(50, seed=1, stream=TASK)
    part, above = LANGUAGE.sample(50, seed=1, stream=TASK, part=slice(20, 33))
    np.testing.assert_array_equal(part, words[20:33])
    np.testing.assert_array_equal(above, types[20:33])


def test_sentences_of_a_bracket_language_stay_what_they_are():
    """Stores hold such corpora: other sentences need a raised VERSION."""
    words, _ = Brackets(name="brackets").sample(1000, seed=0, stream=TRAIN)
    assert hashlib.sha256(words.astype("<i8").tobytes()).hexdigest()[:16] == "fbb4b0d8cef88bd9"


def test_long_sentences_do_not_underflow():
    long = Brackets(name="brackets", sentence_length=64)
    words, _ = long.sample(2, seed=0, stream=TRAIN)
    for seen in ("before", "around"):
        assert np.isfinite(long.word_losses(words, seen=seen)).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_words_total": 5}, "vocabulary 5: half of the words open"),
        ({"sentence_length": 5}, "no odd number of brackets is balanced"),
        ({"sentence_length": 200}, "is 5000: sentences of one type would have no probability"),
    ],
)
def test_impossible_language(change, words):
    with pytest.raises(ValidationError, match=words):
        Brackets(name="brackets", **change)


@pytest.mark.parametrize("label", ["unbalanced", "majority"])
def test_labels_are_those_of_the_words_but_the_last(label):
    task = BracketBalance(form="bracket_balance", label=label, num_train=101).bind(Brackets(name="brackets"))
    ids, labels = task.examples("train")
    balance = signs(ids[:, 1:-1] - 1, 24).sum(axis=1)
    np.testing.assert_array_equal(labels, np.abs(balance) >= 3 if label == "unbalanced" else balance > 0)
    # As many of each of all 1,401: of 101 of them within three standard deviations, and of every second one, too.
    assert abs(labels.mean() - 0.5) < 0.15
    assert abs(labels[::2].mean() - 0.5) < 0.22
    assert len(set(task.ids("train"))) == 101


def test_labels_need_the_language():
    task = BracketBalance(form="bracket_balance", label="majority")
    with pytest.raises(SpaceError, match=r"needs pretrain\.data brackets, not hmm"):
        task.bind(HMM())
    with pytest.raises(SpaceError, match="no single bracket is unbalanced"):
        task.bind(Brackets(name="brackets", sentence_length=2))
