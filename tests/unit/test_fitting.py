"""What does not fit a GPU is said, with the cheapest setting that does."""

import pytest
from columns import OF_MODELS, RECIPE

from raysweep.costs import Size
from raysweep.devices import OVERHEAD_TOKENS_GPU, memory_bytes
from raysweep.estimates import Largest, gpu_warnings
from raysweep.fitting import GROWTH, Load, Memory, Options, cheapest_fit
from raysweep.resources import Resources
from raysweep.stages.pretrain import Pretrain
from raysweep.train.models import Llama

MODEL = Llama(hidden_size=2048, num_layers=18, num_heads=16)
NUM = MODEL.num_parameters(50304)
SIZE = Size(NUM, *MODEL.dimensions(), vocab_size=50304, num_bytes=4 * NUM)
SEQUENCES = 512
ONE = Resources(gpus_per_worker=1)
PRETRAIN = Pretrain(recipe=RECIPE.with_(batch_sequences=SEQUENCES), seed=0, step=1)
LENGTH = PRETRAIN.training.length


def fit_of(limit, resources=ONE):
    has = Memory(device=limit, host=2**40)
    fit = cheapest_fit([Load(PRETRAIN, SIZE)], Options.beyond(resources, is_wide=True), resources, lambda gang: has)
    assert fit is None or fit.memory.device == PRETRAIN.memory_bytes(SIZE, fit.resources) <= limit
    return fit


def test_what_is_declared_is_kept_where_it_fits():
    fit = fit_of(PRETRAIN.memory_bytes(SIZE, ONE))
    assert (fit.resources, fit.changes(ONE)) == (ONE, "")
    assert fit.cost == 1 + OVERHEAD_TOKENS_GPU / (SEQUENCES * LENGTH)


def test_the_cheapest_is_taken_of_what_fits():
    whole = PRETRAIN.memory_bytes(SIZE, ONE)
    halved = fit_of(whole - 1)
    assert halved.changes(ONE) == "micro_batch_sequences: 256"
    # The less there is, the more it costs, until only more workers help.
    limits = [whole * part for part in (1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)]
    fits = [fit for limit in limits if (fit := fit_of(limit))]
    keys = [(fit.resources.workers, fit.cost) for fit in fits]
    assert keys == sorted(keys)
    assert fit_of(10 * 2**30).resources.workers in [growth for growth in GROWTH if growth > 1]
    assert fit_of(2**30) is None


def test_what_is_asked_for_is_not_undone():
    declared = Resources(
        gpus_per_worker=1, gradient_checkpointing=True, micro_batch_sequences=4, compile=True, workers=2
    )
    fit = fit_of(PRETRAIN.memory_bytes(SIZE, declared) * 0.9, declared)
    assert fit.resources.gradient_checkpointing
    assert fit.resources.micro_batch_sequences <= 4
    assert fit.resources.zero_stage < 3


def test_a_plan_says_it():
    half = Resources(gpus_per_worker=0.5)
    largest = {"pretrain": Largest(PRETRAIN.memory_bytes(SIZE, half), PRETRAIN, SIZE)}
    (warning,) = gpu_warnings(half, largest, memory_bytes("A100-40GB"))
    assert warning.startswith("memory: pretrain takes about ")
    assert "GiB on a GPU, and a worker has 18.6: of what fits, " in warning
    assert "costs least (resources): about " in warning
    assert gpu_warnings(half, largest, memory_bytes("B200")) == []
    assert gpu_warnings(half, largest, None) == gpu_warnings(Resources(), largest, 1) == []
    (none,) = gpu_warnings(half, largest, 2**30)
    assert "no micro-batch, ZeRO stage, gradient checkpointing or gang" in none


@pytest.mark.parametrize("spec", OF_MODELS, ids=lambda spec: spec.kind)
def test_only_training_has_settings(spec):
    if spec.kind not in ("pretrain", "sft"):
        assert spec.training is None
        (warning,) = gpu_warnings(ONE, {spec.kind: Largest(2**40, spec, SIZE)}, 2**30)
        assert warning.endswith("take GPUs with more memory, or smaller batches")
