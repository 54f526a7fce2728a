"""Loss and gradient of answers alone, in groups of like length, are those of whole padded batches."""

import numpy as np
import pytest
import torch
from tiny_models import CAUSAL, build
from transformers import Gemma2Config, Gemma2ForCausalLM

from raysweep.objectives.causal_lm import IGNORED, AnswerLM, CausalLM
from raysweep.objectives.logits import logits_at
from raysweep.train.loop import train
from raysweep.train.micro_batches import _groups
from raysweep.train.optimizers import AdamW
from raysweep.train.schedules import Constant
from raysweep.worker import Worker

LENGTHS = np.array([5, 12, 7, 30, 6, 28, 5, 9])


def padded_batch(step=0):
    """Rows of `LENGTHS` tokens, whose last three are the answer."""
    draw = np.random.default_rng(step)
    ids = draw.integers(1, 23, size=(len(LENGTHS), LENGTHS.max()))
    places = np.arange(LENGTHS.max())
    ids = np.where(places < LENGTHS[:, None], ids, 0)
    is_answer = (places < LENGTHS[:, None]) & (places >= LENGTHS[:, None] - 3)
    return {"input_ids": ids, "labels": np.where(is_answer, ids, IGNORED)}


def gradient(model, objective):
    model.zero_grad()
    loss = objective.loss_sum(model, {name: torch.from_numpy(values) for name, values in padded_batch().items()})
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("style", CAUSAL)
def test_loss_of_answers_is_that_of_all_logits(style, tied):
    model = build(style, tied=tied).double()
    (loss, grads), (want, want_grads) = gradient(model, AnswerLM()), gradient(model, CausalLM())
    # Rounding of float64; gradients are of order 1 to 100.
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(grads, want_grads, rtol=1e-9, atol=1e-9)


def test_what_follows_the_output_layer_is_still_done():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = Gemma2ForCausalLM(
        Gemma2Config(vocab_size=23, num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.1, **sizes)
    ).eval()
    ids = torch.arange(12).reshape(2, 6)
    rows, columns = torch.tensor([0, 1, 1]), torch.tensor([5, 0, 3])
    logits, _ = logits_at(model, rows, columns, input_ids=ids)
    assert logits.abs().max() < 0.1
    torch.testing.assert_close(logits, model(input_ids=ids).logits[rows, columns])
    # The model is left as it was.
    assert model(input_ids=ids).logits.shape == (2, 6, 23)


def test_a_model_without_a_known_output_layer_computes_all_logits(monkeypatch):
    model = build("llama")
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    ids = torch.arange(12).reshape(2, 6)
    rows, columns = torch.tensor([1]), torch.tensor([3])
    torch.testing.assert_close(
        logits_at(model, rows, columns, input_ids=ids)[0], model(input_ids=ids).logits[rows, columns]
    )


@pytest.mark.parametrize("micro_batch_sequences", [None, 3])
def test_training_in_groups_of_like_length_is_training_in_one(micro_batch_sequences):
    def trained(with_lengths):
        model = build("llama").double()
        given = {"lengths": LENGTHS} if with_lengths else {}
        training = train(
            model,
            lambda step: padded_batch(step) | given,
            objective=AnswerLM(),
            optimizer=AdamW(lr=1e-2),
            schedule=Constant(name="constant"),
            num_steps=3,
            seed=0,
            worker=Worker(micro_batch_sequences=micro_batch_sequences),
        )
        return training.losses, training.weights

    # Losses are added up in float32; weights in float64, after three steps of Adam, which divides by small numbers.
    (losses, weights), (want, want_weights) = trained(True), trained(False)
    assert losses == pytest.approx(want, rel=1e-6)
    torch.testing.assert_close(weights, want_weights, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("overhead", "widths"), [(0, [5, 6, 7, 9, 12, 28, 30]), (10, [7, 12, 30]), (1000, [30])])
def test_groups_weigh_padding_against_their_number(overhead, widths):
    order = np.argsort(LENGTHS, kind="stable")
    groups = _groups(order, LENGTHS, overhead=overhead)
    assert np.concatenate(groups).tolist() == order.tolist()
    assert [LENGTHS[rows].max() for rows in groups] == widths
