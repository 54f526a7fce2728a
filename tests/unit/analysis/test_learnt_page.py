"""What a comparison says on a terminal: errors, cut prompts, and reasons that go against a declared direction."""

import math
from typing import Any

import pandas as pd
import pytest

from raysweep.analysis.comparer import TOO_FAR
from raysweep.analysis.cut_prompts import cut_prompts
from raysweep.analysis.learnt_page import format_comparison, format_side_by_side
from raysweep.comparing import Measured, _cut_prompts, _side

COSTS = {"seconds": {"trace": [1.0, 1.0], "ppl": [1.0, 1.0]}, "flops": {"trace": [None, 1e9], "ppl": [1e9, 1e9]}}
TESTED = {
    "low": 1.0,
    "high": 2.0,
    "num_pairs": 1250,
    "accuracy": {"value": 0.9, "low": 0.85, "high": 0.94},
}


def compared(**changes: Any) -> str:
    """A comparison with one answer."""
    answer = {"target": "score", "probability": 0.6, "distance": [1.3, 0.8], "tested": TESTED, "reasons": []}
    document = {"first": "a", "second": "b", "learnt_from": "r", "unchecked": [], "cut_prompts": []}
    return format_comparison(document | {"answers": [answer | changes]} | COSTS)


def measured(**values: float) -> Measured:
    values = {name.replace("__", "/"): value for name, value in values.items()}
    return Measured("m", values, versions={}, seconds={}, flops={})


@pytest.mark.parametrize(
    ("lead", "stderr", "side"),
    [(1.0, 0.5, "A"), (-1.0, 0.5, "B"), (0.9, 0.5, "neither"), (0.9, math.nan, "A"), (0.0, math.nan, "neither")],
)
def test_a_difference_within_its_error_is_for_neither(lead, stderr, side):
    assert _side(lead, stderr) == side


def test_what_is_derived_has_the_errors_of_what_it_is_made_of():
    one = measured(
        flatness__hessian_trace=10.0,
        flatness__hessian_trace_stderr=1.0,
        flatness__mean_eigenvalue=-0.1,
        heldout__ppl=20.0,
    )
    assert one.error("flatness/hessian_trace") == 1.0
    assert one.error("flatness/mean_eigenvalue") == pytest.approx(0.01)
    assert math.isnan(one.error("heldout/ppl"))


def test_a_value_of_zero_has_its_error_too():
    chance = {"indicators__arc__zeroshot": 0.0, "indicators__arc__zeroshot_stderr": 0.02}
    assert measured(**chance).error("indicators/arc/zeroshot") == 0.02
    flat = measured(flatness__hessian_trace=0.0, flatness__hessian_trace_stderr=1.0, flatness__mean_eigenvalue=0.0)
    assert flat.error("flatness/hessian_trace") == 1.0
    assert math.isnan(flat.error("flatness/mean_eigenvalue")), "what it is divided by is not known from shares"


def test_errors_and_cut_prompts_are_said_side_by_side():
    cut = {"indicators__arc__kshot": 0.3, "indicators__arc__kshot_num_cut": 40.0}
    table = pd.DataFrame([measured(**cut).values] * 2)
    assert len(cut_prompts(table)) == 1
    trace = {"indicator": "trace", "first": 3.0, "second": 5.0, "first_stderr": 0.5, "second_stderr": 0.5, "for": "A"}
    ppl = trace | {"indicator": "ppl", "first_stderr": math.nan, "second_stderr": math.nan}
    document = {
        "first": "a",
        "second": "b",
        "indicators": [trace, ppl],
        "of_other_vocabularies": [],
        "cut_prompts": _cut_prompts(measured(**cut), measured(**cut)),
    }
    text = format_side_by_side(document | COSTS)
    assert "  trace for A        3 ± 0.50 against 5 ± 0.50, measured in" in text
    assert "  ppl   for A?       3 against 5, measured in" in text
    assert "indicators/arc/kshot (40 prompts on 2 of 2 checkpoints)" in text


def test_reasons_against_the_declared_direction_are_marked():
    reasons = [
        {"indicator": name, "logit": 0.16, "first": 2.0, "second": 1.0, "against_direction": name == "ppl"}
        for name in ("trace", "ppl")
    ]
    text = compared(reasons=reasons)
    assert "\n  A 1.3 and B 0.80 times as far from what was learnt from as that lies apart\n" in text
    [one, other] = [line for line in text.splitlines() if " by 0.16 " in line]
    assert ("(!)" in one, "(!)" in other) == (False, True)
    assert "reasons are in log-odds" in text


def test_a_probability_stands_beside_how_often_those_of_pairs_as_far_away_were_right():
    text = compared()
    assert (
        "score: A fine-tunes better with probability 0.60 (of 1,250 comparisons of unseen variants of the same" in text
    )
    assert " sweep 1 to 2 times as far 0.90 [0.85, 0.94] were right)\n  A 1.3 and B 0.80 t" in text
    unsure = {"value": 0.9, "low": math.nan, "high": math.nan}
    text = compared(distance=[0.8, 3.4], tested=TESTED | {"low": 3.0, "high": math.inf, "accuracy": unsure})
    assert " beyond 3 times as far 0.90 were right)\n  far: A 0.80 and B 3.4 t" in text
    text = compared(distance=[0.8, 3.4], tested=None)
    assert (
        "probability 0.60 (no comparison of unseen variants was of any so far away: how often one is right is n" in text
    )


def test_what_speaks_for_either_is_said_where_there_is_no_probability():
    reason = {"indicator": "ppl", "logit": 0.16, "first": 2.0, "second": 1.0, "against_direction": False}
    text = compared(probability=None, distance=[0.8, 9.0], reasons=[reason])
    assert f"score: no probability: beyond {TOO_FAR:g} times as far none is to go by\n  far: A 0.80 and B 9 t" in text
    assert "\n  ppl                                  for A by 0.16 " in text
    text = compared(probability=None, distance=[0.8, math.nan], tested=None)
    assert "score: no probability: no indicator of A, or of B, has a value\n" in f"{text}\n"
