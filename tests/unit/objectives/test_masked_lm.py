"""Masked language modelling: worked examples, and a naive reference written from the definition."""

import numpy as np
import pytest
from pydantic import ValidationError

from raysweep.objectives.base import IGNORED, MASK, Specials
from raysweep.objectives.masked_lm import MaskedLM

SPECIALS = Specials({MASK: 50}, 50, reserved=(0, 50), eos=0, pad=0)


def text(num=400, length=20, seed=0):
    ids = np.random.default_rng(seed).integers(1, 50, size=(num, length))
    ids[:, 0] = 0  # The token that opens a sentence.
    return ids


def prepare(objective, ids, seed=0):
    rows = objective.prepare(ids, np.random.default_rng(seed), SPECIALS)
    return rows["input_ids"], rows["labels"]


def test_one_of_a_sentence_is_hidden():
    ids = np.array([[0, 7, 8, 9]])
    seen = set()
    for seed in range(50):
        inputs, labels = prepare(MaskedLM(name="masked_lm", mask="one"), ids, seed)
        [place] = np.nonzero(labels[0] != IGNORED)[0]
        assert inputs[0].tolist() == [50 if at == place else ids[0, at] for at in range(4)]
        assert labels[0, place] == ids[0, place]
        seen.add(int(place))
    assert seen == {1, 2, 3}, "each word, and never the token that opens the sentence"


@pytest.mark.parametrize(("part", "num"), [(0.15, 3), (0.3, 6), (0.01, 1), (0.99, 19)])
def test_so_many_are_hidden_in_every_row(part, num):
    """Of 19 words and the opening token: 2.85, 5.7, 0.19 and 18.81."""
    inputs, labels = prepare(MaskedLM(name="masked_lm", mask=part), text())
    assert ((labels != IGNORED).sum(axis=1) == num).all()
    assert ((inputs == 50) == (labels != IGNORED)).all()
    assert (labels[:, 0] == IGNORED).all()


def test_every_place_is_hidden_as_often():
    _, labels = prepare(MaskedLM(name="masked_lm", mask=0.3), text(num=4000))
    counts = (labels[:, 1:] != IGNORED).sum(axis=0)
    # 6 of 19 places: 1263 of 4000 expected, standard deviation 29
    assert np.abs(counts - 4000 * 6 / 19).max() < 4 * 30


def test_the_naive_reference():
    """From the definition of BERT, with the same numbers drawn: a loop over places."""
    objective, ids = MaskedLM(name="masked_lm", mask=0.5, replacement="80/10/10"), text(num=50)
    draw = np.random.default_rng(3)
    keys, chance, words = draw.random(ids.shape), draw.random(ids.shape), draw.integers(49, size=ids.shape)
    want_inputs, want_labels = ids.copy(), np.full_like(ids, IGNORED)
    for row in range(len(ids)):
        places = [at for at in range(20) if ids[row, at] != 0]
        hidden = sorted(places, key=lambda at: keys[row, at])[: max(1, round(0.5 * len(places)))]
        for at in hidden:
            want_labels[row, at] = ids[row, at]
            if chance[row, at] < 0.8:
                want_inputs[row, at] = 50
            elif chance[row, at] < 0.9:
                want_inputs[row, at] = 1 + words[row, at]
    inputs, labels = prepare(objective, ids, seed=3)
    assert np.array_equal(labels, want_labels)
    assert np.array_equal(inputs, want_inputs)


def test_the_shares_of_bert():
    ids = text(num=4000)
    inputs, labels = prepare(MaskedLM(name="masked_lm", mask=0.5, replacement="80/10/10"), ids)
    hidden = labels != IGNORED
    masked, same = (inputs == 50)[hidden].mean(), (inputs == ids)[hidden].mean()
    # 40,000 draws: standard deviation 0.002; one replacement in 49 is the token itself
    assert masked == pytest.approx(0.8, abs=0.008)
    assert same == pytest.approx(0.1 + 0.1 / 49, abs=0.008)
    assert inputs[hidden].min() == 1, "no special token is put in a word's place"
    assert (inputs == ids)[~hidden].all()


def test_a_row_of_special_tokens_alone_has_nothing_to_predict():
    _, labels = prepare(MaskedLM(name="masked_lm"), np.zeros((2, 5), np.int64))
    assert (labels == IGNORED).all()


def test_a_part_is_a_part():
    with pytest.raises(ValidationError, match="less than 1"):
        MaskedLM(name="masked_lm", mask=1.5)
