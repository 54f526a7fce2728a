"""The picture over steps: one line a seed, their mean, and only what compares."""

import pandas as pd
from columns import COLUMNS

from raysweep.analysis.colors import variant_colors
from raysweep.analysis.objectives import PERPLEXITY_OF
from raysweep.analysis.ranking import rank
from raysweep.analysis.trajectories import GAP, LOSS, steps_chart


def table_of(*, steps=(10, 20), seeds=(0, 1), variants=("a", "b"), **columns):
    """A row for each variant, seed and step; columns are functions of (variant, seed, step)."""
    rows = [
        {
            "trial": f"{variant}-{seed}",
            "variant": variant,
            "seed": seed,
            "step": step,
            "checkpoint": f"{variant}-{seed}-{step}",
            "status": "done",
            "point.pretrain.x": variant,
            "sft/t/score": 0.5,
            "sft/t/lr": 0.1,
            "sft/mean_score": 0.5,
        }
        | {name: function(variant, seed, step) for name, function in columns.items()}
        for variant in variants
        for seed in seeds
        for step in steps
    ]
    return pd.DataFrame(rows)


def chart_of(table):
    ranking = rank(table, columns=COLUMNS)
    return steps_chart(ranking, variant_colors(ranking))


TRACE = {"flatness/hessian_trace": lambda variant, seed, step: 100 / step + seed}


def test_each_seed_has_a_faint_line_and_the_mean_a_strong_one():
    chart = chart_of(table_of(**TRACE))
    assert chart["titles"][: chart["num_fixed"]] == ["flatness/hessian_trace"]
    assert chart["logs"][0]
    assert [line["faint"] for line in chart["lines"]] == [True, True, False] * 2
    first, second, mean = chart["lines"][:3]
    assert (first["x"], first["y"][0]) == ([10.0, 20.0], [10.0, 5.0])
    assert second["y"][0] == [11.0, 6.0]
    assert mean["y"][0] == [10.5, 5.5]
    assert mean["text"][0][0] == "x a<br>mean of 2 seeds<br>10: flatness/hessian_trace 10.5"
    assert first["checkpoints"] == ["a-0-10", "a-0-20"]


def test_the_hessian_is_drawn_unless_gauss_newton_is_surer_by_far():
    for error, drawn in ((1.5, "hessian"), (3.0, "gauss_newton")):
        traces = {
            f"flatness/{name}_trace{end}": (lambda variant, seed, step, value=value: value)
            for name, stderr in (("hessian", error), ("gauss_newton", 1.0))
            for end, value in (("", 10.0), ("_stderr", stderr))
        }
        assert chart_of(table_of(**traces))["titles"][0] == f"flatness/{drawn}_trace"


def test_a_mean_of_which_a_seed_is_missing_is_not_drawn():
    missing = {"flatness/hessian_trace": lambda variant, seed, step: None if seed and step == 20 else 1.0}
    assert chart_of(table_of(**missing))["lines"][2]["y"][0] == [1.0, None]


def test_variants_of_different_lengths_are_shown_over_their_own_steps():
    table = table_of(seeds=(0,), **TRACE)
    table.loc[table["variant"] == "b", "step"] *= 10
    chart = chart_of(table)
    assert chart["is_part"]
    assert [line["x"] for line in chart["lines"]] == [[0.5, 1.0], [0.5, 1.0]]


def test_losses_of_different_objectives_are_not_drawn_together():
    losses = {LOSS: lambda variant, seed, step: 2.0, PERPLEXITY_OF: lambda variant, seed, step: "next tokens"}
    assert LOSS in chart_of(table_of(**losses))["titles"]
    other = losses | {PERPLEXITY_OF: lambda variant, seed, step: variant}
    assert LOSS not in chart_of(table_of(**other))["titles"]
    known = losses | {GAP: lambda variant, seed, step: 0.1}
    assert chart_of(table_of(**known))["titles"][0] == GAP


def test_probes_of_few_labels_come_first_of_the_scores():
    probes = {f"probes/{name}": lambda *_: 0.5 for name in ("labels_64", "labels_8", "t/labels_8", "labels_8_stderr")}
    assert chart_of(table_of(**probes))["scores"] == [
        "probes/labels_8",
        "probes/t/labels_8",
        "probes/labels_64",
        "sft/mean_score",
    ]


def test_a_single_checkpoint_makes_no_line():
    assert chart_of(table_of(steps=(10,), **TRACE)) is None


def test_names_are_inert():
    chart = chart_of(table_of(variants=("<img src=x>", "b"), seeds=(0,), **TRACE))
    assert chart["lines"][0]["name"] == "x &lt;img src=x&gt;"
    assert "<img" not in str([line | {"checkpoints": []} for line in chart["lines"]])
