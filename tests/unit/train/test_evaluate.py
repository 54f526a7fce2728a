"""Held-out losses: the mean is over what is predicted, the gap to the optimum has the error of a ratio."""

import copy
import math

import numpy as np
import pytest
import torch
from tiny_models import build

from raysweep.data.hmm import HMM
from raysweep.objectives.base import IGNORED, MASK, Specials
from raysweep.objectives.causal_lm import CausalLM
from raysweep.objectives.masked_lm import MaskedLM
from raysweep.train.evaluate import BATCH, HeldoutLosses, divergence, heldout, heldout_once


def test_mean_is_over_predicted_tokens():
    assert HeldoutLosses(np.array([6.0, 2.0]), np.array([3, 1])).mean == 2.0
    assert math.isnan(HeldoutLosses(np.array([0.0]), np.array([0])).mean)
    assert math.isnan(HeldoutLosses(np.array([np.inf]), np.array([1])).mean)


def test_gap_is_the_loss_above_the_optimum():
    optimum = np.ones(2 * BATCH + 3)
    counts = np.array([BATCH, BATCH, 3])
    losses = counts * 1.0 + np.array([1.0, 3.0, -0.5])
    gap, stderr = HeldoutLosses(losses, counts).above(optimum)
    assert gap == pytest.approx(3.5 / (2 * BATCH + 3))
    left = np.array([1.0, 3.0, -0.5]) - gap * counts
    assert stderr == pytest.approx(math.sqrt(3 / 2 * (left**2).sum()) / (2 * BATCH + 3))
    assert math.isnan(HeldoutLosses(losses[:1], counts[:1]).above(optimum[:BATCH])[1])


def test_error_of_a_gap_is_its_spread_over_draws():
    draw = np.random.default_rng(0)
    gaps, errors = [], []
    for _ in range(500):
        counts = draw.integers(1, 20, size=16)
        optimum = draw.exponential(size=(16, BATCH))
        noise = np.array([draw.normal(0.1, 0.5, size=num).sum() for num in counts])
        gap, stderr = HeldoutLosses(optimum.sum(axis=1) + noise, counts).above(optimum.ravel())
        gaps.append(gap)
        errors.append(stderr)
    # 500 draws know the spread to 3 %; that of 16 batches is a few per cent low, as a ratio's is.
    assert np.mean(gaps) == pytest.approx(0.1, abs=4 * np.std(gaps) / 500**0.5)
    assert np.mean(errors) == pytest.approx(np.std(gaps), rel=0.12)


@pytest.mark.parametrize("objective", [CausalLM(), MaskedLM(name="masked_lm", mask=0.5)], ids=lambda each: each.name)
def test_a_divergence_is_the_mean_gap_of_all_texts_with_their_probabilities(objective):
    """Of every sentence there is: sum over them of p(sentence) (loss - lowest loss), by the objective's own losses."""
    corpus = HMM(vocabulary=3, num_states=2, sentence_length=3)
    words = np.array(list(np.ndindex(3, 3, 3)))
    ids, weights = corpus.rows(words), np.exp(corpus.log_probability(words))
    specials = Specials({MASK: 4} if objective.head == "masked" else {}, num_text_tokens=4, reserved=(0, 4))
    rows = objective.prepare(ids, np.random.default_rng(0), specials)
    if objective.head == "masked":  # The same places of every sentence, so that all that is visible comes as it should.
        hidden = np.array([False, True, False, True])
        rows = {"input_ids": np.where(hidden, 4, ids), "labels": np.where(hidden, ids, IGNORED)}
    model = build("llama" if objective.head == "causal" else "bert", vocab=9)
    num, wanted = 0.0, 0.0
    for row, weight in enumerate(weights):
        one = {name: values[row : row + 1] for name, values in rows.items()}
        loss = float(objective.loss_sum(model, {name: torch.from_numpy(part) for name, part in one.items()}).double())
        lowest = objective.optimal_losses(corpus, ids[row : row + 1], one, specials)
        wanted += weight * (loss - float(lowest[0]))
        num += weight * objective.num_predicted(one)
    # Each sentence as often as it comes, of ten thousand: rounded, so that shares are off by 1e-4 of one.
    often = np.repeat(np.arange(27), np.round(weights * 10_000).astype(int))
    given = {name: values[often] for name, values in rows.items()}
    gap, stderr = divergence(model, given, objective, law=corpus, ids=ids[often])
    assert gap == pytest.approx(wanted / num, rel=2e-3)
    assert 0 < stderr < 0.05 * gap
    # The same by labels, with their chance, which is larger.
    by_labels = heldout(model, given, objective).above(objective.optimal_losses(corpus, ids[often], given, specials))
    assert by_labels[0] == pytest.approx(gap, rel=2e-3)


def test_losses_that_are_known_take_no_pass_and_anything_else_does():
    model, passes = build("llama"), []
    model.register_forward_hook(lambda *_: passes.append(1))
    ids = np.random.default_rng(5).integers(0, 23, (20, 6))
    rows = CausalLM().prepare(ids, np.random.default_rng(0), Specials({}, num_text_tokens=23))

    def losses(of, rows=rows):
        passes.clear()
        return heldout_once(of, rows, CausalLM()).losses.tolist()

    first = losses(model)
    assert len(passes) == 2
    assert losses(model) == first
    assert not passes
    # Of another copy of the same model as well, but of nothing that differs.
    assert losses(copy.deepcopy(model)) == first
    assert not passes
    other = {name: np.roll(values, 1, axis=0) for name, values in rows.items()}
    assert losses(model, rows=other) == heldout(model, other, CausalLM()).losses.tolist() != first
    with torch.no_grad():
        model.lm_head.weight[3, 3] += 1e-3
    assert losses(model) == heldout(model, rows, CausalLM()).losses.tolist() != first
    model.config.rms_norm_eps = 0.5
    assert losses(model) is not None
    assert len(passes) == 2
