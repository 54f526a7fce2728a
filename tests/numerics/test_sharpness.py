"""Sharpness against closed forms, and which measures survive a rescaling that leaves the function as it is."""

import math

import pytest
import torch
from tiny_models import batch_for, build, full_hessian

from raysweep.curvature.language import mean_token_loss, prepare, token_logits
from raysweep.curvature.linear import Operator, curvature_operator
from raysweep.curvature.measure import measure_traces
from raysweep.curvature.operators import gradients_of, inner, named_parameters
from raysweep.curvature.rescaling import rescale
from raysweep.curvature.settings import ShapeSettings, TraceSettings
from raysweep.curvature.shape import shape_tasks
from raysweep.curvature.sharpness import adaptive_trace, average_sharpness, relative_flatness, worst_sharpness
from raysweep.curvature.spectrum import top_eigenpairs
from raysweep.flatter import SURVIVING


@pytest.fixture(scope="module")
def model():
    model = build("gpt2", hidden=8, vocab=7, layers=1, tied=False).double()
    prepare(model)
    return model


@pytest.fixture(scope="module")
def batches(model):
    return [batch_for(model, num=2), batch_for(model, num=1, seed=2)]


@pytest.fixture(scope="module")
def hessian(model, batches):
    parameters = named_parameters(model)
    return sum(
        full_hessian(lambda batch=batch: mean_token_loss(model, batch), parameters) * share
        for batch, share in zip(batches, (2 / 3, 1 / 3), strict=True)
    )


def gradient(model, batches):
    parameters = named_parameters(model)
    parts = [gradients_of(mean_token_loss(model, batch), parameters) for batch in batches]
    return {name: 2 / 3 * a + 1 / 3 * b for name, a, b in zip(parameters, *parts, strict=True)}


def test_worst_direction_is_the_gradients_to_first_order(model, batches):
    slope = gradient(model, batches)
    rho = 1e-6
    norm = math.sqrt(inner(slope, slope))
    assert worst_sharpness(model, batches, rho=rho) == pytest.approx(rho * norm, rel=1e-3)
    parameters = named_parameters(model)
    scaled = {name: part.detach().abs() * slope[name] for name, part in parameters.items()}
    expected = rho * math.sqrt(inner(scaled, scaled))
    assert worst_sharpness(model, batches, rho=rho, scale="adaptive") == pytest.approx(expected, rel=1e-3)


def test_more_steps_of_ascent_find_more(model, batches):
    num = sum(part.numel() for part in named_parameters(model).values())
    one, many = (worst_sharpness(model, batches, rho=0.5, num_steps=num) for num in (1, 8))
    assert many > one > average_sharpness(model, batches, noise=0.5 / num**0.5).mean


def test_average_direction_is_the_trace_to_second_order(model, batches, hessian):
    noise = 1e-5
    found = average_sharpness(model, batches, noise=noise, num_draws=200)
    assert abs(found.mean - noise**2 / 2 * float(hessian.trace())) < 4 * found.stderr
    weights = torch.cat([part.detach().flatten() for part in named_parameters(model).values()])
    scaled = average_sharpness(model, batches, noise=noise, num_draws=200, scale="adaptive")
    expected = noise**2 / 2 * float((weights**2 * hessian.diag()).sum())
    assert abs(scaled.mean - expected) < 4 * scaled.stderr


def test_scale_free_traces_are_their_formulas(model, batches, hessian):
    # Of the full matrix, with which its products are those of the model's operator, at a thousandth of the time.
    operator = Operator(lambda block: hessian @ block, len(hessian), hessian.dtype)
    of_model = curvature_operator(model, batches)
    for function in (adaptive_trace, relative_flatness):
        by_matrix, by_model = (function(each, model, num_products=4).mean for each in (operator, of_model))
        assert by_matrix == pytest.approx(by_model, rel=1e-9)
    weights = torch.cat([part.detach().flatten() for part in named_parameters(model).values()])
    found = adaptive_trace(operator, model, num_products=300)
    assert abs(found.mean - float((weights**2 * hessian.diag()).sum())) < 4 * found.stderr
    truth, start = 0.0, 0
    for name, part in named_parameters(model).items():
        block = hessian[start : start + part.numel(), start : start + part.numel()]
        start += part.numel()
        if ".c_" in name and name.endswith("weight"):  # Conv1D: [inputs, neurons].
            inputs, neurons = part.shape
            inside = torch.einsum("isit->st", block.view(inputs, neurons, inputs, neurons))
            truth += float((part.detach().T @ part.detach() * inside).sum())
        if name == "lm_head.weight":  # Linear: [neurons, inputs].
            neurons, inputs = part.shape
            inside = torch.einsum("siti->st", block.view(neurons, inputs, neurons, inputs))
            truth += float((part.detach() @ part.detach().T * inside).sum())
    found = relative_flatness(operator, model, num_products=400)
    assert abs(found.mean - truth) < 4 * found.stderr
    assert found.stderr < 0.25 * abs(truth)


def rescale_whole_layers(model, factor: float) -> None:
    """Norm gains against the layers they feed, and one linear layer of the MLP against the next."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight.mul_(factor)
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                linear.weight.div_(factor)
            layer.mlp.up_proj.weight.mul_(factor)
            layer.mlp.down_proj.weight.div_(factor)


def test_relative_flatness_survives_a_rescaling_of_whole_layers():
    model = build("llama", tied=False)
    prepare(model)
    batches = [batch_for(model, num=4, seed=seed) for seed in range(2)]
    before = relative_flatness(curvature_operator(model, batches), model, num_products=4).mean
    rescale_whole_layers(model, 3.0)
    after = relative_flatness(curvature_operator(model, batches), model, num_products=4).mean
    assert after == pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize("style", ["llama", "gpt2", "bert"])
def test_which_measures_survive_a_random_rescaling(style):
    # An average near 0 would differ by what float32 rounds.
    model = build(style, tied=style == "bert").double()
    prepare(model)
    batches = [batch_for(model, num=4)]

    def measures():
        operator = curvature_operator(model, batches)
        return {
            "eigenvalue_1": float(top_eigenpairs(operator, 1, num_steps=10).values[0]),
            "worst_sharpness": worst_sharpness(model, batches, rho=0.05),
            "average_sharpness": average_sharpness(model, batches, noise=0.02).mean,
            "worst_sharpness_adaptive": worst_sharpness(model, batches, rho=0.05, scale="adaptive"),
            "worst_sharpness_geodesic": worst_sharpness(model, batches, rho=0.1, scale="geodesic", num_steps=3),
            "average_sharpness_adaptive": average_sharpness(model, batches, noise=0.02, scale="adaptive").mean,
            "adaptive_trace": adaptive_trace(operator, model, num_products=4).mean,
            "relative_flatness": relative_flatness(operator, model, num_products=4).mean,
        }

    logits, before = token_logits(model, batches[0]).detach(), measures()
    rescale(model, torch.Generator().manual_seed(0))
    assert torch.allclose(token_logits(model, batches[0]), logits, atol=1e-4)
    after = measures()
    changed = {name for name in before if abs(after[name] / before[name] - 1) > 0.005}
    assert set(SURVIVING) <= before.keys()
    assert changed.isdisjoint(SURVIVING)
    if style != "bert":  # Of which only attention's factors are known.
        assert changed == before.keys() - set(SURVIVING)


@pytest.mark.parametrize(
    ("style", "products"), [("llama", "exact"), ("gpt2", "gradient_differences"), ("bert", "exact")]
)
def test_no_measure_depends_on_those_before_it_nor_leaves_a_trace_on_weights(style, products):
    model = build(style, layers=1)
    prepare(model, twice_differentiable=products == "exact")
    texts = [batch_for(model, num=2, seed=seed) for seed in range(2)]
    shape = ShapeSettings(num_steps=3, num_vectors=2, num_eigenvalues=1, geodesic_rho=0.1)
    tasks = shape_tasks(model, texts, shape, seed=0, products=products)
    for each in ("logit_differences", products):
        settings = TraceSettings(products=each, rse=0.5, min_units=4, max_units=4)
        tasks[f"traces by {each}"] = lambda settings=settings: measure_traces(model, texts, settings).metrics()
    weights = {name: (part.data_ptr(), part.detach().clone()) for name, part in model.named_parameters()}

    def values(names):
        found = {}
        for name in names:
            found[name] = tasks[name]()
            for of, part in model.named_parameters():
                place, before = weights[of]
                assert part.data_ptr() == place, (name, of)
                assert torch.equal(part, before), (name, of)
                assert part.grad is None, (name, of)
        return found

    assert values(reversed(tasks)) == values(tasks)


def test_what_cannot_be_measured_is_named(model, batches):
    operator = curvature_operator(model, batches)
    with pytest.raises(ValueError, match="num_draws 1"):
        average_sharpness(model, batches, noise=0.1, num_draws=1)
    with pytest.raises(ValueError, match="num_products 1"):
        adaptive_trace(operator, model, num_products=1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("ln" in name)
    try:
        with pytest.raises(ValueError, match="needs a linear layer"):
            relative_flatness(curvature_operator(model, batches), model, num_products=2)
    finally:
        model.requires_grad_(True)
