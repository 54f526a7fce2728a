"""Products with curvature matrices: closed forms, and four ways that must agree."""

import math
from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from tiny_models import CAUSAL, STYLES, batch_for, build, flat, full_gauss_newton, full_hessian

from raysweep.curvature.language import mean_token_loss, prepare, token_logits
from raysweep.curvature.operators import (
    MovableParameters,
    choose_parameters,
    finite_difference_product,
    hessian_vector_products,
    inner,
    named_parameters,
)
from raysweep.curvature.probes import probe_vector
from raysweep.curvature.tangents import (
    _of_two,
    forward_over_reverse_product,
    gauss_newton_product,
    logits_derivative,
    reverse_over_forward_product,
)


def small(style: str, *, tied: bool = True):
    model = build(style, tied=tied, hidden=4, vocab=5, layers=1, positions=8).double()
    prepare(model)
    return model, batch_for(model), named_parameters(model)


def test_products_of_a_quadratic_are_its_matrix():
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(5, 5, generator=draw, dtype=torch.float64)
    matrix = matrix + matrix.T
    x = torch.randn(5, generator=draw, dtype=torch.float64, requires_grad=True)
    vectors = [{"x": torch.randn(5, generator=draw, dtype=torch.float64)} for _ in range(3)]
    loss = lambda: x @ matrix @ x / 2  # noqa: E731
    products = hessian_vector_products(loss, {"x": x}, vectors)
    for vector, product in zip(vectors, products, strict=True):
        torch.testing.assert_close(product["x"], matrix @ vector["x"], rtol=1e-12, atol=1e-12)
        # Third derivatives are nought: differences err by rounding alone.
        found = finite_difference_product(loss, {"x": x}, vector, precision=torch.float64, check=True)
        torch.testing.assert_close(found.product["x"], matrix @ vector["x"], rtol=1e-9, atol=1e-9)
        assert found.relative_error < 1e-9


def test_trace_of_softmax_regression_is_its_closed_form():
    # L(W) = CE(softmax(W x), y): the Hessian is (diag p - p p') (x) x x', its trace (1 - |p|^2) |x|^2.
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, generator=draw, dtype=torch.float64).requires_grad_()
    x = torch.randn(3, generator=draw, dtype=torch.float64)
    loss = lambda: torch.nn.functional.cross_entropy(weight @ x, torch.tensor(2))  # noqa: E731
    hessian = full_hessian(loss, {"w": weight})
    p = (weight @ x).softmax(dim=0)
    assert float(hessian.trace()) == pytest.approx(float((1 - p.square().sum()) * x.square().sum()), rel=1e-12)


@pytest.mark.parametrize(("style", "tied"), [*((s, t) for s in CAUSAL for t in (True, False)), ("bert", True)])
def test_all_exact_products_agree(style, tied):
    model, batch, parameters = small(style, tied=tied)
    loss = lambda: mean_token_loss(model, batch)  # noqa: E731
    hessian = full_hessian(loss, parameters)
    # Llama and GPT-NeoX compute norms, or rotations, in float32, at 6e-8 of numbers of order 1.
    torch.testing.assert_close(hessian, hessian.T, rtol=0, atol=1e-5)
    # By products with random signs in place of unit vectors, a tenth as many: an error in one element is in a sum with
    # others that is smaller than it at most every second time, so that 20 all miss it once in a million times.
    vectors = [probe_vector(parameters, seed=0, probe=probe) for probe in range(20)]
    signs = torch.stack([flat(vector) for vector in vectors], dim=1)
    for other in (
        lambda v: hessian_vector_products(loss, parameters, [v])[0],
        lambda v: forward_over_reverse_product(model, batch, v),
        lambda v: reverse_over_forward_product(model, batch, v)[0],
    ):
        found = torch.stack([flat(other(vector)) for vector in vectors], dim=1)
        torch.testing.assert_close(found, hessian @ signs, rtol=0, atol=1e-5)
    ours = torch.stack([flat(gauss_newton_product(model, batch, vector)) for vector in vectors], dim=1)
    torch.testing.assert_close(ours, full_gauss_newton(model, batch, parameters) @ signs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("style", STYLES)
def test_differences_of_gradients_are_close_and_say_how_close(style):
    model = build(style)
    batch, parameters = batch_for(model), named_parameters(model)
    vector = probe_vector(parameters, seed=0, probe=0)
    prepare(model)
    exact = hessian_vector_products(lambda: mean_token_loss(model, batch), parameters, [vector])[0]
    before = flat(parameters)
    model.set_attn_implementation("sdpa")  # No second derivative is needed.
    found = finite_difference_product(lambda: mean_token_loss(model, batch), parameters, vector, check=True)
    off = math.sqrt(
        sum(float((found.product[name] - exact[name]).double().square().sum()) for name in exact) / inner(exact, exact)
    )
    assert off < 1e-3
    assert off < 1.5 * found.relative_error < 6 * off
    assert torch.equal(flat(parameters), before)


@pytest.mark.parametrize("style", STYLES)
def test_differences_of_checkpointed_gradients_are_the_same(style):
    model = build(style)
    batch, parameters = batch_for(model), named_parameters(model)
    vector = probe_vector(parameters, seed=0, probe=0)
    runs = []
    norms = [module for module in model.modules() if "Norm" in type(module).__name__]
    norms[1].register_forward_hook(lambda *given: runs.append(1))
    found, counts = [], []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            # Layers are recomputed in training mode alone; dropout has modules of its own, and stays off.
            for module in model.modules():
                if getattr(module, "gradient_checkpointing", False):
                    module.training = True
        found.append(finite_difference_product(lambda: mean_token_loss(model, batch), parameters, vector).product)
        counts.append(len(runs))
    assert torch.equal(*map(flat, found))
    assert counts == [2, 2 + 4]  # Two gradients; then each layer twice for each.


def test_differences_of_bfloat16_gradients_say_how_far_they_are_off():
    model = build("llama")
    prepare(model)
    batch, parameters = batch_for(model), named_parameters(model)  # Float32; activations are in bfloat16.
    reported, actual = [], []
    for probe in range(4):
        vector = probe_vector(parameters, seed=0, probe=probe)
        exact = hessian_vector_products(lambda: mean_token_loss(model, batch), parameters, [vector])[0]

        def loss():
            with torch.autocast("cpu", torch.bfloat16):
                return mean_token_loss(model, batch)

        found = finite_difference_product(loss, parameters, vector, precision=torch.bfloat16, check=True)
        off = {name: found.product[name] - exact[name] for name in exact}
        actual.append(math.sqrt(inner(off, off) / inner(exact, exact)))
        reported.append(found.relative_error)
    assert sum(actual) / 4 < 0.25
    assert 0.8 < sum(reported) / sum(actual) < 4


def test_moved_parameters_come_back_after_an_error():
    x = torch.tensor([0.1, 0.7])

    def fail(move):
        move({"x": torch.ones(2)}, 1)
        assert float(x[0]) == pytest.approx(0.4)
        raise KeyError

    with pytest.raises(KeyError), MovableParameters({"x": x}, 0.3).moves() as move:
        fail(move)
    assert x.tolist() == torch.tensor([0.1, 0.7]).tolist()


def test_both_sides_are_those_of_single_moves_and_weights_are_never_written_to():
    home = {"a": torch.linspace(-1, 1, 70_001), "b": torch.ones(3, 2)}
    parameters = {name: values.clone().requires_grad_() for name, values in home.items()}
    kept = {name: parameter.detach() for name, parameter in parameters.items()}
    movable = MovableParameters(parameters, 0.3)
    for vector in (movable.probe(seed=0, probe=1), probe_vector(parameters, seed=0, probe=1)):
        with movable.moves() as move:
            move(vector, 2)
            ahead = {name: parameter.detach().clone() for name, parameter in parameters.items()}
            move(vector, -2)
            behind = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        with movable.sides(vector, 2) as (go_ahead, go_behind):
            for go, expected in ((go_ahead, ahead), (go_behind, behind), (go_ahead, ahead)):
                go()
                assert all(torch.equal(parameters[name], expected[name]) for name in parameters)
                assert all(torch.equal(kept[name], home[name]) for name in parameters)
        assert all(parameters[name].data_ptr() == kept[name].data_ptr() for name in parameters)


def test_derivative_of_logits_is_the_jacobian():
    model, batch, parameters = small("gpt2")
    vector = probe_vector(parameters, seed=0, probe=0)
    logits, along = logits_derivative(model, batch, vector)
    torch.testing.assert_close(logits, token_logits(model, batch).detach())
    movable = MovableParameters(parameters, 1e-6)
    with torch.no_grad(), movable.moves() as move:
        move(vector, 1)
        ahead = token_logits(model, batch)
        move(vector, -1)
        behind = token_logits(model, batch)
    torch.testing.assert_close(along, (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-6)


def test_parameters_are_chosen_by_pattern():
    model = build("gpt2")
    choose_parameters(model, ["*.mlp.*", "*ln_f.bias"])
    names = list(named_parameters(model))
    assert names
    assert all(".mlp." in name or name.endswith("ln_f.bias") for name in names)
    with pytest.raises(ValueError, match=r"no parameter matches '\*\.mpl\.\*'; the nearest name is"):
        choose_parameters(model, ["*.mpl.*"])
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        named_parameters(model)


def test_what_cannot_be_differentiated_is_named():
    x = torch.ones(2, requires_grad=True)
    unused = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="parameter 'unused' takes no part"):
        hessian_vector_products(lambda: x.square().sum(), {"x": x, "unused": unused}, [{"x": x, "unused": x}])
    with pytest.raises(ValueError, match="the loss is nan"):
        hessian_vector_products(lambda: x.sum() * math.nan, {"x": x}, [{"x": x}])

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            ctx.save_for_backward(value)
            return value.square()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return 2 * ctx.saved_tensors[0] * gradient

    with pytest.raises(ValueError, match="no second derivative; use gradient or logit differences"):
        hessian_vector_products(lambda: Once.apply(x).sum() ** 2, {"x": x}, [{"x": torch.ones(2)}])


def test_probes_are_keyed_by_seed_probe_and_name():
    like = {"a": torch.zeros(1000), "b": torch.zeros(1000)}
    first = probe_vector(like, seed=0, probe=0)
    assert torch.equal(first["a"], probe_vector({"a": like["a"]}, seed=0, probe=0)["a"])
    assert not torch.equal(first["a"], first["b"])
    assert not torch.equal(first["a"], probe_vector(like, seed=0, probe=1)["a"])
    assert not torch.equal(first["a"], probe_vector(like, seed=1, probe=0)["a"])
    assert set(first["a"].tolist()) == {-1.0, 1.0}
    assert abs(float(first["a"].mean())) < 4 / math.sqrt(1000)
    normal = probe_vector(like, seed=0, probe=0, distribution="gaussian")["a"]
    assert float(normal.var()) == pytest.approx(1, abs=4 * math.sqrt(2 / 1000))


def test_a_vector_of_noughts_has_no_step():
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match=r"no step .* of the vector 0\.0"):
        finite_difference_product(lambda: x.square().sum(), {"x": x}, {"x": torch.zeros_like(x)})


@pytest.mark.parametrize("function", [torch.mul, torch.add])
@pytest.mark.parametrize(
    "other", [2.0, torch.randn(3), torch.randn(2, 4, 3), torch.randn(3, dtype=torch.float64), torch.arange(3)]
)
def test_products_and_sums_with_a_constant_have_torchs_tangents(function, other):
    value, tangent = torch.randn(2, 1, 3), torch.randn(2, 1, 3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(value, tangent)
        for operands in ((dual, other), (other, dual), (dual, dual)):
            if not isinstance(operands[0], float):
                ours, theirs = (forward_ad.unpack_dual(of(*operands)) for of in (partial(_of_two, function), function))
                assert torch.equal(ours.primal, theirs.primal)
                assert torch.equal(ours.tangent, theirs.tangent)
                assert ours.tangent.dtype == theirs.tangent.dtype == ours.primal.dtype
