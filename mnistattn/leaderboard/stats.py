"""Which differences between models are more than chance: pure functions on numpy arrays.

A score is in [0, 1], one an image: right or wrong (0/1), or attention correctness, NaN on an image
where it is undefined. A model's **scores** are a (seeds, images) array, one row a training seed,
all over the same test images. Their mean would come out otherwise for two reasons:

- Other test images. This noise is shared: an image that is hard for one model is hard for most. So
  two models are compared image by image, where what they share cancels.
- Another training seed. This noise is each model's own and shifts its score on many images at
  once. More images do not lessen it, and no test on one checkpoint a model sees it. McNemar's test
  asks whether two *checkpoints* differ; a board ranks *models*, so it has to ask for both.

Two seeds say little about a model's variance between seeds and one says nothing. With fewer than
three it is borrowed from the other models of the group (`pooled_seed_variance`), as though all of
them shook alike. If nobody has two seeds, then only the images' variance can be known.

The two variances are added. Both contain the noise that is neither the image's nor the seed's
alone (a seed's luck on one image), so it counts twice: that errs towards wider intervals and larger
p, the more so the less the seeds of a model agree on which images they miss. Where both
variances are 0, such as in seeds that are right on every image, the interval is a point.

`pooled` is, in all functions here, a pair (variance between seeds, its degrees of freedom >= 1).

[1] McNemar: Note on the sampling error of the difference between correlated proportions or
    percentages. Psychometrika 1947.
[2] Holm: A simple sequentially rejective multiple test procedure. Scandinavian Journal of
    Statistics 1979.
[3] Satterthwaite: An approximate distribution of estimates of variance components. Biometrics
    Bulletin 1946.
[4] Efron, Tibshirani: An introduction to the bootstrap. 1993, chapters 13 and 16.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest, norm, t

from mnistattn.evaluation.metrics import wilson
from mnistattn.leaderboard.board import Estimate

Pooled = tuple[float, float]

# Means of the same float64 scores, summed in another order, differ by less than this.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Difference:
    """A mean difference between two models, its 95 % interval, and the two-sided p of none."""

    value: float
    low: float
    high: float
    p: float


# ---- one model, two models, all models -----------------------------------------------------------


def estimate(scores: np.ndarray, pooled: Pooled | None = None) -> Estimate:
    """Mean score of a model (seeds, images), with a 95 % interval for other images and seeds.

    value: the mean of the seeds' means; deviation: their sample standard deviation (None for one
    seed). The interval is Student's t on the sum of the images' variance (of the mean over seeds,
    over n) and the seeds' (over k), with Satterthwaite's degrees of freedom [3], cut to [0, 1].
    Three seeds or more use their own variance; two the larger of their own and `pooled`; one takes
    `pooled`. One seed of 0/1 scores: Wilson's interval, or with `pooled` no narrower than it.

    Images that are NaN are dropped. Fewer than two left say nothing about others: (0, 1), unless
    Wilson's serves; none left: value NaN. Raises ValueError unless scores are (seeds >= 1, images),
    in [0, 1] or NaN, with the same images NaN in every seed.

    >>> estimate(np.array([[1, 0, 1, 1], [1, 1, 1, 1], [1, 0, 1, 0]])).deviation
    0.25
    >>> one = estimate(np.array([[1, 1, 1, 1, 0, 1, 1, 1, 0, 1]]))
    >>> one.value, round(one.low, 4), round(one.high, 4)  # Wilson: 8 of 10
    (0.8, 0.4902, 0.9433)
    """
    scores = _checked(scores)
    scores = scores[:, ~np.isnan(scores[0])]
    k, n = scores.shape
    if n == 0:
        return Estimate(math.nan, 0.0, 1.0)
    means = scores.mean(1)
    value = float(means.mean())
    deviation = float(means.std(ddof=1)) if k > 1 else None
    low, high = 0.0, 1.0
    exact = k == 1 and _is_binary(scores)
    if exact:
        low, high = wilson(int(scores.sum()), n)
    if n > 1 and not (exact and pooled is None):
        seeds = _seed_variance(means, pooled)
        total, df = _satterthwaite(_image_variance(scores.mean(0)), (seeds.variance / k, seeds.df))
        lower, higher = _interval(value, total, df)
        # Where t's normal shape fails, at shares near 0 and 1, training noise must not narrow.
        low, high = (min(low, lower), max(high, higher)) if exact else (lower, higher)
    return Estimate(value, max(low, 0.0), min(high, 1.0), deviation)


def difference(a: np.ndarray, b: np.ndarray, pooled: Pooled | None = None) -> Difference:
    """Mean score of model a (seeds, images) less that of b (seeds, images), over the same images.

    The t-test and interval of `estimate`, with three variances: the images' (paired: of the
    difference of the means over seeds), a's seeds' and b's. The interval is cut to [-1, 1]. One
    seed each of 0/1 scores: p is McNemar's exact one, about these two checkpoints only; with
    `pooled`, the larger of it and the t-test's, as training noise makes nothing surer.

    Images that are NaN in either are dropped. Fewer than two left say nothing: interval (-1, 1),
    p 1 (none left: value NaN). No variance at all: p is 1 if the value is 0, else 0.
    Raises ValueError as `estimate` does, and if the numbers of images differ.

    >>> a, b = np.array([[1, 1, 1, 1, 1, 1, 0, 1]]), np.array([[0, 0, 0, 0, 0, 0, 0, 1]])
    >>> found = difference(a, b)
    >>> found.value, found.p  # McNemar: 6 heads of 6
    (0.75, 0.03125)
    >>> found = difference(a, b, pooled=(0.04, 10))  # training noise of 0.2 each
    >>> round(found.low, 3), round(found.high, 3), round(found.p, 3)
    (0.055, 1.0, 0.036)
    """
    a, b = _checked(a), _checked(b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a and b must be over the same images, not {a.shape[1]}, {b.shape[1]}.")
    kept = ~np.isnan(a[0] + b[0])
    a, b = a[:, kept], b[:, kept]
    paired = a.mean(0) - b.mean(0)
    paired[np.abs(paired) < ROUNDING] = 0
    if len(paired) < 2:
        value = float(paired[0]) if len(paired) else math.nan
        return Difference(value, -1.0, 1.0, 1.0)
    value = float(paired.mean())
    ours, theirs = _seed_variance(a.mean(1), pooled), _seed_variance(b.mean(1), pooled)
    terms = [(ours.variance / len(a), ours.df), (theirs.variance / len(b), theirs.df)]
    if ours.borrowed and theirs.borrowed:
        # The same estimate twice is no more sure than once.
        terms = [(terms[0][0] + terms[1][0], ours.df)]
    total, df = _satterthwaite(_image_variance(paired), *terms)
    if total < ROUNDING**2:
        p = 1.0 if abs(value) < ROUNDING else 0.0
    else:
        p = float(2 * t.sf(abs(value) / math.sqrt(total), df))
    if len(a) == len(b) == 1 and _is_binary(a) and _is_binary(b):
        exact = mcnemar(a[0] == 1, b[0] == 1)
        p = exact if pooled is None else max(p, exact)
    low, high = _interval(value, total, df)
    return Difference(value, max(low, -1.0), min(high, 1.0), p)


def ranks(
    scores: Sequence[np.ndarray], pooled: Pooled | None = None, level: float = 0.05
) -> list[int]:
    """Rank of each model, (seeds, images) scores: 1 + the number that are significantly better.

    All pairs are tested (`difference`), with Holm's correction over all of them, so the chance of
    even one false "better" is at most `level`. Models that nothing separates share a rank.

    "Not different" is not transitive: a may equal b and b equal c while a beats c. So there is no
    honest way to cut the list into groups of equals. Counting who is better needs none: there a and
    b are 1 and c is 2. A rank is thus the best place that a model may claim, not its place by mean;
    and a model with few seeds, whose mean is unsure, may share rank 1 with a better mean.

    Raises ValueError as `difference` does, and unless 0 < level < 1.

    >>> good, bad = np.ones((1, 50)), np.zeros((1, 50))
    >>> ranks([bad, good, good])
    [3, 1, 1]
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, not {level}.")
    pairs = list(itertools.combinations(range(len(scores)), 2))
    found = [difference(scores[i], scores[j], pooled) for i, j in pairs]
    ranking = [1] * len(scores)
    for (i, j), pair, p in zip(pairs, found, holm([pair.p for pair in found]), strict=True):
        if p <= level:
            ranking[j if pair.value > 0 else i] += 1
    return ranking


def pooled_seed_variance(groups: Iterable[np.ndarray]) -> tuple[float, int] | None:
    """Variance between the seeds of a model, pooled over models, and its degrees of freedom.

    groups: one (k,) array of seed means a model, finite. The sums of squares about each model's
    mean over the sum of k - 1; None if no model has two seeds. Raises ValueError for other shapes,
    or NaN (a model without the score belongs outside the list).

    >>> pooled_seed_variance([np.array([1.0, 3.0]), np.array([4.0, 5.0, 6.0]), np.array([9.0])])
    (1.3333333333333333, 3)
    """
    squares, freedom = 0.0, 0
    for group in groups:
        means = np.asarray(group, dtype=np.float64)
        if means.ndim != 1 or not np.isfinite(means).all():
            raise ValueError(f"Seed means must be (k,) finite floats, not {means}.")
        if len(means) > 1:
            squares += float(((means - means.mean()) ** 2).sum())
            freedom += len(means) - 1
    return (squares / freedom, freedom) if freedom else None


# ---- tests ---------------------------------------------------------------------------------------


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Exact two-sided p that two checkpoints, (n,) bool right answers, are equally often right [1].

    In (0, 1]. Of the images on which just one is right, each is so on half: a binomial test. No
    such image: 1. Both are over the same images, in order; raises ValueError for other shapes or
    dtypes.

    >>> mcnemar(np.array([True, True, True, True, False]), np.array([False] * 3 + [True] * 2))
    0.625
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.ndim != 1 or a.shape != b.shape or a.dtype != bool or b.dtype != bool:
        raise ValueError(
            f"mcnemar takes two (n,) bool arrays, not {a.shape} {a.dtype} and {b.shape} {b.dtype}."
        )
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def paired_bootstrap(
    difference: np.ndarray, *, seed: int = 0, resamples: int = 10_000, confidence: float = 0.95
) -> tuple[float, float, float]:
    """(low, high, p) of the mean of (n,) float differences per image, over resampled images [4].

    The percentile interval; p, two-sided, in (0, 1]: the share of resampled means, shifted to
    centre at 0, that are at least as far from 0 as the mean, with 1 added to both counts. The same
    for the same seed. Knows the images' variance only, not that of training.

    NaN are dropped. Fewer than two values left say nothing: (nan, nan, 1.0). Raises ValueError for
    another shape, infinity, resamples < 1, or a confidence outside (0, 1).

    >>> paired_bootstrap(np.array([0.5, 0.5, np.nan, 0.5]), resamples=99)
    (0.5, 0.5, 0.01)
    """
    values = np.asarray(difference, dtype=np.float64)
    if values.ndim != 1 or np.isinf(values).any():
        raise ValueError(f"Differences must be (n,) floats without infinity, not {values}.")
    if resamples < 1 or not 0 < confidence < 1:
        raise ValueError(f"Cannot use {resamples} resamples, confidence {confidence}.")
    values = values[~np.isnan(values)]
    n = len(values)
    if n < 2:
        return math.nan, math.nan, 1.0
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    # All indices at once would take 800 MB for 10,000 images; a block takes some 10 MB at most
    # (unless a single resample takes more).
    block = max(1, 1_000_000 // n)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        chosen = rng.integers(0, n, size=(rows, n), dtype=np.int32)
        means[start : start + rows] = values.take(chosen).mean(1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    mean = values.mean()
    # Differences of 0/1 scores, averaged over seeds, tie often: rounding must not decide those.
    margin = ROUNDING * np.abs(values).max()
    beyond = int((np.abs(means - mean) >= abs(mean) - margin).sum())
    return float(low), float(high), (1 + beyond) / (1 + resamples)


def two_shares(hits_a: int, n_a: int, hits_b: int, n_b: int) -> float:
    """Two-sided p that two independent shares, hits out of n, are equal. In [0, 1].

    The two-proportion z test with the pooled share's variance. A pooled share of 0 or 1, or an n of
    0: 1. For shares over different images; over the same ones use `mcnemar`. Raises ValueError
    unless 0 <= hits <= n.

    >>> round(two_shares(60, 100, 45, 100), 4)
    0.0337
    """
    for hits, n in ((hits_a, n_a), (hits_b, n_b)):
        if not 0 <= hits <= n:
            raise ValueError(f"hits must lie between 0 and n, not {hits} with n = {n}.")
    if n_a == 0 or n_b == 0 or hits_a + hits_b in (0, n_a + n_b):
        return 1.0
    share = (hits_a + hits_b) / (n_a + n_b)
    error = math.sqrt(share * (1 - share) * (1 / n_a + 1 / n_b))
    return float(2 * norm.sf(abs(hits_a / n_a - hits_b / n_b) / error))


def holm(p: Sequence[float]) -> list[float]:
    """Holm-Bonferroni adjusted p-values [2], in the order of `p`, each in [0, 1].

    Rejecting those <= level keeps the chance of any false rejection at most `level`, whatever the
    tests have in common. Raises ValueError for NaN or a p outside [0, 1].

    >>> holm([0.04, 0.01, 0.5])
    [0.08, 0.03, 0.5]
    """
    if not all(0 <= value <= 1 for value in p):
        raise ValueError(f"p-values must lie in [0, 1], not {list(p)}.")
    adjusted = [0.0] * len(p)
    least = 0.0
    for place, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        least = max(least, min(1.0, (len(p) - place) * float(p[index])))
        adjusted[index] = least
    return adjusted


# ---- inside --------------------------------------------------------------------------------------


class _Seeds(NamedTuple):
    """Variance of one seed's mean, its degrees of freedom, and whether they come from `pooled`."""

    variance: float
    df: float
    borrowed: bool


def _seed_variance(means: np.ndarray, pooled: Pooled | None) -> _Seeds:
    k = len(means)
    own = float(means.var(ddof=1)) if k > 1 else 0.0
    if k >= 3 or pooled is None:
        return _Seeds(own, max(k - 1, 1), False)
    # Two seeds that differ by more than the others' is a reason to widen. But with one degree of
    # freedom (t = 12.7) every third such pair would, by chance alone, get an interval some six
    # times too wide; so the degrees of freedom stay those of the pool.
    return _Seeds(max(own, pooled[0]), pooled[1], True)


def _image_variance(scores: np.ndarray) -> tuple[float, float]:
    return float(scores.var(ddof=1)) / len(scores), len(scores) - 1


def _satterthwaite(*terms: tuple[float, float]) -> tuple[float, float]:
    """Sum of independent (variance, degrees of freedom), with those of the sum [3]."""
    total = math.fsum(variance for variance, _ in terms)
    if total == 0:
        return 0.0, math.inf
    return total, 1 / math.fsum((variance / total) ** 2 / df for variance, df in terms)


def _interval(value: float, variance: float, df: float) -> tuple[float, float]:
    margin = float(t.ppf(0.975, df)) * math.sqrt(variance)
    return value - margin, value + margin


def _is_binary(scores: np.ndarray) -> bool:
    return bool(((scores == 0) | (scores == 1)).all())


def _checked(scores: np.ndarray) -> np.ndarray:
    """(seeds, images) float64, or ValueError."""
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or len(scores) == 0:
        raise ValueError(f"scores must be (seeds, images) with a seed, not {scores.shape}.")
    absent = np.isnan(scores)
    if (absent != absent[0]).any():
        raise ValueError("The same images must be NaN in every seed of a model.")
    if not (absent | ((scores >= 0) & (scores <= 1))).all():
        raise ValueError("scores must lie in [0, 1], or be NaN.")
    return scores
