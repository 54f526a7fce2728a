"""The grammar: its probabilities are exact, its samples follow them, its streams do not meet."""

import itertools

import numpy as np
import pytest
from pydantic import ValidationError

from raysweep.data.pcfg import PCFG, TASK, TRAIN, VALID

TINY = PCFG(num_words_total=3, num_nonterminals=2, num_rules=2, num_words=2, sentence_length=4)


def by_enumeration(grammar: PCFG, sentence: tuple[int, ...]) -> float:
    """Probability of a sentence, summed over all derivations."""
    root, children, rule_probs, emissions = grammar._laws

    def inside(symbol: int, words: tuple[int, ...]) -> float:
        if len(words) == 1:
            return emissions[symbol, words[0]]
        half = len(words) // 2
        return sum(
            probability * inside(left, words[:half]) * inside(right, words[half:])
            for (left, right), probability in zip(children[symbol], rule_probs[symbol], strict=True)
        )

    return sum(root[symbol] * inside(symbol, sentence) for symbol in range(grammar.num_nonterminals))


def test_inside_equals_enumeration_and_sums_to_one():
    sentences = np.array(list(itertools.product(range(3), repeat=4)))
    probabilities = np.exp(TINY.log_probability(sentences))
    want = [by_enumeration(TINY, tuple(sentence)) for sentence in sentences]
    np.testing.assert_allclose(probabilities, want, rtol=1e-12)
    assert probabilities.sum() == pytest.approx(1, abs=1e-12)


def test_samples_follow_the_probabilities():
    words, spans = TINY.sample(40_000, seed=0, stream=TRAIN)
    codes = words @ (3 ** np.arange(4)[::-1])
    sentences = np.array(list(itertools.product(range(3), repeat=4)))
    expected = np.exp(TINY.log_probability(sentences)) * 40_000
    counts = np.bincount(codes, minlength=81)
    seen = expected > 5
    # Chi-squared over the cells that are common enough: its mean is their number, its sd sqrt(2 n).
    chi = ((counts - expected) ** 2 / np.maximum(expected, 1e-9))[seen].sum()
    assert chi < seen.sum() + 5 * np.sqrt(2 * seen.sum())
    assert counts[expected == 0].sum() == 0
    assert sorted(spans) == [1, 2, 4]
    assert spans[2].shape == (40_000, 2)


def test_streams_and_seeds_differ_and_repeat():
    first, _ = TINY.sample(50, seed=0, stream=TASK)
    again, _ = TINY.sample(50, seed=0, stream=TASK)
    other, _ = TINY.sample(50, seed=0, stream=VALID)
    assert (first == again).all()
    assert (first != other).any()


def test_long_sentences_do_not_underflow():
    grammar = PCFG(sentence_length=512, num_words_total=200)
    words, _ = grammar.sample(2, seed=0, stream=TRAIN)
    assert np.isfinite(grammar.log_probability(words)).all()
    assert grammar.log_probability(np.full((1, 512), 0))[0] <= 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sentence_length": 12}, "power of two"),
        ({"num_words": 300}, "more than the vocabulary"),
        ({"num_rules": 5, "num_nonterminals": 2}, "only 4 pairs"),
    ],
)
def test_impossible_grammar(change, words):
    with pytest.raises(ValidationError, match=words):
        PCFG(**change)
