"""What an indicator tells beyond the configuration, beside fits made anew, and where the answer is known."""

import numpy as np
import pandas as pd
import pytest

from raysweep.analysis import associations
from raysweep.analysis.associations import Association, associate
from raysweep.analysis.baselines import credit, design
from raysweep.analysis.beyond_config import added, axes_of, config_fits, ranks_within
from raysweep.analysis.refits import parts_of
from raysweep.scores import Column
from raysweep.spec import Metric


def table(num: int, seed: int, **columns) -> pd.DataFrame:
    """A grid of rates and names whose score follows the rate, with as many variants as rows."""
    generator = np.random.default_rng(seed)
    lr = np.resize([1e-4, 3e-4, 1e-3, 3e-3], num)
    rows = {"variant": [f"{i:03}" for i in range(num)], "point.lr": lr, "point.name": np.resize(list("xyz"), num)}
    rows["score"] = np.log10(lr) + generator.normal(size=num) / 2
    return pd.DataFrame(rows | {name: make(rows, generator) for name, make in columns.items()})


def found(rows: pd.DataFrame, *names: str) -> dict[str, Association]:
    columns = {name: Column("", Metric(name, "max")) for name in names}
    everything = np.ones((len(rows), len(rows)), dtype=bool)
    items, _ = associate(rows, target="score", clear=everything, columns=columns)
    return {item.indicator: item for item in items}


def test_added_is_the_difference_of_two_regressions_on_other_variants():
    rows = table(14, 0, x=lambda rows, generator: rows["score"] + generator.normal(size=14))
    config, scores, variants = rows[["point.lr", "point.name"]], rows["score"].to_numpy(), list(rows["variant"])
    groups = np.zeros(14)
    values = ranks_within(rows["x"].to_numpy(), groups)
    blocks = [design(config[name]) for name in config]
    off = ~np.eye(14, dtype=bool)
    more, fewer = (credit(each, scores, variants)[off].mean() for each in ([*blocks, values[:, None]], blocks))
    parts = parts_of(variants, num_parameters=4)
    estimate = added(config_fits(config, scores, variants, parts), rows["x"].to_numpy(), groups, parts)
    assert estimate.value == pytest.approx(more - fewer)
    assert estimate.value > 0


def test_an_indicator_that_mirrors_a_setting_adds_nothing_and_one_that_knows_more_does():
    rows = table(
        48,
        1,
        mirror=lambda rows, _: -1 / rows["point.lr"],
        knows=lambda rows, generator: rows["score"] - np.log10(rows["point.lr"]) + generator.normal(size=48) / 5,
    )
    items = found(rows, "mirror", "knows")
    assert items["mirror"].accuracy.low > 0.6  # As good as the rate is, and no better.
    assert items["mirror"].added.value == 0
    assert items["knows"].added.low > 0
    by_axis = {each.axis: each for each in items["mirror"].matched}
    assert by_axis["point.name"].accuracy.value == 0.5  # It cannot tell names of one rate apart.
    assert by_axis["point.lr"].accuracy.low > 0.6
    assert {each.axis for each in items["point.lr"].matched} == {"point.lr"}


def test_pairs_by_the_axis_in_which_alone_they_differ():
    moving = {"point.a": [1, 1, 2, 2], "point.b": list("xxyx"), "step": [5, 5, 9, 9], "num_tokens": [1, 2, 3, 4]}
    pairs = {
        axis: [(int(row), int(column)) for row, column in np.argwhere(np.triu(flags))]
        for axis, flags in axes_of(pd.DataFrame(moving)).items()
    }
    # a and step move together, and count as one; tokens follow from others.
    assert pairs == {None: [(0, 1)], "point.a": [(0, 3), (1, 3)], "point.b": [(2, 3)]}


def test_without_a_configuration_nothing_is_added_to_it():
    rows = table(8, 2, x=lambda rows, _: rows["score"]).drop(columns=["point.lr", "point.name"])
    assert np.isnan(found(rows, "x")["x"].added.value)
    assert [each.axis for each in found(rows, "x")["x"].matched] == [None]


def test_beyond_the_configuration_of_a_single_variant_nothing_can_be_told():
    steps = pd.DataFrame({"step": [6, 12]})
    parts = parts_of(["a", "a"], num_parameters=4)
    fits = config_fits(steps, np.array([0.4, 0.5]), ["a", "a"], parts)
    estimate = added(fits, np.array([2.0, 1.0]), np.zeros(2), parts)
    assert not np.isfinite(estimate.low)


def test_a_setting_that_some_checkpoints_lack_counts_among_the_parameters_of_its_fit(monkeypatch):
    asked = set()

    def parts_that_were_asked(variants, *, num_parameters):
        asked.add((len(variants), num_parameters))
        return parts_of(variants, num_parameters=num_parameters)

    monkeypatch.setattr(associations, "parts_of", parts_that_were_asked)
    rows = table(48, 0)
    rows["point.beta"] = [*np.repeat(np.arange(6.0), 4), *[np.nan] * 24]
    found(rows)
    # An intercept, three more rates, two more names; of half the checkpoints five more betas: too many for halves.
    assert asked == {(48, 6), (24, 11)}
