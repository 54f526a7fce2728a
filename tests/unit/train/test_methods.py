"""Methods of fine-tuning: LoRA by PEFT against LoRA by hand, on each kind of model, and what it says it costs."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import build

from raysweep.costs import Size
from raysweep.errors import SpaceError, StageError
from raysweep.memory import Step, held_bytes, training_bytes
from raysweep.objectives.causal_lm import CausalLM
from raysweep.train.classifier import Classifier
from raysweep.train.loop import train
from raysweep.train.methods import Full, LoRA
from raysweep.train.models import Bert, Llama, Transformers
from raysweep.train.optimizers import AdamW
from raysweep.train.schedules import Constant
from raysweep.worker import Worker

pytest.importorskip("peft", reason="PEFT, of the extra 'lora', is not installed")

SIZES = {"hidden_size": 16, "num_layers": 2, "num_heads": 2}
MODELS = {
    "llama": Llama(**SIZES),
    "bert": Bert(name="bert", **SIZES),
    "gpt2": Transformers(
        name="transformers", architecture="GPT2LMHeadModel", fields={"n_embd": 16, "n_layer": 2, "n_head": 2}
    ),
}
VOCABULARY, LENGTH = 40, 8
IDS = torch.arange(24).reshape(3, LENGTH) % 11


def model_of(name: str, **changes: object) -> torch.nn.Module:
    return MODELS[name].with_(**changes).build(vocab_size=VOCABULARY, sequence_length=LENGTH, seed=0)


def trained(model: torch.nn.Module, *, lr: float = 1e-2, num_steps: int = 6, seed: int = 0) -> list[float]:
    def batch(step: int) -> dict[str, np.ndarray]:
        ids = ((IDS + step) % 11).numpy()
        return {"input_ids": ids, "labels": ids}

    return train(
        model,
        batch,
        objective=CausalLM(),
        optimizer=AdamW(lr=lr, weight_decay=0.01),
        schedule=Constant(name="constant"),
        num_steps=num_steps,
        seed=seed,
        worker=Worker(),
    ).losses


@pytest.mark.parametrize("inside", ["language model", "classifier"])
@pytest.mark.parametrize("name", MODELS)
def test_an_untrained_adapter_leaves_the_function_to_the_bit(name, inside):
    model = model_of(name)
    if inside == "classifier":
        model = Classifier(model, length=LENGTH, num_classes=3, seed=0)
    of = (lambda: model(IDS)) if inside == "classifier" else lambda: model(input_ids=IDS).logits
    before, weights, drawn = of(), {n: each.clone() for n, each in model.state_dict().items()}, torch.get_rng_state()
    merge = LoRA(name="lora", r=4).begin(model, seed=1)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert torch.equal(of(), before)
    learns = {n for n, each in model.named_parameters() if each.requires_grad}
    assert {n for n in learns if ".lora_" not in n} == ({"head.weight", "head.bias"} & weights.keys())
    merge()
    assert torch.equal(of(), before)
    assert all(torch.equal(each, weights[n]) for n, each in model.state_dict().items())
    assert all(each.requires_grad for each in model.parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_merged_model_is_the_trained_one(name):
    model = model_of(name)
    merge = LoRA(name="lora", r=4, lora_alpha=16).begin(model, seed=1)
    start = {n: each.detach().clone() for n, each in model.named_parameters() if not each.requires_grad}
    losses = trained(model)
    assert losses[-1] < losses[0]
    assert all(torch.equal(each, start[n]) for n, each in model.named_parameters() if n in start)
    model.eval()
    apart = model(input_ids=IDS).logits
    merge()
    # W x + s B (A x) against (W + s B A) x, in float32.
    torch.testing.assert_close(model(input_ids=IDS).logits, apart, rtol=1e-4, atol=1e-5)


class ByHand(torch.nn.Module):
    """A linear layer of frozen weight W, which gives (W + s B A) x."""

    def __init__(self, layer: torch.nn.Linear, *, a: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(layer.weight.detach(), requires_grad=False)
        self.a = torch.nn.Parameter(a.detach().clone())
        self.b = torch.nn.Parameter(torch.zeros(layer.out_features, len(a)))
        self.scale = scale

    @property
    def merged(self) -> torch.Tensor:
        return self.weight + self.scale * self.b @ self.a

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.merged)


def test_lora_trains_as_written_by_hand():
    lora = LoRA(name="lora", r=3, lora_alpha=6, target_modules=("down_proj",))
    model, other = model_of("llama", num_layers=1), model_of("llama", num_layers=1)
    merge = lora.begin(model, seed=1)
    adapters = {n: each for n, each in model.named_parameters() if each.requires_grad}
    assert [tuple(each.shape) for each in adapters.values()] == [(3, 48), (16, 3)]
    mlp = other.model.layers[0].mlp
    other.requires_grad_(False)
    mlp.down_proj = by_hand = ByHand(mlp.down_proj, a=next(iter(adapters.values())), scale=6 / 3)
    optimizer = torch.optim.AdamW([by_hand.a, by_hand.b], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.01)
    losses = []
    for step in range(6):
        ids = (IDS + step) % 11
        logits = other(input_ids=ids).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_([by_hand.a, by_hand.b], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    # Sums in another order, in float32; AdamW's first steps amplify what differs in small gradients.
    assert trained(model) == pytest.approx(losses, rel=1e-5)
    merge()
    torch.testing.assert_close(model.model.layers[0].mlp.down_proj.weight, by_hand.merged, rtol=1e-3, atol=1e-5)


def test_dropout_follows_from_the_seed():
    def weights(seed):
        model = model_of("llama")
        merge = LoRA(name="lora", lora_dropout=0.5).begin(model, seed=seed)
        trained(model, num_steps=2, seed=seed)
        merge()
        return torch.cat([each.flatten() for each in model.state_dict().values()])

    first = weights(0)
    torch.rand(5)  # What was drawn before is of no account.
    assert torch.equal(weights(0), first)
    assert not torch.equal(weights(1), first)


def test_only_adapters_have_an_optimizers_state():
    model = model_of("llama")
    LoRA(name="lora", r=2).begin(model, seed=0)
    optimizer = AdamW(lr=1e-2).build(model)
    stepped = sum(each.numel() for group in optimizer.param_groups for each in group["params"])
    size = Size(model_of("llama").num_parameters(), *MODELS["llama"].dimensions(), vocab_size=VOCABULARY, num_bytes=0)
    # All but the norms' weights, which have no matrices beside them, are counted: 2 of 16 numbers a block, and 1 more.
    assert size.adapter_parameters(2) == stepped + 2 * (2 * 2 + 1)


def test_a_layer_that_is_not_there():
    lora = LoRA(name="lora", target_modules=("q_proj", "query"))
    wanted = r"has no linear layer 'query' inside; it has q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    with pytest.raises(SpaceError, match=f"target_modules: LlamaForCausalLM {wanted}"):
        lora.check_model(MODELS["llama"])
    with pytest.raises(StageError, match=f"target_modules: LlamaForCausalLM {wanted}"):
        lora.begin(model_of("llama"), seed=0)
    for outside in ("lm_head", "embed_tokens"):
        with pytest.raises(SpaceError, match=f"no linear layer '{outside}' inside"):
            LoRA(name="lora", target_modules=(outside,)).check_model(MODELS["llama"])
    LoRA(name="lora", target_modules=("c_attn",)).check_model(MODELS["gpt2"])


def test_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    Full().check_installed()
    with pytest.raises(SpaceError, match=r"needs PEFT, which is not installed: pip install 'raysweep\[lora\]'"):
        LoRA(name="lora").check_installed()
    with pytest.raises(StageError, match=r"lora needs PEFT: pip install 'raysweep\[lora\]'"):
        LoRA(name="lora").begin(build("llama"), seed=0)


def test_the_same_layers_in_another_order_are_one_method():
    some = [LoRA(name="lora", target_modules=names) for names in (("v_proj", "q_proj"), ("q_proj", "v_proj"))]
    assert some[0] == some[1]


def test_what_frozen_weights_save():
    size = Size(10**9, 16, 2048, 16, inner_numbers=20_000, vocab_size=32_000, num_bytes=0)
    lora = LoRA(name="lora", r=8).adapters
    num = size.adapter_parameters(8)
    assert num < size.num_parameters / 100
    assert size.gradient_flops(1, 0, adapters=lora) == 4 * size.num_parameters + 6 * num
    full, frozen = (Step(tokens=512, optimizer_floats=2, logit_tokens=0, adapters=each) for each in (None, lora))
    assert held_bytes(size, frozen) == (4 * (size.num_parameters + num), 4 * num, 8 * num)
    assert training_bytes(size, frozen) < 0.4 * training_bytes(size, full)
