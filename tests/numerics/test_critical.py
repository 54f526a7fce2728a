"""Steps at which a loss has risen, wherever the search begins."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysweep.curvature.critical import critical_step, quadratic_step

ORDERS = st.floats(-8, 8)


@given(answer=ORDERS, start=ORDERS, guess=ORDERS, power=st.floats(1, 4))
def test_a_guess_saves_losses_and_moves_no_bit(answer, start, guess, power):
    answer, start, guess = 10.0**answer, 10.0**start, 10.0**guess
    asked = []

    def rise(step):
        asked.append(step)
        return (step / answer) ** power

    plain = critical_step(rise, start=start, target=1.0)
    assert plain == pytest.approx(answer, rel=0.006)
    assert critical_step(rise, start=start, target=1.0, guess=guess) == plain
    asked.clear()
    assert critical_step(rise, start=start, target=1.0, guess=answer) == plain
    # Two or three to have it between two steps, and seven to narrow it down.
    assert len(asked) <= 10


@pytest.mark.parametrize("guess", [math.nan, math.inf, 0.0, -1.0, 5e-324, 1e308])
def test_a_guess_that_is_none_or_far_off_does_no_harm(guess):
    plain = critical_step(lambda step: step, start=1e-3, target=1.0)
    assert critical_step(lambda step: step, start=1e-3, target=1.0, guess=guess) == plain


@given(slope=st.floats(-10, 10), curvature=st.floats(-10, 10), target=st.sampled_from([0.0, 0.1, 3.0]))
def test_the_step_of_a_quadratic_is_its_first_to_rise_by_so_much(slope, curvature, target):
    step = quadratic_step(slope, curvature, target)

    def rise(at):
        return slope * at + curvature * at * at / 2

    if math.isnan(step):
        steps = [10.0**order for order in range(-6, 4)]
        assert slope <= 0 or max(map(rise, steps)) <= target or target == 0
    elif 1e-100 < step < 1e100:
        assert rise(step) == pytest.approx(target, rel=1e-6, abs=1e-9 * max(1, abs(slope) * step))
        assert all(rise(step * part) <= target + 1e-9 * max(1, abs(slope) * step) for part in (0.25, 0.5, 0.75))
