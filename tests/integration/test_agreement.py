"""Agreement of domains' gradients: as an indicator of a sweep, and trained for."""

import itertools

import numpy as np
import pytest
import torch

from raysweep.errors import SpaceError
from raysweep.runners import run_sweep
from raysweep.space import load
from raysweep.stages.agreement import cosines
from raysweep.train.checkpoints import load_model

SWEEP = """\
name: domains
pretrain:
  data:
    name: text
    domains:
      notes: {train: notes.txt, valid: notes.txt}
      tales: {train: tales.txt, valid: tales.txt}
    tokenizer: {name: bpe, vocab_size: 300}
  model: {name: llama, hidden_size: 16, num_layers: 1, num_heads: 2}
  optimizer: {name: adamw, lr: 1e-2}
  steps: 4
  batch_sequences: 4
  sequence_length: 8
sweep:
  pretrain.flat: {grid: {plain: null, agreeing: {name: gradient_agreement, weight: 0.5}}}
agreement: {num_sequences: 20}
"""


def test_a_sweep_measures_how_far_domains_agree_and_trains_for_it(sweep_file, store, tmp_path):
    (tmp_path / "notes.txt").write_text("la si do re mi fa sol " * 200)
    (tmp_path / "tales.txt").write_text("once upon a time there was a king " * 150)
    space = load(sweep_file(SWEEP))
    run = run_sweep(space, store, runner="inline")
    assert run.failures() == []
    weights = []
    for point in space.points():
        trial = space.trial(point, 0)
        stages = {stage.kind: stage for stage in trial.stages}
        found = store.get(stages["agreement"].id).metrics
        assert found["mean_cosine"] == found["cosine_notes_tales"]
        model = load_model(store.folder(stages["pretrain"].id)).eval()
        weights.append(torch.cat([each.flatten() for each in model.parameters()]))
        assert found["mean_cosine"] == pytest.approx(naive(model, store.folder(stages["tokenize"].id)), rel=1e-4)
    assert not torch.equal(*weights)


def naive(model, tokens) -> float:
    """By gradients of torch's own mean loss."""
    halves = {}
    for domain in ("notes", "tales"):
        flat = np.fromfile(tokens / f"{domain}.valid.bin", np.uint16).astype(np.int64)
        rows = flat[: len(flat) // 8 * 8].reshape(-1, 8)
        rows = rows[np.linspace(0, len(rows) - 1, num=min(20, len(rows))).astype(int)]
        for half in range(2):
            ids = torch.from_numpy(rows[half::2])
            loss = model(input_ids=ids, labels=ids).loss
            parts = torch.autograd.grad(loss, list(model.parameters()))
            halves[domain, half] = torch.cat([part.flatten() for part in parts]).double()
    between = np.mean(
        [float(halves["notes", i] @ halves["tales", j]) for i, j in itertools.product(range(2), repeat=2)]
    )
    sizes = [float(halves[domain, 0] @ halves[domain, 1]) for domain in ("notes", "tales")]
    return between / (sizes[0] * sizes[1]) ** 0.5


def test_noise_of_halves_leaves_the_cosine_where_it_is():
    draw = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 400, generator=draw, dtype=torch.float64)
    other = other + one
    exact = float(one @ other / (one.norm() * other.norm()))

    def noisy(mean):
        return tuple({"w": mean + torch.randn(400, generator=draw, dtype=torch.float64)} for _ in range(2))

    found, plain = [], []
    for _ in range(200):
        left, right = noisy(one), noisy(other)
        found.append(cosines([left, right])[0, 1])
        a, b = left[0]["w"] + left[1]["w"], right[0]["w"] + right[1]["w"]
        plain.append(float(a @ b / (a.norm() * b.norm())))
    error = np.std(found) / 200**0.5
    # A ratio of unbiased numbers is off by the square of their relative error, some 0.1^2 here.
    assert abs(np.mean(found) - exact) < 4 * error + 0.01
    assert np.mean(plain) < exact - 0.1


def test_one_domain_agrees_with_none(sweep_file):
    one = SWEEP.replace("      tales: {train: tales.txt, valid: tales.txt}\n", "").split("sweep:")[0]
    text = f"{one}agreement: {{num_sequences: 20}}\n"
    path = sweep_file(text)
    (path.parent / "notes.txt").write_text("la si do " * 100)
    with pytest.raises(SpaceError, match="agreement compares domains, and data text has one"):
        load(path)
