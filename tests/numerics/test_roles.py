"""The trace by what parameters are for, and the closed form that feature norm gives it."""

import pytest
import torch
from tiny_models import STYLES, batch_for, build

from raysweep.curvature import TraceSettings, measure_traces, prepare
from raysweep.curvature.language import IGNORED, targets, token_logits
from raysweep.curvature.roles import ROLES, blocks_of, feature_trace, roles_of


def head_fisher(model, batch):
    """sum over tokens and labels of p(y) |grad log p(y)|^2 with respect to the head's matrix, and the tokens."""
    logits, labels = token_logits(model, batch), targets(model, batch)
    weight = model.get_output_embeddings().weight
    total, places = 0.0, (labels != IGNORED).nonzero().tolist()
    for row, column in places:
        log_p = logits[row, column].log_softmax(dim=-1)
        for label in range(len(log_p)):
            (slope,) = torch.autograd.grad(log_p[label], weight, retain_graph=True)
            total += float(log_p[label].exp() * slope.square().sum())
    return total, len(places)


@pytest.mark.parametrize("style", STYLES)
def test_the_heads_trace_is_the_norm_of_its_features(style):
    model = build(style, tied=False, vocab=9)
    prepare(model)
    batches = [batch_for(model, num=2, seed=seed) for seed in range(2)]
    sums = [head_fisher(model, batch) for batch in batches]
    found = feature_trace(model, batches)
    # Gradients in float32.
    assert found.mean == pytest.approx(sum(total for total, _ in sums) / sum(num for _, num in sums), rel=1e-4)
    assert found.stderr > 0


@pytest.mark.parametrize("tied", [True, False])
def test_roles_add_up_to_the_whole(tied):
    model = build("bert", tied=tied)
    prepare(model)
    batches = [batch_for(model, num=1, seed=seed) for seed in range(6)]
    measured = measure_traces(model, batches, TraceSettings(rse=0.5, min_units=4, max_units=6, parts=True))
    roles, parts = measured.roles(roles_of(model)), measured.parts("parameter")
    assert set(roles) == set(ROLES)
    assert sum(part.fisher.mean for part in roles.values()) == pytest.approx(
        sum(part.fisher.mean for part in parts.values())
    )
    embeddings = ["word_embeddings"] * (not tied) + ["position_embeddings", "token_type_embeddings"]
    assert roles["embeddings"].fisher.mean == pytest.approx(
        sum(parts[f"bert.embeddings.{name}.weight"].fisher.mean for name in embeddings)
    )


@pytest.mark.parametrize("style", STYLES)
def test_blocks_add_up_to_their_role_and_have_errors_of_their_own(style):
    model = build(style)
    prepare(model, twice_differentiable=True)
    batches = [batch_for(model, num=1, seed=seed) for seed in range(6)]
    settings = TraceSettings(rse=0.5, min_units=4, max_units=6, parts=True, products="exact")
    measured = measure_traces(model, batches, settings)
    blocks, parts = measured.roles(blocks_of(model)), measured.parts("parameter")
    assert set(blocks) == {"block_0", "block_1", "none"}
    for trace in ("fisher", "hessian"):
        of_blocks = {name: getattr(part, trace) for name, part in blocks.items()}
        whole = sum(getattr(part, trace).mean for part in parts.values())
        assert sum(each.mean for each in of_blocks.values()) == pytest.approx(whole)
        first = [getattr(part, trace).mean for name, part in parts.items() if ".0." in name]
        assert of_blocks["block_0"].mean == pytest.approx(sum(first))
        assert all(each.stderr > 0 for each in of_blocks.values())
