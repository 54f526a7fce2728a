"""What training is said to hold: against autograd's own list of what it keeps, and as it follows from the gang."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from raysweep.costs import UNKNOWN, Size
from raysweep.memory import STATE_FILE, Step, block_bytes, held_bytes, product_bytes, training_bytes
from raysweep.train.models import Bert, Llama, Transformers
from raysweep.train.saved_state import FILE_BYTES

HIDDEN, HEADS, LENGTH, VOCABULARY = 32, 4, 24, 64
SIZES = {"hidden_size": HIDDEN, "num_heads": HEADS}
MODELS = {
    "llama": lambda layers: Llama(num_layers=layers, intermediate_size=88, **SIZES),
    "bert": lambda layers: Bert(name="bert", num_layers=layers, **SIZES),
    "gpt2": lambda layers: Transformers(
        name="transformers",
        architecture="GPT2LMHeadModel",
        fields={"n_embd": HIDDEN, "n_head": HEADS, "n_layer": layers, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
    ),
}
ONE = Size(2**20, 4, 64, 4, 1000, vocab_size=1000, num_bytes=0)
STEP = Step(tokens=64, optimizer_floats=2)


def kept(model, *, in_half):
    """Bytes that autograd keeps for the backward pass of a batch of two, but for weights and their copies."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    shapes = {tuple(shape) for weight in model.parameters() for shape in (weight.shape, weight.T.shape)}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and not (in_half and tuple(tensor.shape) in shapes):
            storages[storage.data_ptr()] = storage
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16) if in_half else nullcontext(),
    ):
        model(input_ids=torch.zeros(2, LENGTH, dtype=torch.long)).logits.float().sum()
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("in_half", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_block_keeps_what_autograd_says(name, in_half):
    specs = [MODELS[name](layers) for layers in (1, 2)]
    one, two = (spec.build(vocab_size=VOCABULARY, sequence_length=LENGTH, seed=0).train() for spec in specs)
    measured = (kept(two, in_half=in_half) - kept(one, in_half=in_half)) / (2 * LENGTH)
    size = Size(1, *specs[0].dimensions(), vocab_size=VOCABULARY, num_bytes=0)
    planned = block_bytes(size, Step(tokens=1, optimizer_floats=2, in_half=in_half))
    # One formula for all: a Llama's norms, which are not fused on a CPU, keep two tensors more than a BERT's.
    assert planned == pytest.approx(measured, rel=0.25)


def test_zero_shards_what_it_says():
    held = [held_bytes(ONE, Step(tokens=64, optimizer_floats=2, zero_stage=stage, num_workers=4)) for stage in range(4)]
    num = ONE.num_parameters
    assert held[0] == (4 * num, 4 * num, 8 * num)
    # With masters of the weights that it steps; ZeRO-3 beside what it has gathered.
    assert held[1] == (4 * num, 4 * num, 12 * num / 4)
    assert held[2] == (4 * num, num, 12 * num / 4)
    assert held[3] == (num + 4 * num, num, 12 * num / 4)


def test_what_saves_memory_does():
    step = replace(STEP, tokens=2**14, on_gpu=True, in_half=True)
    whole = training_bytes(ONE, step)
    assert training_bytes(ONE, replace(step, recomputed=True)) < 0.6 * whole
    assert training_bytes(ONE, replace(step, tokens=2**12, accumulates=True)) < 0.4 * whole
    assert training_bytes(ONE, replace(step, compiled=True)) < whole < training_bytes(ONE, replace(step, in_half=False))
    # Of all logits in 32 bits.
    assert training_bytes(ONE, replace(step, logit_tokens=step.tokens)) > whole


def test_a_product_takes_what_its_way_does():
    given = {"sequences": 1, "length": 512}
    ways = [product_bytes(ONE, way, **given) for way in ("logit_differences", "gradient_differences", "exact")]
    assert ways == sorted(ways)
    assert product_bytes(ONE, "logit_differences", shards=4, **given) < ways[0]
    assert product_bytes(ONE, "logit_differences", parts=True, **given) > ways[0]


def test_nothing_is_held_of_a_model_that_is_not_known():
    assert training_bytes(UNKNOWN, STEP) == 0
    assert product_bytes(UNKNOWN, "exact", sequences=1, length=8) == 0


def test_a_state_is_copied_in_files_of_this_size():
    assert STATE_FILE == FILE_BYTES
