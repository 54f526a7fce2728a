"""Ghost norms against per-sequence gradients, for the families of models that users have."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import STYLES, batch_for, build

from raysweep.curvature.ghost import GhostNorms
from raysweep.curvature.language import targets, token_logits
from raysweep.curvature.operators import choose_parameters, named_parameters


def by_backward(model, batch, cotangents) -> dict[str, torch.Tensor]:
    """One backward pass for each sequence."""
    parameters = named_parameters(model)
    norms = {name: [] for name in parameters}
    for row in range(len(cotangents)):
        logits = token_logits(model, {name: tensor[row : row + 1] for name, tensor in batch.items()})
        gradients = torch.autograd.grad(
            logits, list(parameters.values()), grad_outputs=cotangents[row : row + 1], allow_unused=True
        )
        for name, gradient in zip(parameters, gradients, strict=True):
            norms[name].append(0.0 if gradient is None else float(gradient.double().square().sum()))
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in norms.items()}


def cotangents_of(model, batch, labels) -> torch.Tensor:
    """Gradient of each sequence's summed cross-entropy with respect to its logits."""
    logits = token_logits(model, batch).detach()
    one_hot = F.one_hot(labels.clamp(min=0), logits.shape[-1])
    return (logits.softmax(dim=-1) - one_hot) * (labels != -100)[..., None]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("length", [6, 40])  # 40 takes the branch of long sequences and narrow layers
@pytest.mark.parametrize("style", STYLES)
def test_norms_are_those_of_the_gradients(style, length, tied):
    model = build(style, tied=tied)
    if style == "bert" and not tied:
        model.cls.predictions.bias.requires_grad_(False)  # Of no use to an untied head.
    batch = batch_for(model, num=5, length=length)
    if style != "bert":
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][1, 4:] = 0
    ghost = GhostNorms(model, batch)
    wanted = targets(model, batch)
    for last, labels in ((False, wanted), (True, wanted.roll(1, dims=0).where(wanted != -100, wanted))):
        cotangents = cotangents_of(model, batch, labels)
        got = ghost.squared_norms(cotangents, last=last)
        truth = by_backward(model, batch, cotangents)
        total = sum(truth.values())
        torch.testing.assert_close(sum(got.values()), total, rtol=1e-5, atol=0)
        for name, squares in got.items():
            # float32 products, summed in another order
            torch.testing.assert_close(squares, truth[name], rtol=1e-4, atol=1e-8 * float(total.max()))
        missing = truth.keys() - got.keys()
        assert all(float(truth[name].max()) == 0 for name in missing)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_only_chosen_parameters_are_counted():
    model = build("gpt2")
    choose_parameters(model, ["*.mlp.c_fc.*"])
    batch = batch_for(model)
    ghost = GhostNorms(model, batch)
    cotangents = cotangents_of(model, batch, targets(model, batch))
    got, truth = ghost.squared_norms(cotangents, last=True), by_backward(model, batch, cotangents)
    assert got.keys() == truth.keys()
    assert len(got) == 4
    torch.testing.assert_close(sum(got.values()), sum(truth.values()), rtol=1e-5, atol=0)
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 4


def test_a_layer_without_a_rule_is_named():
    model = build("llama", tied=True)
    model.model.extra = torch.nn.Bilinear(2, 2, 2)
    with pytest.raises(ValueError, match=r"layer 'model\.extra' \(Bilinear\)"):
        GhostNorms(model, batch_for(model))
