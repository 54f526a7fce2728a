"""Targets that are rises of each checkpoint's own loss: only pairs of one objective and text count, everywhere."""

from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
from columns import COLUMNS

from raysweep.analysis.budget_page import known_of
from raysweep.analysis.comparer import CompareError
from raysweep.analysis.findings import cautions, headline, how_to_read
from raysweep.analysis.fixed_rates import fixed_rates
from raysweep.analysis.learning import learn_target
from raysweep.analysis.objectives import PERPLEXITY_OF
from raysweep.analysis.ranking import rank
from raysweep.analysis.terminal import format_terminal
from raysweep.errors import StoreError
from raysweep.export import export
from raysweep.scores import Column
from raysweep.spec import Metric
from raysweep.store import Store

OF_TASK = Column("sft", Metric("forgetting_nats_per_token", "min", "nats/token"), "t")
OF_FAMILY = Column("sft", Metric("mean_forgetting", "min", "nats/token"), "lone", ("t",))
ALL = (*COLUMNS, OF_TASK, OF_FAMILY)
TARGETS = ("sft/mean_forgetting", OF_TASK.name, OF_FAMILY.name, "quantization/rise_4_bits")
MIX = "point.pretrain.data.mix"


def study(target: str = TARGETS[0], *, apart: float = 0.0, **told: list[str]) -> pd.DataFrame:
    """Two groups, of five and four checkpoints, and one alone; a few-shot score orders each as its target does.

    Args:
        target: the column that is 0.1 more by each worse checkpoint of a group.
        apart: by how much more the second group's targets rise.
        told: what tells the groups; of ten checkpoints.
    """
    names = [f"c{place}" for place in range(10)]
    rises = [0.5, 0.4, 0.3, 0.2, 0.1, *(apart + each for each in (0.4, 0.3, 0.2, 0.1)), 0.05]
    table = pd.DataFrame({"trial": names, "variant": names, "checkpoint": names, "status": "done", "step": 1})
    given = {target: rises, f"{target}_stderr": 0.01, "sft/t/score": 0.5, "sft/t/lr_edge": 1.0, "sft/t/lr": 0.1}
    given |= {"indicators/kshot_mean": [0.1, 0.2, 0.3, 0.4, 0.5, 0.15, 0.25, 0.35, 0.45, 0.0], "seed": 0}
    given["heldout/ppl"] = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.5]
    given["point.lr"] = [*"abbcc", *"abcc", "a"]
    return table.assign(**given, **(told or {PERPLEXITY_OF: ["next"] * 5 + ["hidden"] * 4 + ["both"]}))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("by", [PERPLEXITY_OF, MIX])
def test_only_pairs_within_a_loss_count(target, by):
    told = {by: ["one"] * 5 + ["two"] * 4 + ["three"]}
    ranking = rank(study(target, **told), columns=ALL, target=target)
    of = {item.indicator: item for item in ranking.associations}
    # 10 pairs of the five and 6 of the four; the one that is alone is in none.
    assert {item.pairs.num_pairs for item in of.values()} == {16}
    assert (ranking.num_groups, ranking.num_comparisons, ranking.num_clear) == (3, 16, 16)
    assert sum(each.num_pairs for each in ranking.target_gaps) == 16
    assert sum(each.num_pairs for each in of["indicators/kshot_mean"].by_target_gap) == 16
    for name in ("indicators/kshot_mean", "heldout/ppl"):
        assert (of[name].accuracy.value, of[name].clear_accuracy.value, of[name].kendall.value) == (1, 1, 1)
        assert np.isnan(of[name].spearman.value)
        assert of[name].selection == ()
    places = ranking.checkpoints.set_index("checkpoint")["rank"]
    assert list(places[["c4", "c0", "c8", "c5"]]) == [1, 5, 1, 4]
    assert places.isna()["c9"]
    assert (ranking.best, ranking.second, ranking.gap, ranking.ties) == (None, None, None, ())
    assert ranking.seed_twins is None


def test_of_one_loss_all_pairs_count():
    ranking = rank(study(**{PERPLEXITY_OF: ["one"] * 10}), columns=ALL, target="sft/mean_forgetting")
    assert (ranking.num_groups, ranking.num_comparisons) == (1, 45)
    assert {item.pairs.num_pairs for item in ranking.associations} == {45}
    assert ranking.best["checkpoint"] == "c9"


def test_scores_compare_over_losses():
    assert rank(study("sft/mean_score"), columns=ALL, target="sft/mean_score").num_groups == 1


def test_how_much_more_another_loss_rises_is_of_no_account():
    """Nor is it to what is fitted on the configuration, which is told of no objective here."""
    one, other = (rank(study(apart=apart), columns=ALL, target="sft/mean_forgetting") for apart in (0.0, 1000.0))
    assert one.ceiling == pytest.approx(other.ceiling, rel=1e-9)
    for first, second in zip(one.associations, other.associations, strict=True):
        assert first.indicator == second.indicator
        for name in ("accuracy", "clear_accuracy", "kendall", "gain", "added"):
            assert asdict(getattr(first, name)) == pytest.approx(asdict(getattr(second, name)), nan_ok=True, abs=1e-9)
        assert first.pairs == second.pairs


def test_no_checkpoint_is_called_the_best(tmp_path):
    ranking = rank(study(), columns=ALL, target="sft/mean_forgetting")
    assert headline(ranking).startswith(
        "No checkpoint is best: by sft/mean_forgetting they compare within one objective and text alone; of 2 distinct"
    )
    [caution] = [line for line in cautions(ranking) if "none is best of all" in line]
    assert "over the 3 objectives and texts there are: 16 pairs within one are counted" in caution
    # Without leaders, edges are of none of them, or of some.
    assert any("in 10 cases (10 at the highest): a better" in line for line in cautions(ranking))
    lines = how_to_read(ranking)
    assert any(line.startswith("Clear pairs of checkpoints: 16 of 16.") for line in lines)
    assert not any("the best" in line and "Tukey" in line for line in lines)
    text = format_terminal(ranking, width=140, color=False)
    assert "Checkpoints by sft/mean_forgetting" in text
    assert "best checkpoint:" not in text
    with pytest.raises(StoreError, match="by sft/mean_forgetting checkpoints have places within one objective and te"):
        export(ranking, Store(tmp_path / "store"), to=str(tmp_path / "out"), which="1")


def test_what_orders_any_two_is_not_learnt_from_it():
    ranking = rank(study(), columns=ALL, target="sft/mean_forgetting")
    for ask in (learn_target, lambda given: known_of(given, {"sft": 1.0, "indicators/kshot_mean": 0.1})):
        with pytest.raises(CompareError) as caught:
            ask(ranking)
        assert str(caught.value) == (
            "sft/mean_forgetting is a rise of each checkpoint's own loss, which does not compare over the 3 objectives "
            "and texts there are; take a target that compares all, such as --target sft/mean_score"
        )
    runs = [
        {"kind": "sft", "status": "done", "id": f"{name}-{lr}", "checkpoint": name, "task": "t", "lr": lr}
        | {"stage_seed": 0, "sft/forgetting_nats_per_token": rise}
        for name, rise in zip(
            ranking.checkpoints["checkpoint"], ranking.checkpoints["sft/mean_forgetting"], strict=True
        )
        for lr in (0.1, 0.2)
    ]
    assert fixed_rates(ranking, pd.DataFrame(runs)) == []
    assert len(fixed_rates(replace(ranking, num_groups=1), pd.DataFrame(runs))) == 2
