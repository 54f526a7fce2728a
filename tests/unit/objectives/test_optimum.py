"""The lowest loss of an objective equals the entropy of its labels under what is seen, by enumeration of all rows."""

import itertools
from collections import defaultdict

import numpy as np
import pytest

from raysweep.data.hmm import HMM
from raysweep.data.pcfg import PCFG
from raysweep.objectives import optimum
from raysweep.objectives.base import IGNORED, Specials
from raysweep.objectives.causal_lm import CausalLM
from raysweep.objectives.masked_lm import MaskedLM
from raysweep.objectives.mixture import Mixture
from raysweep.objectives.prefix_lm import PrefixLM
from raysweep.objectives.span_corruption import SpanCorruption
from raysweep.objectives.ul2 import UL2, Denoiser

CHAIN = HMM(num_words_total=2, num_states=2, num_permutations=2, sentence_length=7, emission_temperature=0.5)
GRAMMAR = PCFG(num_words_total=3, num_nonterminals=3, num_rules=2, num_words=2, sentence_length=4, temperature=0.5)
SPANS = SpanCorruption(name="span_corruption", density=0.5, mean_span_length=2.0)
TWO = (
    Denoiser(mode="R", density=0.5, mean_span_length=2.0),
    Denoiser(mode="X", density=0.6, mean_span_length=1.5),
    Denoiser(mode="S", density=0.4),
)
KEYS = ("input_ids", "labels")
OBJECTIVES = {
    "causal": [CausalLM()],
    "one": [MaskedLM(name="masked_lm", mask="one")],
    "masked": [MaskedLM(name="masked_lm", mask=0.5)],
    "prefix": [PrefixLM(name="prefix_lm", prefix=(0.3, 0.8))],
    "spans": [SPANS],
    # A row by any of several: each is made alone, and all count alike.
    "ul2": [UL2(name="ul2", denoisers=(each,)) for each in TWO],
    "mixture": [CausalLM(), SPANS, UL2(name="ul2", denoisers=TWO[:1])],
}
WHOLE = {
    "ul2": UL2(name="ul2", denoisers=TWO),
    "mixture": Mixture(
        name="mixture", objectives=dict(zip("abc", OBJECTIVES["mixture"], strict=True))
    ),
}  # fmt: skip


def specials_of(language, makers) -> Specials:
    tokens = dict.fromkeys(token for each in makers for token in each.extra_tokens())
    ids = {token: language.vocab_size + index for index, token in enumerate(tokens)}
    return Specials(ids, language.vocab_size, reserved=(0, *ids.values()), eos=0)


def sentences_of(language) -> np.ndarray:
    words = itertools.product(range(language.num_words_total), repeat=language.sentence_length)
    sentences = np.array(list(words))
    return sentences[np.exp(language.log_probability(sentences)) > 0]


def rows_of(language, maker, specials):
    """All rows that there can be: their probabilities, the text, inputs and labels."""
    probabilities, texts, inputs, labels = [], [], [], []
    sentences = sentences_of(language)
    for sentence, probability in zip(
        language.rows(sentences), np.exp(language.log_probability(sentences)), strict=True
    ):
        # By so many draws all ways to make rows of a sentence come up; all are equally likely.
        rows = maker.prepare(np.tile(sentence, (400, 1)), np.random.default_rng(0), specials)
        ways = {(tuple(row), tuple(label)) for row, label in zip(*(rows[key].tolist() for key in KEYS), strict=True)}
        for row, label in sorted(ways):
            probabilities.append(probability / len(ways))
            texts.append(sentence)
            inputs.append(row)
            labels.append(label)
    return np.array(probabilities), np.array(texts), dict(zip(KEYS, (np.array(inputs), np.array(labels)), strict=True))


def by_enumeration(makers, specials, made) -> float:
    """Lowest expected loss of a row, from the definition: -log p(label | what is seen there), of all rows together."""
    seen, both, labelled = defaultdict(float), defaultdict(float), []
    for maker, (probabilities, _, rows) in zip(makers, made, strict=True):
        for probability, row, labels in zip(probabilities, *(rows[key].tolist() for key in KEYS), strict=True):
            for place, label in enumerate(labels):
                if label != IGNORED and (maker.head == "masked" or place > 0):
                    context = (place, *(row if maker.head == "masked" else row[:place]))
                    seen[context] += probability
                    both[context, label] += probability
                    labelled.append((probability, context, label))
    total = sum(-probability * np.log(both[context, label] / seen[context]) for probability, context, label in labelled)
    return total / len(makers)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("language", [CHAIN, GRAMMAR], ids=lambda language: language.name)
def test_optimum_is_the_entropy_of_the_labels(language, name):
    makers = OBJECTIVES[name]
    specials = specials_of(language, makers)
    made = [rows_of(language, maker, specials) for maker in makers]
    # The objective as a whole is asked, whichever of its parts made a row.
    objective = WHOLE.get(name, makers[0])
    assert objective.has_optimum
    lowest = sum(
        probabilities @ objective.optimal_losses(language, texts, rows, specials) for probabilities, texts, rows in made
    ) / len(makers)
    assert lowest == pytest.approx(by_enumeration(makers, specials, made), rel=1e-9)


def test_of_too_many_ways_to_place_what_is_left_it_says_nothing(monkeypatch):
    specials = specials_of(CHAIN, [SPANS])
    ids = CHAIN.rows(CHAIN.sample(4, seed=0, stream=0)[0])
    rows = SPANS.prepare(ids, np.random.default_rng(0), specials)
    assert np.isfinite(SPANS.optimal_losses(CHAIN, ids, rows, specials)).all()
    monkeypatch.setattr(optimum, "MAX_WAYS", 2)
    assert np.isnan(SPANS.optimal_losses(CHAIN, ids, rows, specials)).all()


def test_bert_masking_has_no_optimum():
    assert not MaskedLM(name="masked_lm", replacement="80/10/10").has_optimum


def test_rows_that_are_not_the_text_have_no_optimum_of_its_law():
    """As those of an objective that reads a text backwards and inherits what is known of its base."""
    ids = sentences_of(GRAMMAR)[:4]
    backwards = {"input_ids": ids[:, ::-1], "labels": ids[:, ::-1]}
    for objective in (CausalLM(), MaskedLM(name="masked_lm")):
        with pytest.raises(ValueError, match=r"these rows are not the text.*write `optimal_losses`"):
            objective.optimal_losses(GRAMMAR, ids, backwards, Specials({}, 4))
