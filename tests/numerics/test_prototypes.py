"""Likelihoods of classes by distances to means of a few examples: calibrated, of any scale, in any dimension."""

import math

import pytest
import torch
from scipy.optimize import minimize_scalar

from raysweep.tasks.prototypes import fitted_temperature

NUM_CLASSES, NUM_SHOTS = 5, 3
LABELS = torch.arange(NUM_CLASSES).repeat_interleave(NUM_SHOTS)


def drawn(labels, *, num_dims, distance, seed=0):
    """Classes some distance apart, and noise of as much in each direction but one, which has ten times as much."""
    draw = torch.Generator().manual_seed(seed)
    centres = distance * torch.eye(NUM_CLASSES, num_dims).double()[labels]
    noise = torch.randn(len(labels), num_dims, generator=draw).double()
    noise[:, -1] *= 10
    return centres + noise


def naive(states, labels):
    """Of the likelihood of smoothed targets, written out for classes of as many examples each."""
    rows = []
    for place in range(NUM_SHOTS):
        kept = [at for at in range(len(labels)) if at % NUM_SHOTS != place]
        for at in range(place, len(labels), NUM_SHOTS):
            means = [
                torch.stack([states[k] for k in kept if labels[k] == label]).mean(dim=0) for label in range(NUM_CLASSES)
            ]
            rows.append((torch.stack([(states[at] - mean).square().sum() for mean in means]), int(labels[at])))
    right, other = (len(rows) + 1) / (len(rows) + NUM_CLASSES), 1 / (len(rows) + NUM_CLASSES)

    def cost(t):
        parts = ((t * squares + (-t * squares).logsumexp(dim=0), label) for squares, label in rows)
        return sum(float(other * part.sum() + (right - other) * part[label]) for part, label in parts)

    return minimize_scalar(cost, bounds=(0, 10), options={"xatol": 1e-9}).x


@pytest.mark.parametrize("distance", [1.5, 4.0, 30.0])
def test_the_temperature_is_that_of_a_naive_search(distance):
    states = drawn(LABELS, num_dims=8, distance=distance)
    found = fitted_temperature(states, LABELS)
    assert found == pytest.approx(naive(states, LABELS), rel=1e-4, abs=1e-6)
    # However the examples are sorted, and in another unit.
    order = torch.arange(len(LABELS)).view(NUM_CLASSES, NUM_SHOTS).T.flatten()
    assert fitted_temperature(states[order], LABELS[order]) == pytest.approx(found, rel=1e-9)
    assert 49 * fitted_temperature(7 * states, LABELS) == pytest.approx(found, rel=1e-9)


@pytest.mark.parametrize("distance", [0.0, 2.0, 8.0, 100.0])
def test_likelihoods_are_not_far_below_chance_in_many_dimensions(distance):
    """Those of normal classes of one variance are, by tens of nats: noise in one direction tells of no class."""
    asked = torch.arange(NUM_CLASSES).repeat(100)
    every = []
    for seed in range(10):
        both = drawn(torch.cat([LABELS, asked]), num_dims=768, distance=distance, seed=seed)
        states, others = both[: len(LABELS)], both[len(LABELS) :]
        means = states.view(NUM_CLASSES, NUM_SHOTS, -1).mean(dim=1)
        logits = -fitted_temperature(states, LABELS) * torch.cdist(others, means).square()
        every.append(float(logits.log_softmax(dim=1)[range(len(asked)), asked].mean()))
    mean, chance = sum(every) / len(every), -math.log(NUM_CLASSES)
    assert min(every) > chance - 1
    assert mean > chance - 0.3
    if distance == 100.0:  # All are told apart: as sure as 15 examples and a class once more each let it be.
        assert mean > -0.4


def test_classes_of_one_example_and_states_that_tell_nothing():
    states = torch.tensor([[0.0], [1.0], [4.0], [5.0]])
    assert math.isnan(fitted_temperature(states, torch.arange(4)))  # Nothing is left when one is left out.
    assert fitted_temperature(states, torch.tensor([0, 0, 1, 2])) > 0  # Two of one class are enough.
    assert fitted_temperature(torch.zeros(4, 3), torch.tensor([0, 0, 1, 1])) == 0
    assert fitted_temperature(states, torch.tensor([0, 1, 1, 0])) == 0  # Of the wrong class is what is near.
    assert math.isnan(fitted_temperature(states * math.nan, torch.tensor([0, 0, 1, 1])))
