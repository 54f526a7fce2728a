"""The shipped indicator study, without running it: its design is one whose confounds can be told apart."""

import os
from collections import Counter

import pytest
from shipped import FOLDER

from raysweep.space import load

OBJECTIVE, LR, DATA = (f"pretrain.phases.continued.{part}" for part in ("objective", "optimizer.lr", "data"))


@pytest.mark.data
@pytest.mark.skipif("RAYSWEEP_DATA" not in os.environ, reason="RAYSWEEP_DATA names no data pack")
def test_one_base_goes_on_in_62_ways_and_six_of_them_twice():
    space = load(FOLDER / "indicators_cpu.yaml")
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
    assert Counter(each[LR] for each in variants.values()) == {5e-4: 13, 1e-3: 22, 2e-3: 7, 4e-3: 13, 8e-3: 7}
