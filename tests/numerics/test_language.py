"""The mean token loss: labels, padding and masks counted right, for causal and masked models."""

import math

import pytest
import torch
from tiny_models import CAUSAL, STYLES, batch_for, build
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel
from transformers.activations import NewGELUActivation

from raysweep.curvature.language import (
    IGNORED,
    is_causal,
    mean_token_loss,
    predicting_logits,
    prepare,
    targets,
    token_logits,
)


@pytest.mark.parametrize("style", STYLES)
def test_loss_is_hugging_faces(style):
    model = build(style)
    batch = batch_for(model)
    theirs = model(**{"labels": batch["input_ids"], **batch}).loss
    assert float(mean_token_loss(model, batch)) == pytest.approx(float(theirs), rel=1e-5)
    assert is_causal(model) == (style != "bert")


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing(style, side):
    model = build(style)
    batch = batch_for(model)
    num = len(batch["input_ids"])
    if style == "bert" and side == "left":
        pytest.skip("BERT's positions are absolute: padding it on the left is another input")

    def pad(tensor, value):
        filler = torch.full((num, 3), value)
        return torch.cat([filler, tensor] if side == "left" else [tensor, filler], dim=1)

    padded = {
        "input_ids": pad(batch["input_ids"], 2),
        "attention_mask": pad(torch.ones_like(batch["input_ids"]), 0),
    }
    if "labels" in batch:
        padded["labels"] = pad(batch["labels"], 5)
    assert float(mean_token_loss(model, padded)) == pytest.approx(float(mean_token_loss(model, batch)), rel=1e-5)
    assert (targets(model, padded) != -100).sum() == (targets(model, batch) != -100).sum()


def test_ignored_labels_are_not_counted():
    model = build("llama")
    batch = batch_for(model)
    labels = batch["input_ids"].clone()
    labels[0] = -100
    rest = {"input_ids": batch["input_ids"][1:]}
    ignored = {**batch, "labels": labels}
    assert float(mean_token_loss(model, ignored)) == pytest.approx(float(mean_token_loss(model, rest)), rel=1e-5)


@pytest.mark.parametrize("style", STYLES)
def test_logits_where_a_token_is_predicted_are_those_of_all_positions(style):
    model = build(style)
    batch = batch_for(model)
    labels = batch.get("labels", batch["input_ids"]).clone()
    labels[0, :3] = IGNORED
    batch = {**batch, "labels": labels}
    counted = targets(model, batch) != IGNORED
    logits, wanted = predicting_logits(model, batch)
    assert torch.allclose(logits, token_logits(model, batch)[counted], atol=1e-6)
    assert torch.equal(wanted, targets(model, batch)[counted])


def test_logits_are_in_float32_at_least():
    model = build("gpt2")
    assert token_logits(model.bfloat16(), batch_for(model)).dtype == torch.float32
    assert token_logits(model.double(), batch_for(model)).dtype == torch.float64


def test_what_cannot_be_measured_is_named():
    model = build("llama")
    ids = batch_for(model)["input_ids"]
    with pytest.raises(ValueError, match=r"no token is predicted in a batch of shape \(3, 6\)"):
        targets(model, {"input_ids": ids, "labels": torch.full_like(ids, -100)})
    with pytest.raises(ValueError, match="needs labels"):
        targets(build("bert"), {"input_ids": ids})
    with pytest.raises(ValueError, match="BertModel predicts no tokens"):
        is_causal(BertModel(BertConfig(hidden_size=4, num_attention_heads=1, num_hidden_layers=1, intermediate_size=4)))


def test_dropout_is_refused_and_prepare_turns_it_off(caplog):
    model = GPT2LMHeadModel(GPT2Config(n_embd=4, n_layer=1, n_head=1, vocab_size=7, n_positions=8, resid_pdrop=0.1))
    batch = {"input_ids": torch.tensor([[1, 2, 3]])}
    model.train()
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"dropout is on in 'transformer"):
        mean_token_loss(model, batch)
    with caplog.at_level("INFO"):
        prepare(model)
    assert "switched from sdpa to eager" in caplog.text
    assert math.isfinite(float(mean_token_loss(model, batch).detach()))


def test_activations_in_one_operation_are_the_same_function():
    model = build("gpt2").double()  # In float32 machines differ by what each of the eight operations rounds.
    batch, inputs = batch_for(model), model.transformer.h[0].mlp
    before = token_logits(model.eval(), batch)
    assert type(inputs.act) is NewGELUActivation
    prepare(model)
    assert type(inputs.act) is torch.nn.GELU
    torch.testing.assert_close(token_logits(model, batch), before, rtol=1e-10, atol=1e-10)


def test_train_mode_without_dropout_is_eval_mode():
    model = build("llama")
    batch = batch_for(model)
    quiet = float(mean_token_loss(model.eval(), batch))
    assert float(mean_token_loss(model.train(), batch)) == quiet


@pytest.mark.parametrize("style", CAUSAL)
def test_a_prefix_sees_itself_and_is_not_predicted(style):
    model = build(style).double()
    ids = torch.randint(1, 23, (2, 6), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "prefix_lengths": torch.tensor([2, 4])}
    assert (targets(model, batch) != IGNORED).tolist() == [[False, True, True, True, True], [False] * 3 + [True] * 2]
    want = []
    for row, prefix in ((0, 2), (1, 4)):
        blocked = torch.ones(6, 6, dtype=torch.float64).triu(1)
        blocked[:prefix, :prefix] = 0
        mask = (blocked * torch.finfo(torch.float64).min)[None, None]
        log_p = model(input_ids=ids[row : row + 1], attention_mask=mask).logits[0].log_softmax(dim=-1)
        want += [-log_p[place - 1, ids[row, place]] for place in range(prefix, 6)]
    torch.testing.assert_close(mean_token_loss(model, batch), torch.stack(want).mean(), rtol=1e-10, atol=0)


def test_a_label_within_a_prefix_is_refused():
    model, ids = build("llama"), torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="it would be predicted from itself"):
        targets(model, {"input_ids": ids, "labels": ids, "prefix_lengths": torch.tensor([2])})
