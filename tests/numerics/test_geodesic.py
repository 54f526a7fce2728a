"""A geodesic ball stays as it is however attention's matrices are written; its steps follow the geodesic equation."""

import copy
import math

import pytest
import torch
from tiny_models import batch_for, build

from raysweep.curvature.geodesic import Factor, Piece, factors_of
from raysweep.curvature.language import prepare
from raysweep.curvature.operators import choose_parameters, named_parameters
from raysweep.curvature.rescaling import rescale
from raysweep.curvature.sharpness import _Loss, worst_sharpness
from raysweep.train.enlarged import enlarged

STYLES = ["llama", "grouped", "gpt2", "bert"]


def model_of(style):
    model = build(style).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # Biases and gains that matter.
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    prepare(model)
    return model


def invertible(size, generator):
    return torch.eye(size).double() + 0.4 * torch.randn(size, size, generator=generator, dtype=torch.float64)


@torch.no_grad()
def rewrite(model, style):
    """Write each head in other coordinates: values against output, and queries against keys as far as positions let."""
    generator = torch.Generator().manual_seed(2)
    base, config = model.base_model, model.config
    if style == "gpt2":
        size = config.n_embd // config.n_head
        for layer in base.h:
            query, key, value = (
                layer.attn.c_attn.weight[:, i * config.n_embd : (i + 1) * config.n_embd] for i in range(3)
            )
            biases = layer.attn.c_attn.bias.view(3, -1)
            for head in range(config.n_head):
                own = slice(head * size, (head + 1) * size)
                a, b = invertible(size, generator), invertible(size, generator)
                for matrix, bias, by in ((query, biases[0], a), (key, biases[1], a.inverse().T), (value, biases[2], b)):
                    matrix[:, own] = matrix[:, own] @ by
                    bias[own] = bias[own] @ by
                layer.attn.c_proj.weight[own] = b.inverse() @ layer.attn.c_proj.weight[own]
        return
    size = config.hidden_size // config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", config.num_attention_heads)
    sharing = config.num_attention_heads // groups
    for layer in base.encoder.layer if style == "bert" else base.layers:
        if style == "bert":
            own = layer.attention.self
            query, key, value, output = own.query, own.key, own.value, layer.attention.output.dense
        else:
            own = layer.self_attn
            query, key, value, output = own.q_proj, own.k_proj, own.v_proj, own.o_proj
        for group in range(groups):
            rows = slice(group * size, (group + 1) * size)
            heads = [slice(head * size, (head + 1) * size) for head in range(group * sharing, (group + 1) * sharing)]
            b = invertible(size, generator)
            if style == "bert":
                a = invertible(size, generator)
            else:  # x + iy of each pair times a complex number.
                re, im = (torch.randn(size // 2, generator=generator, dtype=torch.float64).diag() for _ in range(2))
                a = torch.cat([torch.cat([re, im], dim=1), torch.cat([-im, re], dim=1)])
            for linear, places, by in ((query, heads, a), (key, [rows], a.inverse().T), (value, [rows], b)):
                for place in places:
                    linear.weight[place] = by.T @ linear.weight[place]
                    if linear.bias is not None:
                        linear.bias[place] = by.T @ linear.bias[place]
            for place in heads:
                output.weight[:, place] = output.weight[:, place] @ b.inverse().T


@pytest.mark.parametrize("style", STYLES)
def test_no_way_of_writing_attention_moves_it(style):
    model = model_of(style)
    batches = [batch_for(model, num=4)]
    other = copy.deepcopy(model)
    rewrite(other, style)
    rescale(other, torch.Generator().manual_seed(3))
    ids = batches[0]["input_ids"]
    torch.testing.assert_close(other(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-9, atol=1e-9)

    def both(scale):
        return [worst_sharpness(each, batches, rho=0.1, scale=scale, num_steps=3) for each in (model, other)]

    before, after = both("geodesic")
    assert after == pytest.approx(before, rel=1e-6)
    assert before > 0
    before, after = both("adaptive")
    assert abs(after / before - 1) > 0.05


@pytest.mark.parametrize("style", STYLES)
def test_to_first_order_it_is_the_gradients_norm_in_the_metric(style):
    model = model_of(style)
    batches = [batch_for(model, num=3)]
    parameters = named_parameters(model)
    slope = _Loss(model, batches).gradient(parameters)
    factors, inside = factors_of(model, parameters)
    square = sum(float((parameters[name] * part).square().sum()) for name, part in slope.items() if name not in inside)
    for factor in factors:
        matrix = torch.cat([piece.matrix() for _, piece in factor.pieces], dim=2)
        part = torch.cat([piece.slope(slope[name]) for name, piece in factor.pieces], dim=2)
        square += float((part @ (matrix.mT @ matrix) * part).sum())
    rho = 1e-4  # Norms of the Llama kind round to float32 whatever the weights are.
    assert worst_sharpness(model, batches, rho=rho, scale="geodesic") == pytest.approx(
        rho * math.sqrt(square), rel=5e-3
    )


def test_steps_follow_the_geodesic_to_second_order():
    generator = torch.Generator().manual_seed(0)
    start, along = (torch.randn(1, 1, 5, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    factor = Factor([("w", Piece(start, lambda tensor: tensor))])
    root = torch.linalg.svd(start, full_matrices=False)
    root = root.Vh.mT @ (root.S[..., None] * root.Vh)

    def exact(length):
        """By Runge-Kutta, of G'' = G' S^-1 S' - G S^-1 G'' G'."""
        g, speed = start, length * along @ root

        def change(g, speed):
            inverse = (g.mT @ g).inverse()
            return speed, speed @ inverse @ (speed.mT @ g + g.mT @ speed) - g @ inverse @ speed.mT @ speed

        num = 200
        for _ in range(num):
            k1 = change(g, speed)
            k2 = change(g + k1[0] / (2 * num), speed + k1[1] / (2 * num))
            k3 = change(g + k2[0] / (2 * num), speed + k2[1] / (2 * num))
            k4 = change(g + k3[0] / num, speed + k3[1] / num)
            g, speed = (
                old + (a + 2 * b + 2 * c + d) / (6 * num)
                for old, a, b, c, d in zip((g, speed), k1, k2, k3, k4, strict=True)
            )
        return g - start

    def error(length):
        place = {"w": length * along}
        factor.to_weights(place)
        return float((place["w"] - exact(length)).norm())

    assert error(0.01) / error(0.005) == pytest.approx(8, rel=0.05)
    assert error(0.01) < 1e-4


@pytest.mark.parametrize("style", ["llama", "gpt2"])
def test_a_larger_model_of_the_same_function_measures_the_same(style):
    """What an added layer has is zeros, which have no size to move by."""
    model = model_of(style).float()
    layers = {"llama": "num_hidden_layers", "gpt2": "n_layer"}[style]
    large = enlarged(model, type(model.config).from_dict(model.config.to_dict() | {layers: 3}))
    prepare(large)
    small, more = (
        worst_sharpness(each, [batch_for(model)], rho=0.05, scale="geodesic", num_steps=2) for each in (model, large)
    )
    assert more == pytest.approx(small, rel=1e-3)


def test_a_part_of_attention_is_refused():
    model = model_of("gpt2")
    choose_parameters(model, ["*weight"])
    with pytest.raises(ValueError, match="a geodesic ball needs all parameters of attention"):
        worst_sharpness(model, [batch_for(model)], rho=0.1, scale="geodesic")


def test_a_gain_of_zero_leaves_what_it_hides():
    model = model_of("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[:2] = 0
    assert math.isfinite(worst_sharpness(model, [batch_for(model)], rho=0.1, scale="geodesic", num_steps=2))


@pytest.mark.parametrize("style", STYLES)
def test_a_ball_stays_where_it_was_made_when_weights_are_written_to(style):
    model = model_of(style)
    parameters = named_parameters(model)
    factors, _ = factors_of(model, parameters)

    def both():
        there = {name: part.detach().clone() for name, part in start.items()}
        back = copy.deepcopy(there)
        for factor in factors:
            factor.to_weights(there)
            factor.to_coordinates(back)
        return [*there.values(), *back.values()]

    start = {name: part.detach().sin() for name, part in parameters.items()}
    before = both()
    with torch.no_grad():
        for part in parameters.values():
            part.mul_(1.5)
    assert all(map(torch.equal, before, both()))
