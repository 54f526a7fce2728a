"""What the sweep file alone tells, against fits made anew for every pair."""

import numpy as np
import pandas as pd
import pytest

from raysweep.analysis.associations import associate
from raysweep.analysis.baselines import PENALTY, credit, design, ridge
from raysweep.analysis.pairwise import interval


def naive(blocks: list[np.ndarray], scores: np.ndarray, variants: np.ndarray, block: int | None) -> np.ndarray:
    full = np.concatenate([np.ones((len(scores), 1)), *blocks], axis=1)
    penalty = PENALTY * np.eye(full.shape[1])
    penalty[0, 0] = 0
    owner = np.repeat(np.arange(-1, len(blocks)), [1, *(each.shape[1] for each in blocks)])
    part = np.ones(len(owner), dtype=bool) if block is None else owner == block
    shares = np.full((len(scores), len(scores)), 0.5)
    for i, j in np.argwhere(~np.eye(len(scores), dtype=bool)):
        left = (variants != variants[i]) & (variants != variants[j])
        fit = np.linalg.solve(full[left].T @ full[left] + penalty, full[left].T @ scores[left])
        lead = (full[i] - full[j])[part] @ fit[part]
        lead = 0 if abs(lead) < 1e-9 else lead
        shares[i, j] = (1 + np.sign(lead) * np.sign(scores[i] - scores[j])) / 2
    return shares


@pytest.mark.parametrize("block", [None, 0, 1, 2])
def test_each_pair_is_predicted_without_both_its_variants(block):
    variants = np.array(list("aabbcccdef"))
    scores = np.random.default_rng(0).normal(size=10)
    columns = [list("xyxyxyzzxx"), [1e-3, 1e-2, 1e-3, 1e-2, 3e-3, 3e-3, 0.1, 0.1, 1.0, 1e-3], list("abcdefghij")]
    blocks = [design(pd.Series(column)) for column in columns]
    assert (credit(blocks, scores, list(variants), block=block) == naive(blocks, scores, variants, block)).all()


@pytest.mark.parametrize("num_names", [3, 20])
def test_fits_by_rows_are_those_by_columns(num_names):
    generator = np.random.default_rng(0)
    names, rates = generator.integers(0, num_names, 60), generator.integers(0, 5, 60) / 7
    blocks = [design(pd.Series(names.astype(str))), design(pd.Series(rates))]
    by_columns, by_rows = ridge(blocks), ridge([*blocks, np.zeros((60, 60))])  # Zeros are no regressors, but many.
    assert by_columns.coefficients is not None
    assert by_rows.coefficients is None
    assert by_rows.hat == pytest.approx(by_columns.hat, abs=1e-10)
    for block in (0, 1):
        assert by_rows.part(block) == pytest.approx(by_columns.part(block), abs=1e-10)


def test_a_name_that_decides_is_right_on_all_pairs_of_other_names_and_says_nothing_of_its_own():
    names = pd.Series(["adamw", "sgd"] * 4)
    scores = np.array([0.9, 0.1, 0.8, 0.2, 0.7, 0.3, 0.85, 0.15])
    shares = credit([design(names)], scores, [f"{i}" for i in range(8)])
    same = (names.to_numpy()[:, None] == names.to_numpy()) & ~np.eye(8, dtype=bool)
    assert (shares[same] == 0.5).all()
    assert (shares[~same & ~np.eye(8, dtype=bool)] == 1).all()


def test_a_number_tells_of_values_that_no_other_variant_has():
    rates = pd.Series([1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2])
    shares = credit([design(rates)], np.arange(6.0), [f"{i}" for i in range(6)])
    assert (shares[~np.eye(6, dtype=bool)] == 1).all()


def test_names_that_decide_nothing_are_a_coin():
    # Leaving out only the variant predicted would give far less than half: its mean is low where the score is high.
    generator = np.random.default_rng(0)
    found = []
    for _ in range(400):
        scores = generator.normal(size=8)
        shares = credit([design(pd.Series(list("aabbccdd")))], scores, [f"{i}" for i in range(8)])
        found.append(shares[np.triu_indices(8, 1)].mean())
    assert np.mean(found) == pytest.approx(0.5, abs=4 * np.std(found) / np.sqrt(400))


@pytest.mark.parametrize("unit", [1e-12, 1e12])
def test_the_unit_of_the_scores_changes_nothing(unit):
    scores = np.random.default_rng(0).normal(size=12)
    names, variants = [design(pd.Series(list("aaaabbbbcccc")))], [f"{i:02}" for i in range(12)]
    assert (credit(names, unit * scores, variants) == credit(names, scores, variants)).all()


def test_two_variants_say_nothing_of_each_other():
    assert (credit([design(pd.Series(["a", "b"]))], np.array([1.0, 2.0]), ["0", "1"]) == 0.5).all()


def test_a_column_of_no_effect_is_a_coin_beside_one_that_decides():
    # In a grid of two columns, without two variants the means by one column tell of the other, and would be wrong.
    generator = np.random.default_rng(0)
    names, layers = pd.Series(list("aabbcc")), pd.Series([1, 3] * 3)
    found = []
    for _ in range(300):
        scores = np.repeat([0.9, 0.5, 0.1], 2) + generator.normal(size=6) / 100
        shares = credit([design(names), design(layers)], scores, [f"{i}" for i in range(6)], block=1)
        found.append(shares[np.triu_indices(6, 1)].mean())
    assert np.mean(found) == pytest.approx(0.5, abs=4 * np.std(found) / np.sqrt(300))


def test_a_baseline_is_fitted_anew_without_each_variant():
    """Only so does its interval allow for what the fit owes to each of them."""
    generator = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "variant": [f"{i:02}" for i in range(9) for _ in range(2)],
            "point.optimizer": [name for name in "xyxyxyxyz" for _ in range(2)],
            "sft/mean_score": generator.normal(size=18),
        }
    )
    given = {"target": "sft/mean_score", "columns": {}}
    [row], _ = associate(table, clear=np.ones((18, 18), dtype=bool), **given)
    without = []
    for variant in table["variant"].unique():
        rest = table[table["variant"] != variant].reset_index(drop=True)
        [other], _ = associate(rest, clear=np.ones((16, 16), dtype=bool), **given)
        without.append(other.accuracy.value)
    assert row.accuracy == interval(row.accuracy.value, np.array(without))


def test_of_a_single_variant_nothing_is_left_to_fit():
    scores = {"variant": ["a", "a"], "step": [6, 12], "sft/mean_score": [0.4, 0.5]}
    rows, _ = associate(pd.DataFrame(scores), clear=np.ones((2, 2), dtype=bool), target="sft/mean_score", columns={})
    assert not any(np.isfinite(row.accuracy.low) for row in rows)
