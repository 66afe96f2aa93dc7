"""The statistics against statsmodels, SciPy, brute force, and worlds whose truth is known."""

import doctest
import itertools
import math
import tracemalloc
import warnings

import numpy as np
import pytest
import scipy.stats

from mnistattn.evaluation.metrics import wilson
from mnistattn.leaderboard import stats
from mnistattn.leaderboard.board import Estimate
from mnistattn.leaderboard.stats import (
    Difference,
    difference,
    estimate,
    holm,
    mcnemar,
    paired_bootstrap,
    pooled_seed_variance,
    ranks,
    two_shares,
)

NAN = math.nan


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_examples_in_docstrings():
    outcome = doctest.testmod(stats)
    assert outcome.attempted >= 12 and outcome.failed == 0


# ---- single tests --------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.5, 0.8, 0.97])
def test_mcnemar_equals_statsmodels(rate):
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    rng = np.random.default_rng(3)
    for n in (1, 7, 40, 3000):
        a, b = rng.random(n) < rate, rng.random(n) < 0.6
        table = [[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]]
        if (a ^ b).any():
            expected = tables.mcnemar(table, exact=True).pvalue
            assert mcnemar(a, b) == pytest.approx(expected, rel=1e-9)
        assert mcnemar(a, b) == mcnemar(b, a)


def test_mcnemar_equals_all_ways_to_swap_the_models():
    a = np.array([1, 1, 1, 1, 1, 1, 0, 0, 1], bool)
    b = np.array([0, 0, 0, 0, 0, 1, 1, 0, 1], bool)
    gap = a.astype(int) - b
    swaps = [abs(np.dot(sign, gap)) for sign in itertools.product([-1, 1], repeat=len(a))]
    assert mcnemar(a, b) == pytest.approx(np.mean(np.array(swaps) >= abs(gap.sum())))


def test_mcnemar_of_checkpoints_that_never_disagree_is_one():
    same = np.array([True, False, True])
    assert mcnemar(same, same) == 1.0
    assert mcnemar(np.zeros(0, bool), np.zeros(0, bool)) == 1.0


@pytest.mark.parametrize(
    "a, b",
    [
        (np.ones(3, bool), np.ones(4, bool)),
        (np.ones(3), np.ones(3)),
        (np.ones((1, 3), bool), np.ones((1, 3), bool)),
    ],
)
def test_mcnemar_refuses(a, b):
    with pytest.raises(ValueError, match="bool arrays"):
        mcnemar(a, b)


def test_holm_equals_statsmodels():
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    rng = np.random.default_rng(0)
    for n in (1, 2, 5, 40):
        for power in (1, 4):
            p = rng.random(n) ** power
            p[-1] = p[0]  # a tie
            expected = multitest.multipletests(p, method="holm")[1]
            np.testing.assert_allclose(holm(list(p)), expected, rtol=1e-12)


def test_holm_edges():
    assert holm([]) == []
    assert holm([0.0, 1.0, 0.9]) == [0.0, 1.0, 1.0]
    for bad in ([NAN], [-0.1], [1.1]):
        with pytest.raises(ValueError, match="p-values"):
            holm(bad)


def test_two_shares_equals_statsmodels():
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    for counts in [(60, 100, 45, 100), (1, 10, 9, 1000), (0, 20, 5, 30), (9800, 10_000, 970, 1000)]:
        hits, n = counts[::2], counts[1::2]
        expected = proportion.proportions_ztest(hits, n)[1]
        assert two_shares(*counts) == pytest.approx(expected, rel=1e-9)


def test_two_shares_edges():
    assert two_shares(0, 5, 0, 9) == two_shares(5, 5, 9, 9) == 1.0
    assert two_shares(0, 0, 3, 9) == two_shares(3, 9, 0, 0) == 1.0
    for bad in [(6, 5, 1, 2), (1, 2, -1, 5)]:
        with pytest.raises(ValueError, match="hits"):
            two_shares(*bad)


# ---- bootstrap -----------------------------------------------------------------------------------


def test_bootstrap_agrees_with_scipy_and_the_normal_interval():
    values = np.random.default_rng(4).gamma(1.0, size=300) - 1
    low, high, p = paired_bootstrap(values)
    other = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(9)
    ).confidence_interval
    error = values.std(ddof=1) / math.sqrt(len(values))
    # Noise of a 2.5 % quantile of 10,000 resamples: some 0.03 standard errors.
    assert low == pytest.approx(other.low, abs=0.12 * error)
    assert high == pytest.approx(other.high, abs=0.12 * error)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.25 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.25 * error)
    assert p == pytest.approx(2 * scipy.stats.norm.sf(abs(values.mean()) / error), abs=0.03)
    assert 0.01 < p < 0.5  # else the line above says little


def test_bootstrap_agrees_with_all_resamples_of_a_few_values():
    values = np.array([0.0, 1.0, 1.0, -1.0, 1.0])
    every = np.array([values[list(i)].mean() for i in itertools.product(range(5), repeat=5)])
    exact = np.mean(np.abs(every - values.mean()) >= abs(values.mean()) - 1e-12)
    low, high, p = paired_bootstrap(values, resamples=20_000)
    assert p == pytest.approx(exact, abs=0.015)
    assert (low, high) == pytest.approx(tuple(np.quantile(every, [0.025, 0.975])))


def test_bootstrap_repeats_for_a_seed_and_drops_nan():
    values = np.random.default_rng(0).normal(0.1, 1, 50)
    holed = np.insert(values, [0, 20, 50], NAN)
    first = paired_bootstrap(values, seed=5, resamples=500)
    assert paired_bootstrap(holed, seed=5, resamples=500) == first
    assert paired_bootstrap(values, seed=6, resamples=500) != first
    narrow = paired_bootstrap(values, seed=5, resamples=500, confidence=0.5)
    assert first[0] < narrow[0] < narrow[1] < first[1] and narrow[2] == first[2]


def test_rounding_decides_no_tie_of_the_bootstrap():
    thirds = np.random.default_rng(0).integers(-3, 4, 11)  # as of means over three seeds
    whole = paired_bootstrap(thirds.astype(float), resamples=2000)[2]
    assert 0.05 < whole < 0.95 and paired_bootstrap(thirds / 3, resamples=2000)[2] == whole


def test_bootstrap_mirrors():
    values = np.random.default_rng(1).normal(0.2, 1, 60)
    low, high, p = paired_bootstrap(values, resamples=500)
    assert paired_bootstrap(-values, resamples=500) == pytest.approx((-high, -low, p))


@pytest.mark.parametrize("values", [[], [NAN], [0.5], [0.5, NAN]])
def test_bootstrap_of_less_than_two_images_says_nothing(values):
    low, high, p = paired_bootstrap(np.array(values))
    assert math.isnan(low) and math.isnan(high) and p == 1.0


def test_bootstrap_without_variance():
    assert paired_bootstrap(np.zeros(9), resamples=99) == (0.0, 0.0, 1.0)
    low, high, p = paired_bootstrap(np.full(7, 0.1), resamples=99)  # 0.1 is not exact in binary
    assert (low, high) == pytest.approx((0.1, 0.1)) and p == 0.01


def test_bootstrap_takes_little_memory_at_full_size():
    values = np.random.default_rng(0).normal(size=10_000)
    tracemalloc.start()
    paired_bootstrap(values, resamples=500)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6  # 500 x 10,000 int32 and float64 at once: 60 MB


@pytest.mark.parametrize(
    "values, options",
    [
        (np.zeros((2, 2)), {}),
        (np.array([1.0, math.inf]), {}),
        (np.zeros(3), {"resamples": 0}),
        (np.zeros(3), {"confidence": 1.0}),
    ],
)
def test_bootstrap_refuses(values, options):
    with pytest.raises(ValueError):
        paired_bootstrap(values, **options)


# ---- seeds' variance -----------------------------------------------------------------------------


def test_pooled_seed_variance_is_the_residual_of_an_anova():
    rng = np.random.default_rng(0)
    groups = [rng.normal(i, 1, k) for i, k in enumerate([3, 2, 1, 5])]
    variance, freedom = pooled_seed_variance(groups)
    # Of equal groups' means, F = between / within; so within can be had from SciPy's F.
    several = [group for group in groups if len(group) > 1]
    grand = np.concatenate(several).mean()
    between = sum(len(g) * (g.mean() - grand) ** 2 for g in several) / (len(several) - 1)
    assert freedom == 2 + 1 + 4
    assert variance == pytest.approx(between / scipy.stats.f_oneway(*several).statistic)


def test_pooled_seed_variance_needs_a_model_with_two_seeds():
    assert pooled_seed_variance([]) is None
    assert pooled_seed_variance([np.array([0.3]), np.array([0.9]), np.array([])]) is None
    for bad in (np.array([NAN, 1.0]), np.ones((2, 2))):
        with pytest.raises(ValueError, match="Seed means"):
            pooled_seed_variance([bad])


# ---- estimate ------------------------------------------------------------------------------------


def test_estimate_of_three_seeds_by_hand():
    scores = np.random.default_rng(0).random((3, 40))
    found = estimate(scores, pooled=(9.0, 5))  # not needed, so not used
    images = scores.mean(0).var(ddof=1) / 40
    seeds = scores.mean(1).var(ddof=1) / 3
    df = (images + seeds) ** 2 / (images**2 / 39 + seeds**2 / 2)
    margin = scipy.stats.t.ppf(0.975, df) * math.sqrt(images + seeds)
    expected = (scores.mean(), scores.mean() - margin, scores.mean() + margin)
    assert (found.value, found.low, found.high) == pytest.approx(expected)
    assert found.deviation == pytest.approx(np.std(scores.mean(1), ddof=1))


def test_estimate_without_image_noise_is_the_t_interval_of_the_seeds():
    means = np.array([0.4, 0.5, 0.55, 0.62])
    found = estimate(np.repeat(means[:, None], 30, axis=1))
    expected = scipy.stats.t.interval(0.95, 3, means.mean(), scipy.stats.sem(means))
    assert (found.low, found.high) == pytest.approx(expected)


def test_estimate_of_one_seed_is_the_t_interval_of_the_images_or_wilsons():
    scores = np.random.default_rng(0).random((1, 25))
    found = estimate(scores)
    low, high = scipy.stats.t.interval(0.95, 24, scores.mean(), scipy.stats.sem(scores[0]))
    assert found == Estimate(scores.mean(), pytest.approx(low), pytest.approx(high), None)
    right = scores > 0.1
    found = estimate(right)
    assert (found.low, found.high) == wilson(int(right.sum()), 25)


def test_one_seed_borrows_and_three_do_not():
    rng = np.random.default_rng(0)
    for scores in (rng.random((1, 200)), rng.random((1, 200)) < 0.7):
        alone, lent = estimate(scores), estimate(scores, pooled=(0.01, 10))
        assert lent.high - lent.low > 2 * (alone.high - alone.low)
        assert lent.value == alone.value and lent.deviation is None
    scores = rng.random((3, 200))
    assert estimate(scores) == estimate(scores, pooled=(0.01, 10))


def test_two_seeds_take_the_larger_variance():
    scores = np.full((2, 50), [[0.4], [0.5]])  # own variance 0.005
    small, large = estimate(scores, (0.001, 8)), estimate(scores, (0.02, 8))
    quantile = scipy.stats.t.ppf(0.975, 8)
    assert small.high - small.value == pytest.approx(quantile * math.sqrt(0.005 / 2))
    assert large.high - large.value == pytest.approx(quantile * math.sqrt(0.02 / 2))
    alone = estimate(scores)  # nobody to borrow from: one degree of freedom, t = 12.7
    assert (alone.low, alone.high) == (0.0, 1.0) and alone.deviation == pytest.approx(0.0707, 0.01)


def test_training_noise_never_narrows_wilsons_interval():
    for right in (np.ones((1, 20)), np.zeros((1, 20)), np.eye(1, 20)):
        low, high = wilson(int(right.sum()), 20)
        found = estimate(right, pooled=(1e-9, 4))
        assert found.low <= low and found.high >= high


def test_estimate_drops_images_that_are_nan():
    scores = np.random.default_rng(0).random((3, 20))
    holed = np.insert(scores, [0, 7, 20], NAN, axis=1)
    assert estimate(holed) == estimate(scores)


def test_estimate_without_images_or_variance():
    none = estimate(np.full((2, 3), NAN))
    assert math.isnan(none.value) and (none.low, none.high, none.deviation) == (0.0, 1.0, None)
    assert estimate(np.zeros((1, 0))).high == 1.0
    assert estimate(np.array([[0.25]])) == Estimate(0.25, 0.0, 1.0, None)
    assert estimate(np.ones((1, 1))).low == wilson(1, 1)[0]
    assert estimate(np.ones((3, 9))) == Estimate(1.0, 1.0, 1.0, 0.0)


def test_scores_are_refused():
    good = np.full((2, 4), 0.5)
    holed = good.copy()
    holed[0, 1] = NAN
    for bad in (good[0], good[:0], holed, good + 1, good - 1, good * math.inf):
        with pytest.raises(ValueError):
            estimate(bad)
        with pytest.raises(ValueError):
            difference(good, bad)
    with pytest.raises(ValueError, match="same images"):
        difference(good, good[:, :3])


# ---- difference ----------------------------------------------------------------------------------


def test_difference_of_many_seeds_by_hand():
    rng = np.random.default_rng(2)
    image = rng.random(60) / 2
    a = image + rng.random((4, 1)) * 0.2 + rng.random((4, 60)) * 0.3
    b = image + rng.random((3, 1)) * 0.2 + rng.random((3, 60)) * 0.3
    found = difference(a, b, pooled=(9.0, 5))
    variances = [
        (a.mean(0) - b.mean(0)).var(ddof=1) / 60,
        a.mean(1).var(ddof=1) / 4,
        b.mean(1).var(ddof=1) / 3,
    ]
    df = sum(variances) ** 2 / sum(v**2 / f for v, f in zip(variances, (59, 3, 2), strict=True))
    value, error = a.mean() - b.mean(), math.sqrt(sum(variances))
    margin = scipy.stats.t.ppf(0.975, df) * error
    p = 2 * scipy.stats.t.sf(abs(value) / error, df)
    expected = (value, value - margin, value + margin, p)
    assert (found.value, found.low, found.high, found.p) == pytest.approx(expected)
    back = difference(b, a)
    mirrored = (-back.value, -back.high, -back.low, back.p)
    assert mirrored == pytest.approx(expected)


def test_difference_without_image_noise_is_welchs_test():
    a, b = np.array([0.4, 0.5, 0.55, 0.62]), np.array([0.3, 0.31, 0.42])
    found = difference(np.repeat(a[:, None], 9, axis=1), np.repeat(b[:, None], 9, axis=1))
    welch = scipy.stats.ttest_ind(a, b, equal_var=False)
    interval = welch.confidence_interval()
    expected = (welch.pvalue, interval.low, interval.high)
    assert (found.p, found.low, found.high) == pytest.approx(expected)


def test_difference_of_one_seed_each_is_the_paired_t_test_or_mcnemars():
    rng = np.random.default_rng(0)
    a, b = rng.random((1, 80)), rng.random((1, 80))
    found, paired = difference(a, b), scipy.stats.ttest_rel(a[0], b[0])
    interval = paired.confidence_interval()
    expected = (paired.pvalue, interval.low, interval.high)
    assert (found.p, found.low, found.high) == pytest.approx(expected)
    a, b = a < 0.9, b < 0.8
    found, paired = difference(a, b), scipy.stats.ttest_rel(a[0].astype(float), b[0].astype(float))
    assert found.p == mcnemar(a[0], b[0]) != pytest.approx(paired.pvalue, rel=0.01)
    assert found.low == pytest.approx(paired.confidence_interval().low)


def test_a_variance_borrowed_twice_is_no_surer_than_once():
    a, b = np.full((1, 30), 0.6), np.full((1, 30), 0.5)
    found = difference(a, b, pooled=(0.001, 4))
    expected = 2 * scipy.stats.t.sf(0.1 / math.sqrt(0.002), 4)
    assert found.p == pytest.approx(expected)


def test_training_noise_makes_no_pair_of_checkpoints_surer():
    a, b = np.ones((1, 6)), np.eye(1, 6)  # 5 images to 0: McNemar 1/16, the t-test far less
    assert difference(a, b).p == difference(a, b, pooled=(1e-9, 4)).p == 2 / 32
    assert difference(a, b, pooled=(0.5, 4)).p > 0.3


def test_difference_drops_images_that_are_nan_in_either():
    rng = np.random.default_rng(0)
    a, b = rng.random((3, 20)), rng.random((2, 20))
    expected = difference(a[:, 2:], b[:, 2:])
    a[:, 0] = NAN
    b[:, 1] = NAN
    assert difference(a, b) == expected
    b[:, 1:] = NAN
    nothing = difference(a, b)
    assert math.isnan(nothing.value) and (nothing.low, nothing.high, nothing.p) == (-1.0, 1.0, 1.0)
    assert difference(np.array([[0.75]]), np.array([[0.5]])) == Difference(0.25, -1.0, 1.0, 1.0)


def test_difference_of_the_same_scores_is_nothing():
    scores = np.random.default_rng(0).random((1, 50))
    for k in (1, 3):  # the mean of three equal rows is not quite the row
        same = difference(np.repeat(scores, k, axis=0), scores)
        assert (same.value, same.p) == (0.0, 1.0)
    many = np.random.default_rng(0).random((3, 50))
    shuffled = difference(many, many[[2, 0, 1]])
    assert (shuffled.value, shuffled.p) == (0.0, 1.0)
    right = scores < 0.5
    assert difference(right, right) == Difference(0.0, 0.0, 0.0, 1.0)


def test_a_difference_without_variance_is_certain():
    found = difference(np.full((3, 7), 0.6), np.full((3, 7), 0.5))
    assert found.p == 0.0
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    rounded = difference(np.array([[0.3, 0.4]]), np.array([[0.2, 0.3]]))
    assert rounded.p == 0.0


def test_interval_of_a_difference_stays_in_range():
    found = difference(np.ones((1, 9)), np.zeros((1, 9)), pooled=(0.5, 1))
    assert found.high == 1.0 and found.low == -1.0


# ---- worlds of which the truth is known ----------------------------------------------------------


class World:
    """Models that are all as good (0.5), on images of unequal difficulty, with unequal seeds."""

    def __init__(self, seed, n=200, image=0.1, training=0.01, rest=0.02):
        self.rng = np.random.default_rng(seed)
        self.n, self.training, self.rest = n, training, rest
        self.images = self.rng.normal(0.5, image, n)

    def model(self, k):
        noise = self.rng.normal(0, self.training, (k, 1))
        noise = noise + self.rng.normal(0, self.rest, (k, self.n))
        return np.clip(self.images + noise, 0, 1)

    def pooled(self, models=6):
        return pooled_seed_variance([self.model(3).mean(1) for _ in range(models)])


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_intervals_cover_the_truth_in_about_95_percent(k):
    runs = 500
    alone = apart = rejected = 0
    for seed in range(runs):
        world = World(seed)
        a, b, pooled = world.model(k), world.model(k), world.pooled()
        one, two = estimate(a, pooled), difference(a, b, pooled)
        alone += one.low <= 0.5 <= one.high
        apart += two.low <= 0 <= two.high
        rejected += two.p < 0.05
    # 500 runs: a standard error of 1 %.
    assert 0.92 <= alone / runs <= 0.985
    assert 0.92 <= apart / runs <= 0.99
    assert rejected == runs - apart  # p and interval say the same


def test_image_noise_alone_would_cover_far_less_than_95_percent():
    """The simulation above can fail: without the borrowed variance it does."""
    covered = 0
    for seed in range(200):
        world = World(seed)
        found = difference(world.model(1), world.model(1))
        covered += found.low <= 0 <= found.high
    assert covered / 200 < 0.6


def test_pairing_finds_what_unpaired_intervals_cannot():
    world = World(0, training=0.002)
    a, b = world.model(3), world.model(3) - 0.02
    one, other = estimate(a), estimate(b)
    assert one.low < other.high and difference(a, b).p < 0.01


def test_mcnemar_alone_takes_training_noise_for_a_difference_between_models():
    """Two models that are as good, one seed each: seeds differ by some 1 % of accuracy."""
    runs, n = 300, 2000
    rng = np.random.default_rng(0)
    image = rng.beta(4, 1, n) * 0.9

    def train(k):
        chance = np.clip(image + rng.normal(0, 0.015, (k, 1)), 0, 1)
        return rng.random((k, n)) < chance

    naive = honest = 0
    for _ in range(runs):
        pooled = pooled_seed_variance([train(3).mean(1) for _ in range(5)])
        a, b = train(1), train(1)
        naive += mcnemar(a[0], b[0]) < 0.05
        honest += difference(a, b, pooled).p < 0.05
    assert naive / runs > 0.15
    assert honest / runs < 0.08


# ---- ranks ---------------------------------------------------------------------------------------


def flat(value, k=3, n=40, spread=0.01, seed=0):
    """Scores whose mean is `value` exactly, and whose seeds and images differ by `spread`."""
    noise = np.random.default_rng(seed).normal(0, spread, (k, n))
    seeds = np.linspace(-spread, spread, k)[:, None]
    return value + noise - noise.mean(1, keepdims=True) + seeds


def test_ranks_of_clear_differences():
    assert ranks([flat(0.5), flat(0.9, seed=1), flat(0.7, seed=2), flat(0.3, seed=3)]) == [
        3,
        1,
        2,
        4,
    ]


def test_ranks_of_ties():
    scores = [flat(value, seed=i) for i, value in enumerate((0.5, 0.501, 0.9, 0.9))]
    assert ranks(scores) == [3, 3, 1, 1]
    same = flat(0.5)
    assert ranks([same, same, same]) == [1, 1, 1]
    assert ranks([same]) == [1]
    assert ranks([]) == []


def test_rank_counts_who_is_better_where_equal_is_not_transitive():
    best, middle, worst = flat(0.53), flat(0.51, seed=1), flat(0.49, seed=2)
    assert difference(best, middle).p > 0.05 and difference(middle, worst).p > 0.05
    assert difference(best, worst).p < 0.01
    assert ranks([worst, best, middle]) == [2, 1, 1]


def test_ranks_correct_for_the_number_of_pairs():
    a, b = flat(0.525), flat(0.5, seed=1)
    p = difference(a, b).p
    assert 0.05 / 3 < p < 0.05
    assert ranks([a, b]) == [1, 2]
    assert ranks([a, b, b]) == [1, 1, 1]  # three pairs, and two p of the same size
    assert ranks([a, b, b], level=0.2) == [1, 2, 2]


def test_ranks_use_the_borrowed_variance():
    scores = [flat(0.5, k=1), flat(0.6, k=1, seed=1)]
    assert ranks(scores) == [2, 1]
    assert ranks(scores, pooled=(0.01, 6)) == [1, 1]


def test_ranks_seldom_separate_models_that_are_the_same():
    wrong = 0
    for seed in range(100):
        world = World(seed, n=80)
        wrong += max(ranks([world.model(3) for _ in range(5)])) > 1
    assert wrong <= 11  # at most 5 % expected; 11 of 100 has a chance below 1 %


@pytest.mark.parametrize("level", [0.0, 1.0, NAN])
def test_ranks_refuse_a_level_that_is_none(level):
    with pytest.raises(ValueError, match="level"):
        ranks([flat(0.5)], level=level)
