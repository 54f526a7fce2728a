"""Curvature of a loss whose prefix is seen both ways, by every product, against the Hessian of its definition."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import CAUSAL, build, flat, full_hessian

from raysweep.curvature.language import mean_token_loss, prepare
from raysweep.curvature.operators import MovableParameters, named_parameters
from raysweep.curvature.probes import key
from raysweep.curvature.units import Unit, _one_by_one, fisher_unit, probe_unit

PREFIXES = torch.tensor([2, 4, 1])


def small(style):
    model = build(style, hidden=4, vocab=5, layers=1, positions=8).double()
    prepare(model)
    ids = torch.randint(0, 5, (3, 6), generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(torch.arange(6) < PREFIXES[:, None], -100)
    return model, {"input_ids": ids, "labels": labels, "prefix_lengths": PREFIXES}


def naive_loss(model, batch):
    """One sequence at a time, its mask written out."""
    total, num = 0.0, 0
    for ids, prefix in zip(batch["input_ids"], batch["prefix_lengths"].tolist(), strict=True):
        blocked = torch.ones(6, 6, dtype=torch.float64).triu(1)
        blocked[:prefix, :prefix] = 0
        logits = model(
            input_ids=ids[None], attention_mask=(blocked * torch.finfo(torch.float64).min)[None, None]
        ).logits
        total = total + F.cross_entropy(logits[0, prefix - 1 : -1], ids[prefix:], reduction="sum")
        num += 6 - prefix
    return total / num


@pytest.mark.parametrize("style", CAUSAL)
def test_probes_measure_the_loss_of_the_definition(style):
    model, batch = small(style)
    parameters = named_parameters(model)
    loss = lambda: naive_loss(model, batch)  # noqa: E731
    hessian = full_hessian(loss, parameters)
    torch.testing.assert_close(mean_token_loss(model, batch), naive_loss(model, batch), rtol=1e-12, atol=0)
    # Norms round to float32 whatever the weights are: second differences are off by 6e-8 / h^2 = 0.6 % of a nat.
    movable = MovableParameters(parameters, 3e-3)
    for products in ("logit_differences", "gradient_differences", "exact"):
        unit = Unit("probe", 0, 0)
        values = probe_unit(model, batch, unit, seed=0, products=products, movable=movable)
        vector = flat(movable.probe(seed=0, probe=key(0, 0)))
        want = float(vector @ hessian @ vector)
        assert values["num_tokens"] == 11
        assert (values["gauss_newton"] + values["residual"]) / 11 == pytest.approx(want, rel=0.02), products


@pytest.mark.parametrize("style", CAUSAL)
def test_ghost_norms_are_those_of_gradients(style):
    model, batch = small(style)
    unit = Unit("fisher", 0, 0)
    ghost = fisher_unit(model, batch, unit, seed=0)
    rows = _one_by_one(model, batch, unit, seed=0, labels="model", sampling="sequence")
    assert ghost["fisher"] == pytest.approx(float(sum(part.sum() for part in rows.values())), rel=1e-9)
