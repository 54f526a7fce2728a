"""The shipped indicator studies, without running them: designs whose confounds can be told apart, at what cost."""

import os
from collections import Counter
from functools import cache

import pytest
from benchmarks.indicator_costs import costs, texts_of
from shipped import FOLDER, presets

from raysweep.space import load
from raysweep.variants import SearchSpace

OBJECTIVE, LR, DATA = (f"pretrain.phases.continued.{part}" for part in ("objective", "optimizer.lr", "data"))
RATES = {
    "indicators_cpu": {5e-4: 13, 1e-3: 22, 2e-3: 7, 4e-3: 13, 8e-3: 7},
    "indicators_50": {1e-4: 13, 2.5e-4: 22, 5e-4: 7, 7.5e-4: 13, 1e-3: 7},
}

MEDIAN_LENGTHS = {
    "arc_easy": 29,
    "arc_challenge": 35,
    "boolq": 18,
    "comve_validate": 23,
    "winogrande": 30,
    "fairytaleqa": 251,
    "nq_retrieved": 456,
    "webq_retrieved": 498,
    "nq_open": 20,
    "opentriviaqa": 26,
    "webquestions": 19,
}
"""Of training examples, in tokens of the larger study's own tokenizer: benchmarks/indicator_costs.py."""

pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif("RAYSWEEP_DATA" not in os.environ, reason="RAYSWEEP_DATA names no data pack"),
]


@cache
def shipped(name: str, *of: str) -> SearchSpace:
    """A study as its presets have it."""
    return load(FOLDER / f"{name}.yaml", [each for preset in of for each in presets(name)[preset]])


@pytest.mark.parametrize("name", list(RATES))
def test_one_base_goes_on_in_62_ways_and_six_of_them_twice(name):
    space = shipped(name)
    trials = list(space.trials())
    variants = {trial.variant_id: trial.settings["variant"] for trial in trials}
    assert len(variants) == 62
    assert Counter(trial.seed for trial in trials) == {0: 62, 1: 6}
    assert len({trial.id for trial in trials}) == 68
    # A base of each seed, and every way once.
    ends = [[stage for stage in trial.stages if stage.kind == "pretrain"] for trial in trials]
    assert len({base.id for base, _ in ends}) == 2
    assert len({end.id for _, end in ends}) == 68
    assert len({end.spec.model_size.num_parameters for _, end in ends}) == 1
    # Each objective at each rate on one mix; other mixes at three rates by two objectives.
    crossed = Counter((each[OBJECTIVE], each[DATA]) for each in variants.values())
    assert sorted(crossed.values()) == [1] * (5 + 4) + [3] * 6 + [5] * 7
    assert Counter(each[LR] for each in variants.values()) == RATES[name]
    # No rate is picked at the end of a list that was fixed before.
    assert space.declared.sft.auto_lrs == {"full"}
    if name == "indicators_50":
        # By the stages' own FLOPs; flatness to an error of a tenth is among them, early fine-tuning is not.
        [flatness] = [stage.spec for stage in trials[0].stages if stage.kind == "flatness"]
        assert flatness.rse <= 0.1
        assert flatness.own_samples
        assert flatness.num_blocks == space.declared.pretrain.model.num_layers
        assert "quantization" in space.declared.measurements
        found = [
            costs(space, trial) for trial in {trial.settings["variant"][OBJECTIVE]: trial for trial in trials}.values()
        ]
        assert max(each.of_last_phase for each in found) < 0.05
        assert max(max(each.of_families.values()) for each in found) < 0.10
        with texts_of(MEDIAN_LENGTHS, space.declared.sft.tasks):
            assert max(costs(space, trials[0]).of_families.values()) < 0.10
        assert share_cut(space) < 0.05


def test_fine_tuning_on_all_tasks_at_once_leaves_the_study_as_it_is():
    plain, mixed = shipped("indicators_cpu"), shipped("indicators_cpu", "mixture")
    before, after = ({stage.id: stage for stage in next(iter(space.trials())).stages} for space in (plain, mixed))
    assert before.keys() < after.keys()
    added = [stage for name, stage in after.items() if name not in before]
    assert {(stage.kind, len(stage.spec.task.parts)) for stage in added} == {("sft", 6)}


def test_the_papers_own_scale_is_a_preset():
    space = shipped("indicators_50", "paper")
    trial = next(iter(space.trials()))
    base, continued = (stage.spec for stage in trial.stages if stage.kind == "pretrain")
    assert round(base.model_size.num_parameters / 1e9) == 1
    assert [round(each.pretraining_tokens / 1e9) for each in (base, continued)] == [100, 100]
    [indicators] = [stage.spec for stage in trial.stages if stage.kind == "indicators"]
    shots = {
        family: {indicators.kshot_by_task.get(task, indicators.kshot) for task in tasks}
        for family, tasks in space.declared.sft.families.items()
    }
    assert shots == {"cms": {1}, "rag": {5}, "cbq": {5}}
    assert share_cut(space) < 0.05


def test_lora_and_earlier_checkpoints_are_presets():
    trial = next(iter(shipped("indicators_50", "lora", "earlier").trials()))
    tunings = Counter((stage.checkpoint, stage.spec.method.name) for stage in trial.stages if stage.kind == "sft")
    assert len(tunings) == 4
    assert {*tunings.values()} == {(11 + 1) * 3 * 3}  # Tasks, and all of them at once; seeds; rates.


def share_cut(space: SearchSpace) -> float:
    """Of few-shot prompts on retrieved text those that do not fit, at four characters a token; of the worst task."""
    sft, indicators = space.declared.sft, space.declared.indicators
    found = []
    for name in sft.families["rag"]:
        task = sft.tasks[name]
        assert task.max_length <= space.declared.pretrain.sequence_length  # Of which the model has seen as many.
        shots = task.shot_text(task.examples("train")[: indicators.kshot_by_task.get(name, indicators.kshot)])
        lengths = [len(shots + task.prompt(each)) / 4 + task.max_new_tokens for each in task.examples("indicator")]
        found.append(sum(length > task.max_length for length in lengths) / len(lengths))
    return max(found)
