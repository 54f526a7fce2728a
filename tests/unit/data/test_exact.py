"""Languages of a known law: conditionals equal enumeration over all derivations, and samples follow them."""

import hashlib
import itertools

import numpy as np
import pytest
from pydantic import ValidationError

from raysweep.data import exact
from raysweep.data.corpora import read_law
from raysweep.data.draws import Choices, uniforms
from raysweep.data.exact import TASK, TRAIN, VALID
from raysweep.data.hmm import HMM
from raysweep.data.pcfg import PCFG
from raysweep.objectives.causal_lm import CausalLM

GRAMMAR = PCFG(num_words_total=3, num_nonterminals=3, num_rules=2, num_words=2, sentence_length=4, temperature=0.5)
CHAIN = HMM(num_words_total=3, num_states=3, num_permutations=2, sentence_length=4)
LANGUAGES = pytest.mark.parametrize("language", [GRAMMAR, CHAIN], ids=lambda language: language.name)
SENTENCES = np.array(list(itertools.product(range(3), repeat=4)))
# Of the words at places 1 and 2 (from 0) nothing is seen.
HIDDEN = np.tile([False, True, True, False], (len(SENTENCES), 1))


def by_trees(grammar: PCFG, sentence: tuple[int, ...]) -> float:
    """Probability of a sentence, summed over all trees."""
    laws = grammar._laws

    def inside(symbol: int, words: tuple[int, ...]) -> float:
        if len(words) == 1:
            return grammar.emissions[symbol, words[0]]
        half = len(words) // 2
        return sum(
            probability * inside(left, words[:half]) * inside(right, words[half:])
            for (left, right), probability in zip(laws.children[symbol], laws.rule_probs[symbol], strict=True)
        )

    return sum(laws.root[symbol] * inside(symbol, sentence) for symbol in range(grammar.num_nonterminals))


def by_paths(chain: HMM, sentence: tuple[int, ...]) -> float:
    """Probability of a sentence, summed over all sequences of states."""
    total = 0.0
    for states in itertools.product(range(chain.num_states), repeat=len(sentence)):
        moves = [chain.transitions[state, following] for state, following in itertools.pairwise(states)]
        words = [chain.emissions[state, word] for state, word in zip(states, sentence, strict=True)]
        total += np.prod(moves) * np.prod(words) / chain.num_states
    return total


def joint(language: PCFG | HMM) -> np.ndarray:
    """Probability of every sentence, [3, 3, 3, 3]."""
    enumerate_all = by_trees if isinstance(language, PCFG) else by_paths
    return np.array([enumerate_all(language, tuple(sentence)) for sentence in SENTENCES]).reshape(3, 3, 3, 3)


def by_summing(law: np.ndarray, place: int, seen: list[int]) -> np.ndarray:
    """p(word at `place` | the words at `seen`) of every sentence, [sentence, word], from the definition."""
    marginal = law.sum(axis=tuple({0, 1, 2, 3} - {place, *seen}), keepdims=True)
    rows = np.broadcast_to(np.moveaxis(marginal, place, -1), np.moveaxis(law, place, -1).shape)
    whole = np.moveaxis(np.broadcast_to(rows[..., None, :], (*rows.shape[:3], 3, 3)), 3, place).reshape(-1, 3)
    return whole / np.maximum(whole.sum(axis=1, keepdims=True), 1e-300)


@LANGUAGES
def test_sentences_have_the_probability_of_their_derivations(language):
    law = joint(language)
    assert law.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(np.exp(language.log_probability(SENTENCES)), law.ravel(), rtol=1e-11, atol=1e-15)


@LANGUAGES
@pytest.mark.parametrize(
    ("seen", "hidden", "others"),
    [
        ("before", None, lambda place: list(range(place))),
        ("around", None, lambda place: [other for other in range(4) if other != place]),
        ("around", HIDDEN, lambda place: [other for other in (0, 3) if other != place]),
        ("before", HIDDEN, lambda place: [other for other in (0, 3) if other < place]),
    ],
)
def test_conditionals_equal_enumeration(language, seen, hidden, others):
    law = joint(language)
    possible = law.ravel() > 0  # Under an impossible sentence anything may follow.
    probabilities = language.word_probabilities(SENTENCES, seen=seen, hidden=hidden)[possible]
    losses = language.word_losses(SENTENCES, seen=seen, hidden=hidden)[possible]
    for place in range(4):
        want = by_summing(law, place, others(place))[possible]
        np.testing.assert_allclose(probabilities[:, place], want, rtol=1e-11, atol=1e-14)
        own = np.take_along_axis(want, SENTENCES[possible][:, place, None], axis=1)[:, 0]
        np.testing.assert_allclose(losses[:, place], -np.log(own), rtol=1e-10, atol=1e-13)


def test_by_summing_is_the_definition():
    law = np.random.default_rng(0).random((3, 3, 3, 3))
    index = 1 * 27 + 2 * 9 + 0 * 3 + 1
    want = law[1, :, 0, :].sum(axis=1) / law[1, :, 0, :].sum()
    np.testing.assert_allclose(by_summing(law, 1, [0, 2])[index], want)


def test_what_cannot_be_has_no_probability():
    impossible = PCFG(num_words_total=9, num_nonterminals=2, num_rules=1, num_words=1, sentence_length=2)
    words = np.full((1, 2), np.flatnonzero(impossible.emissions.sum(axis=0) == 0)[0])
    assert impossible.log_probability(words) == -np.inf
    assert not impossible.word_probabilities(words, seen="around").any()


@LANGUAGES
def test_samples_follow_the_probabilities(language):
    words, _ = language.sample(40_000, seed=0, stream=TRAIN)
    counts = np.bincount(words @ (3 ** np.arange(4)[::-1]), minlength=81)
    expected = joint(language).ravel() * 40_000
    common = expected > 5
    # Chi-squared over the cells that are common enough: its mean is their number, its sd sqrt(2 n).
    chi = ((counts - expected) ** 2 / np.maximum(expected, 1e-9))[common].sum()
    assert chi < common.sum() + 5 * np.sqrt(2 * common.sum())
    assert counts[expected == 0].sum() == 0


@LANGUAGES
def test_mean_loss_of_samples_is_the_entropy(language):
    law = joint(language).ravel()
    entropy = -(law[law > 0] * np.log(law[law > 0])).sum()
    losses = -language.log_probability(language.sample(40_000, seed=0, stream=VALID)[0])
    assert abs(losses.mean() - entropy) < 4 * losses.std() / 200


@LANGUAGES
def test_streams_and_seeds_differ_and_repeat(language):
    first, _ = language.sample(50, seed=0, stream=TASK)
    again, _ = language.sample(50, seed=0, stream=TASK)
    other, _ = language.sample(50, seed=0, stream=VALID)
    assert (first == again).all()
    assert (first != other).any()


def test_a_part_is_a_part_of_the_whole():
    words, spans = GRAMMAR.sample(50, seed=1, stream=TASK)
    part, above = GRAMMAR.sample(50, seed=1, stream=TASK, part=slice(20, 33))
    np.testing.assert_array_equal(part, words[20:33])
    assert all((above[span] == nodes[20:33]).all() for span, nodes in spans.items())
    words, states = CHAIN.sample(50, seed=1, stream=TASK)
    part, own = CHAIN.sample(50, seed=1, stream=TASK, part=slice(20, 33))
    np.testing.assert_array_equal(part, words[20:33])
    np.testing.assert_array_equal(own, states[20:33])


@LANGUAGES
def test_a_corpus_is_written_in_parts(language, tmp_path, monkeypatch):
    language.build(tmp_path)
    written = np.fromfile(tmp_path / f"{language.name}.valid.bin", dtype=np.uint16)
    whole, _ = language.sample(language.num_valid_sentences, seed=0, stream=VALID)
    np.testing.assert_array_equal(written.reshape(-1, 5), language.rows(whole))
    meta = (tmp_path / "meta.json").read_text()
    monkeypatch.setattr(exact, "_WORDS", 400)
    language.build(tmp_path)
    np.testing.assert_array_equal(np.fromfile(tmp_path / f"{language.name}.valid.bin", dtype=np.uint16), written)
    assert (tmp_path / "meta.json").read_text() == meta
    assert read_law(tmp_path, CausalLM()) == language


@pytest.mark.parametrize(
    ("grammar", "digest"),
    [
        (PCFG(), "84fa333a3679d251"),
        (PCFG(num_words_total=16, num_nonterminals=4, num_rules=2, num_words=3, sentence_length=4), "fca96335440af05a"),
        (PCFG(num_rules=1, num_nonterminals=3, num_words=200), "f20854343cc6c43e"),
    ],
)
def test_sentences_of_a_grammar_stay_what_they_are(grammar, digest):
    """Stores hold such corpora: other sentences need a raised VERSION."""
    words, spans = grammar.sample(1000, seed=0, stream=TRAIN)
    parts = [words, *(nodes for _, nodes in sorted(spans.items()))]
    assert hashlib.sha256(b"".join(part.astype("<i8").tobytes() for part in parts)).hexdigest()[:16] == digest


def test_sentences_of_a_chain_stay_what_they_are():
    words, states = HMM().sample(1000, seed=0, stream=TRAIN)
    digest = hashlib.sha256(words.astype("<i8").tobytes() + states.astype("<i8").tobytes()).hexdigest()[:16]
    assert digest == "0cb14f9a553dcbd3"


def test_states_follow_the_transitions():
    _, states = CHAIN.sample(20_000, seed=0, stream=TRAIN)
    pairs = np.zeros((3, 3))
    np.add.at(pairs, (states[:, :-1], states[:, 1:]), 1)
    freely = pairs / pairs.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(freely, CHAIN.transitions, atol=4 * 0.5 / 20_000**0.5)
    np.testing.assert_allclose(CHAIN.transitions.sum(axis=0), 1, rtol=1e-12)  # So the uniform law stays.


@LANGUAGES
def test_long_sentences_do_not_underflow(language):
    long = type(language)(sentence_length=512)
    words, _ = long.sample(2, seed=0, stream=TRAIN)
    for seen in ("before", "around"):
        assert np.isfinite(long.word_losses(words, seen=seen)).all()


def test_choices_are_inversions_of_the_cumulative_law():
    draw = np.random.default_rng(0)
    for outcomes in (1, 2, 5, 8, 33):
        law = draw.dirichlet(np.ones(outcomes), size=7)
        rows, uniform = draw.integers(7, size=(3, 100)), draw.random((3, 100))
        want = (uniform[..., None] * law.sum(axis=1)[rows, None] >= np.cumsum(law, axis=1)[rows]).sum(axis=-1)
        np.testing.assert_array_equal(Choices.of(law).draw(rows, uniform), want.clip(max=outcomes - 1))


def test_uniforms_are_numpys():
    np.testing.assert_array_equal(uniforms([3, 1], 10, (2, 5)).ravel(), np.random.default_rng([3, 1]).random(20)[10:])


@pytest.mark.parametrize(
    ("corpus", "change", "words"),
    [
        (PCFG, {"sentence_length": 12}, "power of two"),
        (PCFG, {"num_words": 300}, "more than the vocabulary"),
        (PCFG, {"num_rules": 5, "num_nonterminals": 2}, "only 4 pairs"),
        (PCFG, {"num_words_total": 1_000_000, "num_nonterminals": 101}, "num_nonterminals x vocabulary is 101,000,000"),
        (HMM, {"num_words_total": 1_000_000, "num_states": 101}, "num_states x vocabulary is 101,000,000"),
    ],
)
def test_impossible_language(corpus, change, words):
    with pytest.raises(ValidationError, match=words):
        corpus(**change)
