"""Prefix language modelling: worked examples of labels and masks, and a naive reference one prediction at a time."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny_models import build

from raysweep.errors import StageError
from raysweep.objectives.base import IGNORED, Specials
from raysweep.objectives.causal_lm import CausalLM
from raysweep.objectives.inputs import check_prefixes, prefix_mask
from raysweep.objectives.prefix_lm import PrefixLM

SPECIALS = Specials({}, 23, reserved=(0,), eos=0)


def rows_of(objective, *, num=6, length=10, seed=0):
    ids = np.random.default_rng(seed).integers(1, 23, size=(num, length))
    return ids, objective.prepare(ids, np.random.default_rng(seed), SPECIALS)


def test_a_worked_example():
    ids = np.array([[5, 6, 7, 8]])
    rows = PrefixLM(name="prefix_lm", prefix=(0.5, 0.5)).prepare(ids, np.random.default_rng(0), SPECIALS)
    assert rows["input_ids"].tolist() == [[5, 6, 7, 8]]
    assert rows["labels"].tolist() == [[IGNORED, IGNORED, 7, 8]]
    assert rows["prefix_lengths"].tolist() == [2]
    seen = prefix_mask(torch.tensor([2]), 4, torch.float32)[0, 0] == 0
    assert seen.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


def test_one_token_is_given_and_one_predicted_at_least():
    _, rows = rows_of(PrefixLM(name="prefix_lm"), num=500, length=4)
    assert sorted(set(rows["prefix_lengths"].tolist())) == [1, 2, 3]
    counts = np.bincount(rows["prefix_lengths"])[1:]
    # A third of 500 each; standard deviation 10.5
    assert np.abs(counts - 500 / 3).max() < 42
    _, rows = rows_of(PrefixLM(name="prefix_lm", prefix=(0.25, 0.75)), num=500, length=12)
    assert sorted(set(rows["prefix_lengths"].tolist())) == list(range(3, 10))


@pytest.mark.parametrize("style", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_loss_is_that_of_one_prediction_at_a_time(style, implementation):
    """Each token of the end is predicted by a model that is given no more than may be seen."""
    objective, model = PrefixLM(name="prefix_lm"), build(style).double()
    model.set_attn_implementation(implementation)
    ids, rows = rows_of(objective)
    ours = objective.loss_sum(model, {name: torch.from_numpy(values) for name, values in rows.items()})
    want, num = 0.0, 0
    for row, prefix in zip(ids, rows["prefix_lengths"], strict=True):
        for place in range(prefix, len(row)):
            given = torch.from_numpy(row[None, :place])
            # All of the prefix sees the prefix, and what follows sees what is before it.
            blocked = torch.ones(place, place, dtype=torch.float64).triu(1)
            blocked[:prefix, :prefix] = 0
            mask = (blocked * torch.finfo(torch.float64).min)[None, None]
            log_p = model(input_ids=given, attention_mask=mask).logits[0, -1].log_softmax(dim=-1)
            want -= float(log_p[row[place]])
            num += 1
    # float64 sums of some 30 terms
    assert float(ours) == pytest.approx(want, rel=1e-9)
    assert objective.num_predicted(rows) == num == int((10 - rows["prefix_lengths"]).sum())


def test_a_prefix_seen_causally_is_causal_lm_on_fewer_labels():
    objective, model = PrefixLM(name="prefix_lm", attention="causal"), build("llama").double()
    ids, rows = rows_of(objective)
    assert "prefix_lengths" not in rows
    tensors = {name: torch.from_numpy(values) for name, values in rows.items()}
    assert float(objective.loss_sum(model, tensors)) == float(CausalLM().loss_sum(model, tensors))
    both_ways = PrefixLM(name="prefix_lm").prepare(ids, np.random.default_rng(0), SPECIALS)
    assert np.array_equal(both_ways["labels"], rows["labels"])
    ahead = {name: torch.from_numpy(values) for name, values in both_ways.items()}
    assert abs(float(objective.loss_sum(model, ahead)) - float(objective.loss_sum(model, tensors))) > 1e-3


@pytest.mark.parametrize("style", ["llama", "gpt2", "gpt_neox"])
def test_models_that_take_the_mask_pass(style):
    check_prefixes(build(style))


def test_a_model_that_makes_its_own_mask_is_refused(monkeypatch):
    model = build("llama")
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *, attention_mask, **given: forward(**given))
    with pytest.raises(StageError, match="does not take an attention mask for prefixes that are seen both ways"):
        check_prefixes(model)


def test_parts_that_fall_are_refused():
    with pytest.raises(ValidationError, match=r"\[0.9, 0.1\]: the shortest part is above the longest"):
        PrefixLM(name="prefix_lm", prefix=(0.9, 0.1))
