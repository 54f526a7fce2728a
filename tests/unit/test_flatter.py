"""Which of two models is said to be flatter, and by what."""

import pytest

from raysweep.flatter import SURVIVING, Change, verdict


def changes(*ends):
    """Of the surviving measures, from the ends of their intervals; None where they have none."""
    return [
        Change(name, 1.0, 1.0, -0.1 if low is None else (low + high) / 2, low, high, survives_rescaling=True)
        for name, (low, high) in zip(SURVIVING, ends, strict=True)
    ]


LOWER, HIGHER, EITHER, NONE, EQUAL = (-2.0, -1.0), (1.0, 2.0), (-2.0, 1.0), (None, None), (0.0, 0.0)


@pytest.mark.parametrize(
    ("ends", "told"),
    [
        ((LOWER, EITHER, EITHER, NONE), "beyond the chance of probe vectors a is flatter by 1 (adaptive trace);"),
        ((EITHER, EITHER, EITHER, NONE), "none says which is flatter"),
        ((LOWER, HIGHER, HIGHER, NONE), "disagree beyond the chance of probe vectors: a is flatter by 1 (adaptive tra"),
        ((EQUAL, EQUAL, EQUAL, EQUAL), "a and b are equal by all 4 related measures"),
    ],
)
def test_measures_whose_side_is_not_known_do_not_count(ends, told):
    assert told in verdict(changes(*ends), "a", "b")


def test_a_verdict_on_models_of_another_loss_says_so():
    ends = (LOWER, LOWER, LOWER, LOWER)
    told = "Their losses differ by -0.2000 nats per token (95 %: -0.2196 to -0.1804)"
    assert told in verdict(changes(*ends), "a", "b", loss_difference=(-0.2, 0.01))
    assert "losses" not in verdict(changes(*ends), "a", "b", loss_difference=(0.009, 0.01))


def test_one_value_is_equal_to_itself():
    assert [each.is_equal for each in changes(LOWER, EQUAL, NONE, EITHER)] == [False, True, False, False]
    assert Change("x", 1.0, 1.0, 0.0, None, None, survives_rescaling=True).is_equal
