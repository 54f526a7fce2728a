"""Measures of a checkpoint's own loss around its weights: each against a naive reference, of every kind of model."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from tiny import pretrain, recipe_of, tokens_of

from raysweep.curvature.probes import key
from raysweep.data.brackets import Brackets
from raysweep.data.pcfg import PCFG
from raysweep.objectives.adversary import Adversary
from raysweep.objectives.base import IGNORED
from raysweep.objectives.causal_lm import CausalLM
from raysweep.objectives.masked_lm import MaskedLM
from raysweep.objectives.prefix_lm import PrefixLM
from raysweep.stages.base import Subject
from raysweep.stages.noise import Noise
from raysweep.train.checkpoints import load_model
from raysweep.train.models import Bert, Llama
from raysweep.train.one_layer import OneLayer
from raysweep.worker import Worker

GRAMMAR = PCFG(
    num_words_total=16,
    num_nonterminals=4,
    num_rules=2,
    num_words=3,
    sentence_length=4,
    num_train_sentences=400,
    num_valid_sentences=40,
)
BRACKETS = Brackets(
    name="brackets", num_words_total=8, sentence_length=4, num_train_sentences=400, num_valid_sentences=40
)
LLAMA = Llama(hidden_size=16, num_layers=1, num_heads=2)
MASKED = MaskedLM(name="masked_lm", mask="one")
CASES = {
    "llama": (GRAMMAR, LLAMA, CausalLM()),
    "prefix": (GRAMMAR, LLAMA, PrefixLM(name="prefix_lm")),
    "adversary": (GRAMMAR, LLAMA, Adversary(name="adversary", strength=0.05)),
    "bert": (GRAMMAR, Bert(name="bert", hidden_size=16, num_layers=1, num_heads=2), MASKED),
    "one_layer": (BRACKETS, OneLayer(name="one_layer", num_neurons=8), MASKED),
}


class Case(NamedTuple):
    """A checkpoint, the text it was trained on, and what measurements are bound to."""

    inputs: dict
    subject: Subject


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory) -> Case:
    corpus, model, objective = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    tokens, out = tokens_of(corpus, folder / "tokens"), folder / "checkpoint"
    recipe = recipe_of(corpus, model=model, objective=objective, steps=12, batch_sequences=8)
    pretrain(recipe, tokens, out, step=12)
    return Case({"tokens": tokens, "checkpoint": out}, Subject(corpus, objective, corpus.row_length, tasks={}))


def loss_of(model, rows: dict, objective) -> torch.Tensor:
    """Mean loss by torch's own cross-entropy of all logits."""
    batch = {name: torch.from_numpy(values) for name, values in rows.items() if name in ("input_ids", "labels")}
    given = {}
    if "prefix_lengths" in rows:
        places = torch.arange(batch["input_ids"].shape[1])
        prefix = torch.from_numpy(rows["prefix_lengths"])[:, None, None, None]
        sees = (places[None, :] <= places[:, None]) | (places < prefix)
        given["attention_mask"] = torch.where(sees, 0.0, torch.finfo(torch.float32).min)
    logits = model(input_ids=batch["input_ids"], **given).logits
    labels = batch["labels"]
    if objective.head == "causal":
        logits, labels = logits[:, :-1], labels[:, 1:]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def test_noise_raises_the_loss_by_as_much_as_a_naive_loop_says(case, tmp_path):
    spec = Noise(num_sequences=40, num_draws=2, absolute=(0.05,), per_tensor=(0.3,), per_row=(0.3,)).bind(case.subject)
    metrics = spec.run(case.inputs, tmp_path, Worker())
    assert sorted(metrics) == sorted(metric.name for metric in spec.metrics(case.subject.corpus))
    rows = spec.text.rows(case.inputs["tokens"], case.inputs["checkpoint"], num_sequences=40)
    scales = {
        "absolute_0.05": lambda weight: 0.05,
        "per_tensor_0.3": lambda weight: 0.3 * weight.square().mean() ** 0.5,
        # A vector is one row.
        "per_row_0.3": lambda weight: 0.3 * weight.view(-1, weight.shape[-1]).square().mean(dim=1) ** 0.5,
    }
    for name, scale in scales.items():
        losses = []
        for draw in range(2):
            for way in (1, -1):
                model = load_model(case.inputs["checkpoint"]).eval()
                with torch.no_grad():
                    before = loss_of(model, rows, spec.text.loss)
                    for of, weight in model.named_parameters():
                        stream = np.random.Generator(np.random.Philox(key=key(0, draw, of)))
                        normal = torch.from_numpy(stream.standard_normal(weight.numel())).float()
                        size = torch.as_tensor(scale(weight)).view(-1, *[1] * (weight.ndim - 1))
                        weight += way * size * normal.view(weight.shape)
                    losses.append(float(loss_of(model, rows, spec.text.loss) - before))
        # Losses of some nats in float32, whose differences are good to 1e-6.
        assert metrics[f"rise_{name}"] == pytest.approx(np.mean(losses), rel=1e-3, abs=3e-6)
        assert metrics[f"rise_{name}_stderr"] > 0
