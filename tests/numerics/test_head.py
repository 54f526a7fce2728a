"""The output layer in closed form: traces as unbiased as with probes of all weights, against full matrices."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import batch_for, build, matrices, small
from transformers import EsmConfig, EsmForMaskedLM, Gemma2Config, Gemma2ForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from raysweep.curvature.head import EVERY, OutputLayer
from raysweep.curvature.language import equal_batches, prepare
from raysweep.curvature.measure import measure_traces, paired_difference
from raysweep.curvature.operators import (
    MovableParameters,
    choose_parameters,
    named_parameters,
)
from raysweep.curvature.probes import Probe
from raysweep.curvature.settings import TraceSettings
from raysweep.curvature.units import Unit, probe_unit, response_unit
from raysweep.data.brackets import Brackets
from raysweep.train.one_layer import OneLayer, Random


def places_of(model, names):
    """Which rows of a matrix are of some parameters."""
    sizes = [(name, part.numel()) for name, part in named_parameters(model).items()]
    return torch.cat([torch.full((size,), name in names) for name, size in sizes])


def probes(model, batch, output, num):
    """Of as many batches, all of one text."""
    movable = MovableParameters(output.rest, 1e-3)
    given = {"seed": 0, "products": "logit_differences", "movable": movable, "output": output}
    found = [probe_unit(model, batch, Unit("probe", number, 0), **given) for number in range(num)]
    gauss_newton, residual = (np.array([unit[name] for unit in found]) for name in ("gauss_newton", "residual"))
    tokens = found[0]["num_tokens"]
    return (gauss_newton + residual) / tokens, gauss_newton / tokens


def assert_unbiased(values, truth, scale):
    # Differences are wrong by about a thousandth of the Gauss-Newton trace.
    assert abs(values.mean() - truth) < 4 * values.std(ddof=1) / math.sqrt(len(values)) + 3e-3 * scale


def test_an_output_layer_of_its_own_leaves_the_variance_of_the_rest():
    model, batch = small("llama", tied=False)
    hessian, gauss_newton = matrices(model, batch)
    output = OutputLayer.of(model, batch)
    assert output.embedding is None
    scale = float(gauss_newton.trace())
    rest = places_of(model, output.rest)
    assert rest.sum() == rest.numel() - sum(part.numel() for part in output.layer.parameters())
    for values, matrix in zip(probes(model, batch, output, 200), (hessian, gauss_newton), strict=True):
        assert_unbiased(values, float(matrix.trace()), scale)
        block = matrix[rest][:, rest]
        variance = 2 * float(block.square().sum() - block.diagonal().square().sum())
        assert values.var(ddof=1) == pytest.approx(variance, rel=0.5)
    # Without it, if it is not among the parameters that are measured.
    choose_parameters(model, ["model.*"])
    rested = OutputLayer.of(model, batch)
    assert rested.rest.keys() == output.rest.keys()
    for values, matrix in zip(probes(model, batch, rested, 100), (hessian, gauss_newton), strict=True):
        assert_unbiased(values, float(matrix.diagonal()[rest].sum()), scale)


@pytest.mark.parametrize("style", ["gpt2", "bert"])
def test_a_matrix_at_both_ends_has_the_block_between_them(style):
    model, batch = small(style, tied=True)
    hessian, gauss_newton = matrices(model, batch)
    output = OutputLayer.of(model, batch)
    assert output.embedding is model.get_input_embeddings()
    assert output.name not in output.rest
    scale = float(gauss_newton.trace())
    for uses in ("along", "apart"):
        found = probes(model, batch, replace(output, uses=uses), 200)
        for values, matrix in zip(found, (hessian, gauss_newton), strict=True):
            assert_unbiased(values, float(matrix.trace()), scale)


def test_the_block_between_both_ends_has_a_pass_of_its_own_where_it_is_small():
    model, batch = small("llama", tied=True)
    output = OutputLayer.of(model, batch)
    movable = MovableParameters(output.rest, math.nan)
    given = {"seed": 0, "movable": movable, "distribution": "rademacher", "output": output}
    response = response_unit(model, batch, Unit("response", 0, 0), **given)
    assert output.given(response).uses == "along"
    assert output.given({**response, "apart": response["along"] / 100}).uses == "apart"
    # One of each EVERY, at no fixed place.
    taken = [number for number in range(400) if replace(output, uses="apart").is_chosen(number, seed=0)]
    assert len(taken) == 400 / EVERY
    assert len({number % EVERY for number in taken}) == EVERY


@pytest.mark.parametrize("style", ["llama", "bert"])
def test_both_heads_measure_one_trace_and_one_difference(style):
    left, right = (build(style, hidden=8, vocab=11, layers=layers) for layers in (1, 2))
    for model in (left, right):
        prepare(model)
    batches = equal_batches(batch_for(left, num=64, length=8), 1)
    settings = TraceSettings(rse=0.03, max_units=2000, max_unit_batches=1)
    found = {
        head: [measure_traces(model, batches, settings.with_(head=head)) for model in (left, right)]
        for head in ("probed", "closed_form")
    }
    for probed, closed in zip(*found.values(), strict=True):
        for name in ("hessian", "gauss_newton", "residual"):
            one, other = getattr(probed.traces, name), getattr(closed.traces, name)
            assert abs(one.mean - other.mean) < 4 * math.hypot(one.stderr, other.stderr)
    one, other = (paired_difference(*pair).hessian for pair in found.values())
    assert abs(one.mean - other.mean) < 4 * math.hypot(one.stderr, other.stderr)


def test_logits_that_are_not_the_output_layers_alone_are_probed(caplog):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    given = {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 23, "final_logit_softcapping": 0.05}
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, **given, pad_token_id=0)).eval()
    prepare(model, twice_differentiable=False)
    batches = equal_batches(batch_for(model, num=20), 1)
    with caplog.at_level("INFO"):
        assert OutputLayer.of(model, batches[0]) is None
    assert "Gemma2ForCausalLM's logits are not its output layer's alone" in caplog.text
    settings = TraceSettings(rse=0.9, min_units=4)
    probed, closed = (measure_traces(model, batches, settings.with_(head=head)) for head in ("probed", "closed_form"))
    assert closed.units == probed.units


def test_a_bias_of_zero_behind_the_layer_is_seen():
    """It changes no logit where it is, and has a block of its own."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    given = {"vocab_size": 23, "pad_token_id": 0, "mask_token_id": 1, "token_dropout": False}
    torch.manual_seed(0)
    model = EsmForMaskedLM(EsmConfig(**sizes, **given, position_embedding_type="rotary")).eval()
    prepare(model, twice_differentiable=False)
    assert not model.lm_head.bias.any()
    ids = torch.arange(2, 14).view(2, 6)
    batch = {"input_ids": ids, "labels": ids}
    assert OutputLayer.of(model, batch) is None


def test_a_model_that_picks_positions_by_itself_is_probed():
    model = build("llama")
    prepare(model, twice_differentiable=False)
    batch = batch_for(model, num=1)
    assert OutputLayer.of(model, batch) is not None
    states_of = model.model.forward

    def forward(input_ids, **given):
        return CausalLMOutput(logits=model.lm_head(states_of(input_ids=input_ids).last_hidden_state[:, :-1]))

    model.forward = forward
    assert OutputLayer.of(model, batch) is None


def test_a_model_without_input_embeddings_is_probed():
    language = Brackets(name="brackets", num_words_total=8, num_train_sentences=20, num_valid_sentences=4)
    spec = OneLayer(name="one_layer", num_neurons=8, start=Random(name="random"))
    model = spec.build(vocab_size=10, sequence_length=7, seed=3, corpus=language)
    prepare(model, twice_differentiable=False)
    ids = torch.tensor([[0, 1, 2, 3, 4, 5, 9]])
    assert OutputLayer.of(model, {"input_ids": ids, "labels": ids}) is None


def test_an_output_layer_alone_is_probed():
    model, batch = small("llama", tied=False)
    choose_parameters(model, ["lm_head.*"])
    assert OutputLayer.of(model, batch) is None


@pytest.mark.parametrize("width", [8, 10])
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_rows_are_those_of_the_whole_vector(width, distribution):
    probe = Probe({"w": torch.zeros(7, width)}, seed=1, probe=2, distribution=distribution)
    numbers = torch.tensor([6, 0, 3, 3])
    assert torch.equal(probe.rows("w", numbers), probe["w"][numbers])


def test_where_it_does_not_go():
    with pytest.raises(ValueError, match="closed_form goes with products: logit_differences, not exact"):
        TraceSettings(head="closed_form", products="exact")
    model, batch = small("llama", tied=True)
    movable = MovableParameters(named_parameters(model), math.nan)
    with pytest.raises(ValueError, match="a sharded model's output layer is in no worker whole"):
        measure_traces(model, [batch] * 4, TraceSettings(head="closed_form"), movable=movable)
