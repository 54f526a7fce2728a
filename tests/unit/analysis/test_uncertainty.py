"""Errors of scores and of differences, against closed forms and mean squares taken by hand."""

import math
import tracemalloc

import numpy as np
import pytest
import scipy.stats

from raysweep.analysis.score_differences import benjamini_hochberg, between
from raysweep.analysis.uncertainty import LEAST_SHARE, independent, mean_estimates, recorded, sample, task_noise


def draw(num_checkpoints: int, num_seeds: int, num_examples: int, *, seed: int = 0) -> np.ndarray:
    """[checkpoints, seeds, examples] of zeros and ones, with effects of each."""
    generator = np.random.default_rng(seed)
    latent = generator.normal(size=(num_checkpoints, 1, 1)) / 3 + generator.normal(size=(1, 1, num_examples))
    latent = latent + generator.normal(size=(num_checkpoints, num_seeds, 1)) / 2
    return (generator.random((*latent.shape[:1], num_seeds, num_examples)) < scipy.stats.norm.cdf(latent)).astype(float)


def noise_of(scores: np.ndarray):
    seeds = range(scores.shape[1])
    return task_noise([sample(f"{row}", seeds=seeds, scores=each, examples="e") for row, each in enumerate(scores)])


def test_one_seed_of_zeros_and_ones_has_agresti_and_coulls_interval():
    noise = noise_of(np.array([[[1.0] * 3 + [0.0] * 97]]))
    middle = (3 + 2) / (100 + 4)
    assert noise.scores.value[0] == pytest.approx(middle)
    assert noise.scores.variance[0] == pytest.approx(middle * (1 - middle) / 104)
    assert noise.scores.df[0] == pytest.approx(99)
    assert not noise.knows_seeds


def test_a_difference_of_zeros_and_ones_has_bonett_and_prices_interval():
    # 6 examples that only the first has right, 2 that only the second has, of 100.
    first = np.array([1.0] * 6 + [0.0] * 2 + [1.0] * 50 + [0.0] * 42)
    second = np.array([0.0] * 6 + [1.0] * 2 + [1.0] * 50 + [0.0] * 42)
    noise = noise_of(np.stack([first, second])[:, None])
    more, less = 7 / 102, 3 / 102
    assert noise.paired.all()
    assert noise.differences.value[0, 1] == pytest.approx(more - less)
    assert noise.differences.variance[0, 1] == pytest.approx((more + less - (more - less) ** 2) / 102)
    assert noise.differences.value[1, 0] == -noise.differences.value[0, 1]


def test_the_variance_is_that_of_a_crossed_design_by_its_mean_squares():
    scores = draw(3, 4, 50)
    num_checkpoints, num_seeds, num_examples = scores.shape
    noise = noise_of(scores)
    between, rest = [], []
    for table in scores:
        mean = table.mean()
        by_seed = [num_examples * (row.mean() - mean) ** 2 for row in table]
        left = [
            (table[s, i] - table[s].mean() - table[:, i].mean() + mean) ** 2
            for s in range(num_seeds)
            for i in range(num_examples)
        ]
        between.append(sum(by_seed) / (num_seeds - 1))
        rest.append(sum(left) / ((num_seeds - 1) * (num_examples - 1)))
    for row, table in enumerate(scores):
        # Two pseudo-examples each at 0 and at 1, of a fourth of an example's weight.
        values = np.append(table.mean(axis=0), [0.0, 1.0])
        weights = np.append(np.ones(num_examples), [2 / num_seeds] * 2)
        mean = np.average(values, weights=weights)
        examples = np.average((values - mean) ** 2, weights=weights) / weights.sum()
        seeds = (np.mean(between) - np.mean(rest)) / (num_examples * num_seeds)
        assert noise.scores.value[row] == pytest.approx(mean)
        assert noise.scores.variance[row] == pytest.approx(examples + seeds)
        spread = examples**2 / (num_examples - 1)
        spread += (np.mean(between) / (num_examples * num_seeds)) ** 2 / (num_checkpoints * (num_seeds - 1))
        assert noise.scores.df[row] == pytest.approx((examples + seeds) ** 2 / spread)


def test_the_variance_is_on_average_that_of_means_over_other_seeds_and_examples():
    # 400 sweeps of 4 checkpoints, true score 1/2 each: the stderr of a variance from 1,600 means is 3.5 %, and more as
    # the four share examples. Pseudo-examples change the variance by less than 2 %.
    scores = [draw(4, 3, 300, seed=seed) for seed in range(400)]
    means = np.array([each.mean(axis=(1, 2)) for each in scores])
    stated = np.array([noise_of(each).scores.variance for each in scores])
    # The effect of a checkpoint is part of what is estimated: its variance, on the scale of scores, is taken out.
    effects = np.array([np.random.default_rng(seed).normal(size=4) / 3 for seed in range(400)])
    truth = scipy.stats.norm.cdf(effects / math.sqrt(1 + 1 + 1 / 4))
    assert stated.mean() == pytest.approx(((means - truth) ** 2).mean(), rel=0.12)


def test_what_a_seed_does_to_all_checkpoints_is_in_their_scores_and_not_in_their_differences():
    generator = np.random.default_rng(0)
    scores = generator.random((5, 3, 80)) / 2
    lucky = scores + np.array([0.0, 0.1, 0.3])[:, None]
    plain, moved = noise_of(scores), noise_of(lucky)
    off = ~np.eye(5, dtype=bool)
    assert moved.differences.variance[off] == pytest.approx(plain.differences.variance[off])
    assert (moved.scores.variance > 4 * plain.scores.variance).all()


def test_no_estimate_takes_more_than_half_of_the_examples_variance_away():
    # Seeds that agree in their means although they agree on no example: less between seeds than chance leaves.
    scores = np.array([[[1.0, 0.0] * 50, [0.0, 1.0] * 50]])
    # All means over seeds are 1/2; beside these, two pseudo-examples at 0 and two at 1, of half the weight.
    examples = 1 / 4 / 102 * 2 / 102
    assert noise_of(scores).scores.variance[0] == pytest.approx(LEAST_SHARE * examples)


@pytest.mark.parametrize("num_right", [0, 3, 40])
def test_a_record_alone_is_as_sure_as_its_examples_are(num_right):
    """None right of 40 is no proof of a score of zero."""
    scores = (np.arange(40) < num_right).astype(float)
    summed = recorded("a", seeds=(0,), means=[scores.mean()], errors=[scores.std() / math.sqrt(40)], num_examples=40)
    known = task_noise([sample("a", seeds=(0,), scores=scores[None], examples="e")]).scores
    alone = task_noise([summed]).scores
    assert alone.variance[0] > 0
    assert (alone.value[0], alone.variance[0]) == pytest.approx((known.value[0], known.variance[0]))


def test_intervals_of_likelihoods_hold_their_chance_and_have_no_pseudo_examples():
    """Eight checkpoints, two seeds, 80 examples: 95 % intervals of differences hold the true ones in 93 to 97 %."""
    random, held = np.random.default_rng(0), []
    for _ in range(300):
        hard = random.normal(-5, 1, size=80)
        own = hard + 0.1 * np.arange(8)[:, None] + random.normal(0, 0.2, size=(8, 80))
        scores = own[:, None] + random.normal(0, 0.05, size=(8, 2, 1)) + random.normal(0, 0.3, size=(8, 2, 80))
        samples = [sample(f"{row}", seeds=(0, 1), scores=each, examples="e") for row, each in enumerate(scores)]
        found = task_noise(samples, are_shares=False).differences
        held += [abs(found.value[row + 1, row] - 0.1) <= found.half_width()[row + 1, row] for row in range(7)]
        assert found.value[1, 0] == pytest.approx(scores[1].mean() - scores[0].mean())
    assert 0.93 <= np.mean(held) <= 0.97


def test_the_variance_of_likelihoods_is_of_their_mean_squares():
    scores = np.random.default_rng(0).normal(size=(2, 1, 4))
    samples = [sample(f"{row}", seeds=(0,), scores=each, examples="e") for row, each in enumerate(scores)]
    found = task_noise(samples, are_shares=False)
    assert found.scores.variance == pytest.approx(scores[:, 0].var(axis=1, ddof=1) / 4)
    assert found.differences.variance[0, 1] == pytest.approx((scores[0, 0] - scores[1, 0]).var(ddof=1) / 4)
    alone = [sample(f"{row}", seeds=(0,), scores=each, examples="") for row, each in enumerate(scores)]
    unpaired = task_noise(alone, are_shares=False)
    assert unpaired.differences.variance[0, 1] == pytest.approx(unpaired.scores.variance.sum())


def trained_together(scores: np.ndarray):
    """Of scores [tasks, checkpoints, seeds, examples], each checkpoint and seed one training on all tasks."""
    num_tasks, _, num_seeds, _ = scores.shape
    return [
        task_noise(
            [
                sample(
                    f"{row}",
                    seeds=range(num_seeds),
                    scores=each,
                    examples="e",
                    runs=[f"{row}{s}" for s in range(num_seeds)],
                )
                for row, each in enumerate(task)
            ],
            num_tasks=num_tasks,
        )
        for task in scores
    ]


@pytest.mark.parametrize(("common", "own"), [(0.05, 0.0), (0.05, 0.03), (0.0, 0.05)])
def test_intervals_of_a_mixtures_mean_hold_their_chance(common, own):
    """Eight checkpoints, two seeds, four tasks of 400 examples; what a seed does to all tasks, and to each alone."""
    random, held, apart, pairs = np.random.default_rng(0), [], [], []
    off = np.triu_indices(8, k=1)
    for _ in range(300):
        hard = random.uniform(0.2, 0.8, size=(4, 1, 1, 400))  # A mean of 1/2, which effects do not push out of [0, 1].
        lucky = random.normal(0, common, size=(1, 8, 2, 1)) + random.normal(0, own, size=(4, 8, 2, 1))
        noise = trained_together((random.random((4, 8, 2, 400)) < hard + lucky).astype(float))
        [mean] = independent(noise)
        alone = mean_estimates([each.scores for each in noise])
        held += list(np.abs(mean.scores.value - 0.5) <= mean.scores.half_width())
        apart += list(np.abs(alone.value - 0.5) <= alone.half_width())
        pairs += list((np.abs(mean.differences.value) <= mean.differences.half_width())[off])
        assert alone.value == pytest.approx(mean.scores.value)
    assert 0.93 <= np.mean(held) <= 0.97
    assert 0.93 <= np.mean(pairs) <= 0.97
    assert not common or np.mean(apart) < 0.8  # As if each task had a training of its own.


def test_the_seeds_part_of_a_mixtures_mean_is_of_each_seeds_mean_over_tasks():
    """Equal to the variance of one long task, by the mean squares of its crossed design."""
    scores = np.stack([draw(3, 4, 50, seed=seed) for seed in (0, 1)])
    [mean] = independent(trained_together(scores))
    rest = [
        ((table - table.mean(axis=0) - table.mean(axis=1, keepdims=True) + table.mean()) ** 2).sum() / (3 * 49) / 50
        for task in scores
        for table in task
    ]
    # Of the mean over two tasks, over three checkpoints.
    seeds = scores.mean(axis=(0, 3)).var(axis=1, ddof=1).mean() - np.sum(rest) / 2**2 / 3
    for row, each in enumerate(scores.swapaxes(0, 1)):
        examples = 0.0
        for task in each:
            # Two pseudo-examples each at 0 and at 1, of an eighth of an example's weight: of 4 seeds and 2 tasks.
            values, weights = np.append(task.mean(axis=0), [0.0, 1.0]), np.append(np.ones(50), [2 / 8] * 2)
            middle = np.average(values, weights=weights)
            examples += np.average((values - middle) ** 2, weights=weights) / weights.sum() / 2**2
        assert mean.scores.variance[row] == pytest.approx(examples + seeds / 4)


def test_tasks_of_trainings_of_their_own_are_averaged_as_independent():
    known = trained_together(np.stack([draw(3, 2, 60), draw(3, 2, 60, seed=1)]))
    other = noise_of(draw(3, 2, 60, seed=2))
    for tasks in ([known[0]], [known[0], other], [other, other]):
        assert independent(tasks) is tasks
    [mean] = independent(known)
    assert mean.knows_seeds
    assert mean.paired.all()
    assert list(mean.places) == ["0", "1", "2"]
    found = between(np.array([0.6, 0.5]), errors=None, noise=known, checkpoints=["2", "0"])
    assert found.moments.variance[0, 1] == pytest.approx(mean.differences.variance[2, 0])


def test_arrays_of_all_pairs_are_not_kept():
    num = 300
    samples = [sample(f"{row}", seeds=(0,), scores=each, examples="e") for row, each in enumerate(draw(num, 1, 4))]
    tracemalloc.start()
    noise = task_noise(samples)
    assert noise.differences.value.shape == noise.paired.shape == (num, num)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < num**2  # Bytes: less than a flag of each pair.


def test_other_examples_are_not_paired_and_records_alone_are_neither():
    scores = draw(2, 2, 60)
    known = [sample(f"{row}", seeds=(0, 1), scores=each, examples="e") for row, each in enumerate(scores)]
    other = sample("2", seeds=(0, 1), scores=scores[0], examples="f")
    nameless = sample("3", seeds=(0, 1), scores=scores[0], examples="")
    summed = recorded("4", seeds=(0, 1), means=scores[0].mean(axis=1), errors=[0.05, 0.05], num_examples=60)
    noise = task_noise([*known, other, nameless, summed])
    assert noise.paired.tolist() == [
        [True, True, False, False, False],
        [True, True, False, False, False],
        [False, False, True, False, False],
        [False, False, False, False, False],
        [False, False, False, False, False],
    ]
    both = noise.scores.variance
    assert noise.differences.variance[0, 2] == pytest.approx(both[0] + both[2])
    assert noise.differences.variance[0, 1] < both[0] + both[1]


def test_of_two_scores_the_simultaneous_interval_is_students():
    noise = noise_of(draw(2, 1, 100))
    scores = np.array([0.6, 0.5])
    two = between(scores, errors=None, noise=[noise], checkpoints=["0", "1"])
    assert two.simultaneous()[0, 1] == pytest.approx(noise.differences.half_width()[0, 1], rel=0.01)
    assert two.num_pairs == 1


def test_differences_are_taken_in_the_order_asked_for():
    noise = noise_of(draw(4, 2, 100))
    order = ["3", "0", "2"]
    found = between(np.array([0.6, 0.5, 0.4]), errors=None, noise=[noise, noise], checkpoints=order)
    rows = [3, 0, 2]
    assert found.moments.value == pytest.approx(noise.differences.value[np.ix_(rows, rows)])
    # The mean of two tasks alike: half the variance, twice the degrees of freedom.
    assert found.moments.variance == pytest.approx(noise.differences.variance[np.ix_(rows, rows)] / 2)
    assert found.moments.df == pytest.approx(2 * noise.differences.df[np.ix_(rows, rows)])


def test_scores_of_unknown_error_are_taken_at_their_word_and_tie_with_nothing():
    found = between(np.array([0.6, 0.5, 0.5]), errors=None, noise=[], checkpoints=["a", "b", "c"])
    assert not found.known
    assert found.clear().sum() == 4
    assert [math.isnan(each.low) for each in found.from_first()] == [True] * 3


@pytest.mark.parametrize("seed", range(5))
def test_benjamini_hochberg_equals_scipy(seed):
    chances = np.random.default_rng(seed).random(40) ** 3
    taken = scipy.stats.false_discovery_control(chances, method="bh") <= 0.05
    assert (benjamini_hochberg(chances, rate=0.05) == taken).all()
