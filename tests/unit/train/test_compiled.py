"""Compiled blocks: traced once for all blocks and models of a shape; names and numbers stay."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch._dynamo.utils import counters

from raysweep.objectives.causal_lm import CausalLM
from raysweep.resources import Resources
from raysweep.train.compiled import compile_blocks
from raysweep.train.loop import train
from raysweep.train.models import Llama
from raysweep.train.optimizers import AdamW
from raysweep.train.schedules import Constant
from raysweep.worker import Worker


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(24).reshape(3, 8)
    return model(input_ids=ids, labels=ids, use_cache=False).loss


# More shapes than torch keeps by itself.
@pytest.mark.parametrize(("checkpointing", "num_shapes"), [(False, 9), (True, 2)])
def test_one_trace_serves_all_blocks_and_models_of_a_shape(checkpointing, num_shapes):
    torch._dynamo.reset()
    counters.clear()
    for width in [4 * size for size in range(1, 1 + num_shapes) for _ in range(2)]:
        spec = Llama(hidden_size=width, num_layers=3, num_heads=2)
        plain, compiled = (spec.build(vocab_size=24, sequence_length=8, seed=0).train() for _ in range(2))
        if checkpointing:
            compiled.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        compile_blocks(compiled, backend="aot_eager")
        losses = [loss_of(model) for model in (plain, compiled)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(*losses)
        for (name, weight), (same, other) in zip(plain.named_parameters(), compiled.named_parameters(), strict=True):
            assert name == same
            torch.testing.assert_close(weight.grad, other.grad)
    assert counters["stats"]["unique_graphs"] == num_shapes
    assert not counters["graph_break"]


def test_on_gpus_blocks_are_compiled_unless_zero_gathers_weights_as_they_are_used():
    assert not Resources().compiles
    assert Resources(compile=True).compiles
    assert Resources(gpus_per_worker=1, zero_stage=2).compiles
    assert not Resources(gpus_per_worker=1, compile=False).compiles
    assert not Resources(gpus_per_worker=1, zero_stage=3).compiles
    with pytest.raises(ValidationError, match="set zero_stage to 2, or remove compile"):
        Resources(compile=True, zero_stage=3)


@pytest.mark.parametrize(("lengths", "compiled"), [(None, True), (np.array([8, 5]), False)])
def test_training_compiles_where_batches_have_one_shape(lengths, compiled):
    model = Llama(hidden_size=8, num_layers=2, num_heads=2).build(vocab_size=24, sequence_length=8, seed=0)
    ids = np.arange(16).reshape(2, 8)
    batch = {"input_ids": ids, "labels": ids} | ({} if lengths is None else {"lengths": lengths})
    # Which blocks would be compiled is seen without compiling them.
    with torch.compiler.set_stance("force_eager"):
        train(
            model,
            lambda step: batch,
            objective=CausalLM(),
            optimizer=AdamW(lr=1e-3),
            schedule=Constant(name="constant"),
            num_steps=1,
            seed=0,
            worker=Worker(compile=True),
        )
    assert all((block._compiled_call_impl is not None) == compiled for block in model.model.layers)
