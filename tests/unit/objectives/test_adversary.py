"""The adversary: its labels, its penalty by a naive reference, its control, and a training that goes on to the bit."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny import pretrain, recipe_of, tokens_of
from tiny_models import build

from raysweep.data.hmm import HMM
from raysweep.data.pcfg import PCFG
from raysweep.declared import Declared
from raysweep.errors import StageError
from raysweep.objectives.adversary import LABELS, MAX_STATES, Adversary
from raysweep.objectives.base import IGNORED
from raysweep.objectives.causal_lm import CausalLM
from raysweep.objectives.masked_lm import MaskedLM
from raysweep.search import Grid
from raysweep.stages.pretrain import Pretrain

CHAIN = HMM(vocabulary=5, num_states=3, sentence_length=4, num_train_sentences=300, num_valid_sentences=20)
TREES = PCFG(vocabulary=7, num_nonterminals=3, num_rules=2, num_words=3, sentence_length=4)
ONE_MASK = MaskedLM(name="masked_lm", mask="one")


@pytest.mark.parametrize("corpus", [CHAIN, TREES], ids=["hmm", "pcfg"])
def test_labels_are_as_likely_as_they_come_with_their_sentence(corpus):
    """Of the commonest sentence, drawn often: the share of its sentences with each symbol at each place."""
    words, symbols = corpus.sample(60_000, seed=3, stream=0)
    above = symbols if isinstance(symbols, np.ndarray) else np.concatenate(list(symbols.values()), axis=1)
    rows, index, counts = np.unique(words, axis=0, return_inverse=True, return_counts=True)
    here = above[index.ravel() == counts.argmax()]
    probabilities = corpus.label_probabilities(corpus.rows(rows[[counts.argmax()]]))[0]
    assert probabilities.shape == (above.shape[1], probabilities.shape[1])
    for place, given in enumerate(probabilities):
        shares = np.bincount(here[:, place], minlength=len(given)) / len(here)
        # Four standard errors of a share of one half, the widest.
        np.testing.assert_allclose(shares, given, atol=4 * 0.5 / len(here) ** 0.5)


def batch_of(seed, objective):
    ids = CHAIN.rows(CHAIN.sample(8, seed=seed, stream=0)[0])
    labels = ids.copy()
    if objective.head == "masked":
        labels[:] = IGNORED
        labels[:, 2] = ids[:, 2]
    rows = {"input_ids": ids, "labels": labels}
    rows |= objective.from_law(CHAIN, ids, rows)
    return {name: torch.from_numpy(values) for name, values in rows.items()}


def naive_r2(states, labels, earlier, *, decay, ridge):
    """By weighted least squares on all rows of earlier batches, with rows of zeros' targets for the ridge."""
    weights = np.concatenate([np.full(len(h), decay**age) for age, (h, _) in enumerate(reversed(earlier))])
    past = np.concatenate([h for h, _ in reversed(earlier)])
    said = np.concatenate([y.reshape(len(y), -1) for _, y in reversed(earlier)])
    weights /= weights.sum()
    mean, label_mean = weights @ past, weights @ said
    centred = past - mean
    strength = ridge * (weights @ centred**2).mean()
    size = past.shape[1]
    tall = np.concatenate([centred * weights[:, None] ** 0.5, strength**0.5 * np.eye(size)])
    wanted = np.concatenate([(said - label_mean) * weights[:, None] ** 0.5, np.zeros((size, said.shape[1]))])
    slope = torch.from_numpy(np.linalg.lstsq(tall, wanted, rcond=None)[0])
    predicted = torch.from_numpy(label_mean) + (states - torch.from_numpy(mean)) @ slope
    error = variance = 0.0
    for place in range(labels.shape[1]):
        for symbol in range(labels.shape[2]):
            column = predicted[:, place * labels.shape[2] + symbol]
            share, p = label_mean[place * labels.shape[2] + symbol], torch.from_numpy(labels[:, place, symbol])
            error = error + (p * (1 - column) ** 2 + (1 - p) * column**2).mean()
            variance += share * (1 - share) ** 2 + (1 - share) * share**2
    return 1 - error / variance


@pytest.mark.parametrize("strength", [-0.3, 0.7])
@pytest.mark.parametrize(("style", "of"), [("llama", CausalLM()), ("bert", ONE_MASK)])
def test_the_penalty_is_that_of_a_naive_reference(style, of, strength):
    objective = Adversary(name="adversary", strength=strength, of=of, decay=0.8, ridge=0.05)
    learning, earlier, last_r2 = objective.learning(), [], 0.0
    model = build(style).double()
    for step in range(4):
        # Weights move between steps, as they do in training.
        with torch.no_grad():
            next(model.parameters()).mul_(1.05)
        batch = batch_of(step, objective)
        model.zero_grad()
        for rows in (slice(0, 5), slice(5, 8)):  # Micro-batches.
            (learning.loss_sum(model, {name: part[rows] for name, part in batch.items()}) / 8).backward()
        found = torch.cat([parameter.grad.flatten().clone() for parameter in model.parameters()])
        model.zero_grad()
        wanted = of.loss_sum(model, batch) / 8
        states = model.base_model(input_ids=batch["input_ids"]).last_hidden_state.flatten(1)
        r2 = 0.0
        if earlier:
            r2 = naive_r2(states, batch[LABELS].numpy(), earlier, decay=0.8, ridge=0.05)
            num_predicted = 4 if of.head == "causal" else 1
            wanted = wanted + strength * r2 * num_predicted * (strength < 0 or last_r2 > 0)
        wanted.backward()
        # float64, but for Llama's norms, which are taken in float32.
        torch.testing.assert_close(
            found, torch.cat([parameter.grad.flatten() for parameter in model.parameters()]), rtol=1e-4, atol=1e-6
        )
        earlier.append((states.detach().numpy(), batch[LABELS].numpy()))
        last_r2 = float(r2)
        learning.end_step(lambda tensor: tensor)


def trained(tmp_path, out, *, step=20, state=None, **objective):
    recipe = recipe_of(CHAIN, steps=20, batch_sequences=16, objective=objective or {"name": "causal_lm"})
    out = tmp_path / out
    pretrain(recipe, tmp_path / "tokens", out, step=step, state=state)
    return (out / "model.safetensors").read_bytes(), (out / "objective.json").read_text()


def test_the_control_is_the_objective_to_the_bit(tmp_path):
    tokens_of(CHAIN, tmp_path / "tokens")
    plain = trained(tmp_path, "plain")
    assert trained(tmp_path, "control", name="adversary", strength=0.0) == plain
    other = trained(tmp_path, "other", name="adversary", strength=0.5)
    assert other[0] != plain[0]
    assert other[1] == plain[1]  # Whoever measures it measures the loss that is kept.


def test_a_training_that_goes_on_is_one_without_a_break(tmp_path):
    tokens_of(CHAIN, tmp_path / "tokens")
    given = {"name": "adversary", "strength": -0.5}
    whole = trained(tmp_path, "whole", **given)
    trained(tmp_path, "half", step=11, state=tmp_path / "state", **given)
    assert trained(tmp_path, "rest", state=tmp_path / "state", **given) == whole


def test_it_is_refused_where_no_labels_are_known():
    sampled = {"name": "sampled", "model": "./m", "sequence_length": 5, "num_train_sequences": 9, "vocab_size": 9}
    with pytest.raises(ValidationError, match="reads the labels of a language of a known law, and data is sampled"):
        recipe_of(
            sampled,
            objective={"name": "adversary", "strength": 0.1},
        )


def test_states_that_are_too_many_are_refused():
    learning = Adversary(name="adversary", strength=0.1).learning()
    with pytest.raises(StageError, match="the states of a row are 8,192 numbers"):
        learning._see(torch.zeros(1, MAX_STATES + 1), torch.zeros(1, 3), torch.ones(1))


def test_checkpoints_of_all_strengths_compare_by_the_loss_that_is_kept():
    spec = Pretrain(recipe=recipe_of(CHAIN, objective={"name": "adversary", "strength": 0.1}), seed=0, step=12)
    assert spec.recipe.objective.measured == CausalLM()


def test_an_axis_over_strengths_gets_its_control():
    given = {"name": "doses", "pretrain": recipe_of(CHAIN, objective={"name": "adversary", "strength": 0.1})}
    path = "pretrain.phases.harm.objective.strength"
    for values, wanted in [((0.1, -0.1), (0.1, -0.1, 0.0)), ((0, 0.1), (0, 0.1))]:
        assert Declared(**given, sweep={path: Grid(grid=values)}).sweep[path] == Grid(grid=wanted)
    other = {"pretrain.optimizer.lr": Grid(grid=(0.1, 0.2))}
    assert Declared(**given, sweep=other).sweep == other
