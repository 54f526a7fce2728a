"""Soft targets: the gradient is the mean of the labelled loss's over labels, and an exact solution has none."""

import numpy as np
import pytest
import torch
from bracket_theory import all_contexts
from pydantic import ValidationError
from tiny import pretrain, recipe_of, tokens_of
from tiny_models import build

from raysweep.data.brackets import Brackets
from raysweep.data.hmm import HMM
from raysweep.objectives.causal_lm import CausalLM
from raysweep.objectives.masked_lm import MaskedLM
from raysweep.objectives.soft_targets import TARGETS, SoftTargets
from raysweep.train.checkpoints import load_model
from raysweep.train.one_layer import LookUp, OneLayer
from raysweep.train.optimizers import SGD

CHAIN = HMM(vocabulary=5, num_states=3, sentence_length=4)
BRACKETS = Brackets(name="brackets", num_words_total=8, num_train_sentences=400, num_valid_sentences=40)
ONE_MASK = MaskedLM(name="masked_lm", mask="one")


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


@pytest.mark.parametrize("of", [CausalLM(), ONE_MASK], ids=lambda of: of.name)
def test_the_gradient_is_the_mean_over_labels(of):
    """One place is predicted: its label takes every word, each by its probability."""
    objective = SoftTargets(name="soft_targets", of=of)
    model = build("llama" if of.head == "causal" else "bert", vocab=7)
    ids = CHAIN.rows(CHAIN.sample(1, seed=0, stream=0)[0])
    shown, labels = ids.copy(), np.full_like(ids, -100)
    labels[:, 2] = ids[:, 2]
    if of.head == "masked":
        shown[:, 2] = 6
    rows = {"input_ids": shown, "labels": labels}
    rows |= objective.from_law(CHAIN, ids, rows)
    assert rows[TARGETS].dtype == np.float32
    np.testing.assert_allclose(rows[TARGETS][0, 2].sum(), 1, rtol=1e-6)
    batch = {name: torch.from_numpy(values) for name, values in rows.items()}
    soft = gradient(model, objective.loss_sum(model, batch))
    mean = torch.zeros_like(soft)
    for word in range(6):
        labelled = batch | {"labels": torch.where(batch["labels"] >= 0, word, -100)}
        mean += batch[TARGETS][0, 2, word] * gradient(model, of.loss_sum(model, labelled))
    torch.testing.assert_close(soft, mean, rtol=1e-4, atol=1e-6)


def test_an_exact_solution_stays_and_the_loss_that_is_measured_is_that_of_labels(tmp_path):
    tokens = tokens_of(BRACKETS, tmp_path / "tokens")
    given = {
        "model": OneLayer(name="one_layer", num_neurons=16, start=LookUp(name="look_up")),
        "optimizer": SGD(name="sgd", lr=0.5, momentum=0.0),
        "clip_norm": None,
        "sequence_length": 7,
        "steps": 40,
        "batch_sequences": 16,
    }
    contexts = all_contexts(BRACKETS)
    moved = {}
    for name, objective in (("soft", SoftTargets(name="soft_targets", of=ONE_MASK)), ("labels", ONE_MASK)):
        recipe = recipe_of(BRACKETS, objective=objective, **given)
        start = recipe.model.build(vocab_size=10, sequence_length=7, seed=0, corpus=BRACKETS)
        pretrain(recipe, tokens, tmp_path / name, step=40)
        end = load_model(tmp_path / name)
        moved[name] = float((end(contexts.ids).logits - start(contexts.ids).logits)[:, -1, 1:-1].abs().max())
    # Weights are rounded to 1e-7 of themselves; of labels the noise moves logits by tenths.
    assert moved["soft"] < 1e-4 < 1e-2 < moved["labels"]
    assert (tmp_path / "soft/objective.json").read_text() == (tmp_path / "labels/objective.json").read_text()


def test_it_is_refused_where_no_conditionals_are_known():
    with pytest.raises(ValidationError, match="are not known; use replacement: mask"):
        SoftTargets(name="soft_targets", of=MaskedLM(name="masked_lm", replacement="80/10/10"))
