"""Noise on weights, and the error of a mean over draws of it and pieces of text."""

import numpy as np
import pytest
import torch
from tiny_models import STYLES, build

from raysweep.curvature.operators import named_parameters
from raysweep.curvature.probes import probe_vector
from raysweep.curvature.sensitivity import crossed_mean, noise_vector


@pytest.mark.parametrize("style", STYLES)
def test_noise_is_as_large_as_its_scale_says_and_of_one_direction(style):
    model = build(style, tied=False)
    normal = probe_vector(named_parameters(model), seed=0, probe=3, distribution="gaussian")
    plain, tensor, row = (noise_vector(model, scale, normal) for scale in ("absolute", "per_tensor", "per_row"))
    for name, weight in named_parameters(model).items():
        weight = weight.detach()
        torch.testing.assert_close(tensor[name], plain[name] * weight.square().mean().sqrt())
        if weight.ndim < 2:
            torch.testing.assert_close(row[name], tensor[name])
        elif "c_attn" in name or "c_fc" in name or "c_proj" in name:  # GPT-2's have a column for each neuron.
            torch.testing.assert_close(row[name], plain[name] * weight.square().mean(dim=0).sqrt())
        else:
            torch.testing.assert_close(row[name], plain[name] * weight.square().mean(dim=1).sqrt()[:, None])
    everything = torch.cat([part.flatten() for part in plain.values()])
    # Of thousands of normal numbers: 4 standard errors of their mean and of their mean square.
    assert abs(float(everything.mean())) < 4 / len(everything) ** 0.5
    assert abs(float(everything.square().mean()) - 1) < 4 * (2 / len(everything)) ** 0.5


def test_relative_noise_grows_with_a_matrix_that_the_next_one_scales_back():
    """So that the loss under it stays as it is."""
    ids = torch.arange(12).view(2, 6)
    losses = {}
    for scale in ("absolute", "per_tensor", "per_row"):
        for factor in (1.0, 4.0):
            model = build("llama", tied=False)
            normal = probe_vector(named_parameters(model), seed=0, probe=0, distribution="gaussian")
            with torch.no_grad():
                model.model.layers[0].mlp.up_proj.weight.mul_(factor)
                model.model.layers[0].mlp.down_proj.weight.div_(factor)
                for name, noise in noise_vector(model, scale, normal).items():
                    model.get_parameter(name).add_(noise, alpha=0.1)
                losses[scale, factor] = float(model(input_ids=ids, labels=ids).loss)
    for scale in ("per_tensor", "per_row"):
        assert losses[scale, 4.0] == pytest.approx(losses[scale, 1.0], rel=1e-5)
    assert losses["absolute", 4.0] != pytest.approx(losses["absolute", 1.0], rel=1e-2)


def test_the_error_holds_the_chance_of_noise_and_of_text():
    draw = np.random.default_rng(0)
    num_draws, num_pieces, truth = 6, 8, 2.0
    means, variances = [], []
    for _ in range(400):
        counts = draw.integers(8, 12, size=num_pieces)
        of_draws, of_pieces = draw.normal(size=(num_draws, 1)), 2 * draw.normal(size=num_pieces)
        rises = (truth + of_draws + of_pieces + draw.normal(size=(num_draws, num_pieces))) * counts
        estimate = crossed_mean(rises, counts)
        means.append(estimate.mean)
        variances.append(estimate.stderr**2)
    # 1 / 6 of draws, 4 / 8 of pieces, 1 / 48 of both: the mean of 400 has 2 % of error in its variance's root.
    expected = 1 / 6 + 4 / 8 + 1 / 48
    assert np.mean(means) == pytest.approx(truth, abs=4 * (expected / 400) ** 0.5)
    assert np.var(means) == pytest.approx(expected, rel=4 * (2 / 400) ** 0.5)
    assert np.mean(variances) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize(("shape", "words"), [((1, 4), "draws of noise 1"), ((4, 1), "pieces of text 1")])
def test_a_single_draw_or_piece_tells_no_error(shape, words):
    with pytest.raises(ValueError, match=words):
        crossed_mean(np.ones(shape), np.ones(shape[1], np.int64))
