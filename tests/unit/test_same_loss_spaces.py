"""The shipped studies of the same loss, without running them: independent bases, each finished in ten ways."""

from pathlib import Path

import pytest

from raysweep.objectives.adversary import Adversary
from raysweep.space import load

FOLDER = Path(__file__).parents[2] / "search_spaces"


@pytest.mark.parametrize("name", ["same_loss_hmm", "same_loss_pcfg"])
def test_every_base_is_trained_once_and_finished_in_ten_ways(name):
    space = load(FOLDER / f"{name}.yaml")
    trials = [space.trial(point, seed) for point in space.points() for seed in space.declared.seeds]
    ends = [[stage for stage in trial.stages if stage.kind == "pretrain"] for trial in trials]
    bases = {base.id for base, _ in ends}
    assert len(bases) == 3
    assert len({finish.id for _, finish in ends}) == len(trials) == 30
    finishes = [finish.spec.recipe for _, finish in ends]
    assert all(isinstance(recipe.objective, Adversary) for recipe in finishes)
    strengths = [recipe.objective.strength for recipe in finishes]
    assert {strength for strength in strengths if strength} == {-0.05, 0.03, 0.05, 0.1}
    # The control is a dose's own recipe with a strength of 0; all are measured by the loss that is kept.
    alike = [recipe.with_(objective=recipe.objective.with_(strength=0.0)) for recipe in finishes]
    assert alike.count(alike[0]) == 3 * 5
    assert {stage.spec.loss_of.name for trial in trials for stage in trial.stages if stage.kind == "heldout"} == {
        "causal_lm"
    }
