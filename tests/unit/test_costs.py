"""What stages say they cost: every kind says it, and a kind that does not is refused."""

import math
from typing import ClassVar

import pytest
from columns import CORPUS, OF_MODELS, OF_TASKS, RECIPE, TASK

from raysweep.costs import UNKNOWN, Size
from raysweep.resources import Resources
from raysweep.stages.base import StageSpec
from raysweep.stages.early_sft import EarlySft
from raysweep.stages.enlarge import Enlarge
from raysweep.stages.fetch import Fetch
from raysweep.stages.indicators import Indicators
from raysweep.stages.optimizer_state import OptimizerState
from raysweep.stages.pretrain import Pretrain
from raysweep.stages.tokenize import Tokenize

SIZE = Size(
    num_parameters=1000, num_layers=2, hidden_size=8, num_heads=2, inner_numbers=96, vocab_size=50, num_bytes=4000
)
STATE = OptimizerState(pretrain=Pretrain(recipe=RECIPE, seed=0, step=1))
LARGER = Enlarge(model=RECIPE.model, vocab_size=50)
EVERY = (*OF_MODELS, *OF_TASKS, STATE, LARGER, Tokenize(corpus=CORPUS), Fetch(source="hub/model@1", fingerprint="1"))
# Why they take none: tokens are drawn or read without a model, a checkpoint is copied, a state is there already.
WITHOUT_FLOPS = {"tokenize", "fetch", "optimizer_state", "curve"}
WITHOUT_MEMORY = {"tokenize", "fetch", "curve"}
# Whatever the size of the checkpoint is.
OF_THEIR_OWN = {"tokenize": CORPUS.tokens_bytes(), "enlarge": LARGER.model_size.num_bytes}
LEAVE = {"pretrain": 4000, "optimizer_state": 2 * 4 * 1000} | OF_THEIR_OWN


def test_no_kind_of_stage_is_missing_here():
    kinds = {kind for kind in StageSpec.__subclasses__() if kind.__module__.startswith("raysweep.stages.")}
    assert {type(spec) for spec in EVERY} == kinds


@pytest.mark.parametrize("spec", EVERY, ids=lambda spec: spec.kind)
def test_every_kind_says_what_it_costs(spec):
    flops, memory = spec.flops(SIZE, CORPUS), spec.memory_bytes(SIZE, Resources())
    assert math.isfinite(flops)
    assert (flops > 0) == (spec.kind not in WITHOUT_FLOPS)
    # Whoever opens a model holds its weights.
    assert (memory >= SIZE.weights_bytes) == (spec.kind not in WITHOUT_MEMORY)
    assert spec.disk_bytes(SIZE) == LEAVE.get(spec.kind, 0)


@pytest.mark.parametrize("spec", EVERY, ids=lambda spec: spec.kind)
def test_nothing_is_counted_of_a_model_that_is_not_known(spec):
    assert spec.flops(UNKNOWN, CORPUS) == 0
    assert spec.state_bytes(UNKNOWN, Resources()) == 0
    assert spec.disk_bytes(UNKNOWN) == OF_THEIR_OWN.get(spec.kind, 0)


@pytest.mark.parametrize("missing", ["flops", "memory_bytes", "disk_bytes", "metrics", "run", "kind"])
def test_a_stage_that_leaves_something_out_is_refused(missing):
    whole = {name: getattr(Tokenize, name) for name in ("flops", "memory_bytes", "disk_bytes", "metrics", "run")}
    given = {name: value for name, value in whole.items() if name != missing}
    kind = {} if missing == "kind" else {"kind": "new", "__annotations__": {"kind": ClassVar[str]}}
    with pytest.raises(TypeError, match=f"New lacks {missing}, which StageSpec asks for"):
        type("New", (StageSpec,), {"__module__": __name__, **kind, **given})


def test_stages_of_one_worker_shard_nothing():
    gang = Resources(workers=4, zero_stage=3)
    one = Resources()
    for spec in OF_TASKS:
        assert spec.memory_bytes(SIZE, gang) == spec.memory_bytes(SIZE, one)
    pretrain = STATE.pretrain
    assert pretrain.memory_bytes(SIZE, gang) != pretrain.memory_bytes(SIZE, one)
    assert STATE.memory_bytes(SIZE, gang) == pretrain.memory_bytes(SIZE, gang)


def test_what_a_node_holds_beside_its_gpus():
    one, two, wide = (Resources(**more) for more in ({}, {"workers": 2}, {"workers": 2, "fine_tuning": "wide"}))
    copies = {spec.kind: spec.host_bytes(SIZE, one) / SIZE.weights_bytes for spec in EVERY}
    larger = LARGER.memory_bytes(SIZE, one) / SIZE.weights_bytes
    assert {kind: num for kind, num in copies.items() if num != 1} == {
        "pretrain": 2,  # The weights, and the checkpoint that they are written from.
        "optimizer_state": 2,  # AdamW's two numbers of each weight.
        "enlarge": larger,
    }
    # Of a gang each rank makes the model; as rank 0 saves, the others hold none.
    assert STATE.pretrain.host_bytes(SIZE, two) == SIZE.weights_bytes
    (sft,) = (spec for spec in OF_TASKS if spec.kind == "sft")
    assert sft.host_bytes(SIZE, two) == SIZE.weights_bytes
    assert sft.host_bytes(SIZE, wide) == 2 * SIZE.weights_bytes


def test_indicators_read_sentences_as_long_as_they_are():
    classes, length = TASK.num_classes, CORPUS.row_length
    indicators = Indicators(kshot=2, max_examples=10, tasks={"t": TASK})
    assert indicators.flops(SIZE, CORPUS) == SIZE.forward_flops((2 * classes + 10) * length, length)


def test_a_short_fine_tuning_scores_no_more_sentences_than_there_are():
    num = TASK.workload().num_indicator
    some, every, more = (
        EarlySft(max_examples=most, tasks={"t": TASK}).flops(SIZE, CORPUS) for most in (1, num, num + 9)
    )
    assert some < every == more
