"""A model's own samples follow its own distribution, whatever settings its checkpoint ships."""

import pytest
import torch
from tiny_models import build

from raysweep.curvature.language import prepare
from raysweep.curvature.measure import measure_traces
from raysweep.curvature.samples import sample_sequences
from raysweep.curvature.settings import TraceSettings


def test_samples_follow_the_models_distribution():
    model = build("llama", vocab=7)
    model.generation_config.top_k = 1
    model.generation_config.eos_token_id = 3
    ids = sample_sequences(model, 4000, length=3, start=0, seed=0)
    assert ids.shape == (4000, 3)
    assert bool((ids[:, 0] == 0).all())
    with torch.no_grad():
        first = model(torch.tensor([[0]])).logits[0, -1].softmax(-1)
        then = torch.stack([model(torch.tensor([[0, token]])).logits[0, -1].softmax(-1) for token in range(7)])
    joint = (first[:, None] * then).flatten()
    counts = torch.bincount(ids[:, 1] * 7 + ids[:, 2], minlength=49).float()
    # Each count is binomial; 5 standard deviations for the worst of 49.
    assert bool(((counts - 4000 * joint).abs() < 5 * (4000 * joint * (1 - joint)).sqrt() + 1).all())


def test_samples_depend_on_the_seed_alone():
    model = build("gpt2")
    torch.manual_seed(5)
    left = sample_sequences(model, 4, length=8, start=0, seed=1)
    following = torch.rand(1)
    torch.manual_seed(6)
    assert torch.equal(left, sample_sequences(model, 4, length=8, start=0, seed=1))
    assert not torch.equal(left, sample_sequences(model, 4, length=8, start=0, seed=2))
    torch.manual_seed(5)
    assert torch.equal(following, torch.rand(1))


def test_on_its_own_samples_the_hessian_is_the_gauss_newton_matrix():
    model = build("llama", vocab=11)
    prepare(model)
    ids = sample_sequences(model, 160, length=12, start=0, seed=3)
    found = measure_traces(
        model, [{"input_ids": part} for part in ids.split(2)], TraceSettings(rse=0.03, min_units=16, max_units=80)
    )
    assert abs(found.traces.residual.mean) < 4 * found.traces.residual.stderr
    assert found.traces.residual.stderr < 0.25 * found.traces.gauss_newton.mean


def test_a_masked_model_has_no_samples():
    with pytest.raises(ValueError, match="no samples of its own"):
        sample_sequences(build("bert"), 2, length=4, start=0, seed=0)
