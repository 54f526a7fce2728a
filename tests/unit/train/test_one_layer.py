"""The one-layer model: its exact solutions have the lowest loss, the traces of the formula, and open anywhere."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from bracket_theory import all_contexts, gap, minimal_loss, trace
from pydantic import ValidationError
from tiny import pretrain, recipe_of, tokens_of
from transformers import AutoModelForMaskedLM

from raysweep.curvature.language import mean_token_loss
from raysweep.data.brackets import Brackets
from raysweep.data.hmm import HMM
from raysweep.objectives.masked_lm import MaskedLM
from raysweep.train.checkpoints import load_model
from raysweep.train.one_layer import LookUp, OneLayer, Random, Transferable

LANGUAGE = Brackets(name="brackets", num_words_total=8, num_train_sentences=200, num_valid_sentences=40)
CONTEXTS = all_contexts(LANGUAGE)
STARTS = {
    "transferable": Transferable(name="transferable"),
    "look_up": LookUp(name="look_up"),
    "type_blind": LookUp(name="look_up", type_share=0.3),
}


def build(start, *, activation="relu", num_neurons=32):
    spec = OneLayer(name="one_layer", num_neurons=num_neurons, activation=activation, start=start)
    return spec.build(vocab_size=10, sequence_length=7, seed=3, corpus=LANGUAGE).double()


def weights(model):
    return model.model.hidden.weight.detach(), model.lm_head.weight.detach()


def test_contexts_are_those_of_the_language():
    ids = CONTEXTS.ids.numpy()
    words = np.concatenate([ids[:, 1:-1] - 1, np.zeros((len(ids), 1), np.int64)], axis=1)
    truth = LANGUAGE.word_probabilities(words, seen="around")[:, -1]
    np.testing.assert_allclose(CONTEXTS.truth, truth, rtol=1e-12)
    assert float(CONTEXTS.probability.sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("activation", ["relu", "linear"])
@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_solutions_have_the_lowest_loss(start, activation):
    model = build(start, activation=activation)
    logits = model(CONTEXTS.ids).logits[:, -1, 1:-1].detach()
    # Weights are float32's; the gap is quadratic in what that rounds off, 1e-7.
    assert (
        CONTEXTS.probability[:, None] * CONTEXTS.truth * (CONTEXTS.truth.log() - logits.log_softmax(1))
    ).sum() < 1e-8
    loss = -(CONTEXTS.probability[:, None] * CONTEXTS.truth * logits.log_softmax(1)).sum()
    assert float(loss) == pytest.approx(minimal_loss(CONTEXTS), abs=1e-8)
    assert gap(CONTEXTS, *weights(model), activation=activation) < 1e-8


@pytest.mark.parametrize("activation", ["relu", "linear"])
@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_the_trace_by_autodiff_is_that_of_the_formula(start, activation):
    hidden, output = weights(build(start, activation=activation, num_neurons=16))
    z, expected = CONTEXTS.z, CONTEXTS.probability[:, None] * CONTEXTS.truth

    def loss(flat):
        h = z @ flat[: hidden.numel()].view_as(hidden).T
        logits = (h.relu() if activation == "relu" else h) @ flat[hidden.numel() :].view_as(output).T
        return -(expected * logits.log_softmax(dim=1)).sum()

    hessian = torch.autograd.functional.hessian(loss, torch.cat([hidden.flatten(), output.flatten()]))
    # At an exact minimiser the two are equal; float32 weights leave a residual of 1e-7 times their second derivative.
    assert float(hessian.trace()) == pytest.approx(
        float(trace(CONTEXTS, hidden, output, activation=activation)), rel=1e-6
    )


def test_the_transferable_solution_is_flatter_and_its_scale_the_flattest():
    traces = {name: float(trace(CONTEXTS, *weights(build(start)))) for name, start in STARTS.items()}
    assert 5 * traces["transferable"] < traces["look_up"] < traces["type_blind"]
    hidden, output = weights(build(STARTS["transferable"]))
    for factor in (0.95, 1.05):
        assert float(trace(CONTEXTS, hidden * factor, output / factor)) > traces["transferable"]


def test_a_perturbation_is_relative_to_the_weights():
    exact, moved = build(LookUp(name="look_up")), build(LookUp(name="look_up", perturbation=0.1))
    for before, after in zip(weights(exact), weights(moved), strict=True):
        ratio = (after - before).square().mean() / before.square().mean()
        assert float(ratio) == pytest.approx(0.01, rel=0.2)  # Of 256 numbers; 5 % is the sd of their mean square.


def test_a_trained_model_opens_as_any_other(tmp_path):
    tokens = tokens_of(LANGUAGE, tmp_path / "tokens")
    model = OneLayer(name="one_layer", num_neurons=16, start=LookUp(name="look_up"))
    objective = MaskedLM(name="masked_lm", mask="one")
    recipe = recipe_of(LANGUAGE, model=model, objective=objective, sequence_length=7)
    pretrain(recipe, tokens, tmp_path / "out", step=2)
    opened = load_model(tmp_path / "out")
    # In a process that knows nothing of raysweep but this one import.
    code = (
        "import sys, torch, raysweep.train.one_layer_model; from transformers import AutoModelForMaskedLM; "
        "model = AutoModelForMaskedLM.from_pretrained(sys.argv[1]); "
        "print(float(model(torch.tensor([[0, 1, 2, 3, 4, 5, 9]])).logits[0, -1, 3]))"
    )
    run = [sys.executable, "-c", code, str(tmp_path / "out")]
    said = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    ids = torch.tensor([[0, 1, 2, 3, 4, 5, 9]])
    assert float(said) == pytest.approx(float(opened(ids).logits[0, -1, 3]), abs=1e-6)
    assert type(AutoModelForMaskedLM.from_pretrained(tmp_path / "out")) is type(opened)
    loss = mean_token_loss(opened, {"input_ids": ids, "labels": torch.tensor([[-100] * 6 + [8]])})
    assert 1 < float(loss) < 3


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        (
            {"start": LookUp(name="look_up")},
            HMM(sentence_length=6),
            "start look_up is a solution of data brackets alone",
        ),
        ({"start": LookUp(name="look_up"), "num_neurons": 14}, LANGUAGE, "start look_up takes 16 for 8 words"),
        ({"start": Random(), "num_neurons": 3}, LANGUAGE, "num_neurons 3: neurons of a start come in pairs"),
    ],
)
def test_what_cannot_be_started_is_refused(model, data, words):
    with pytest.raises(ValidationError, match=words):
        recipe_of(
            data,
            model=OneLayer(name="one_layer", **model),
            objective=MaskedLM(name="masked_lm", mask="one"),
            sequence_length=7,
        )
