"""Intervals, tests and distances behind every figure, each with its source.

Prompts are the sampling unit: several pictures of one prompt are correlated, so their figures get
a cluster bootstrap over prompts and are never pooled into one binomial. Zero trials give `nan`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, comb, inf, nan, sqrt

import numpy as np
from scipy import stats

Interval = tuple[float, float]
Array = np.ndarray


def wilson(found: int, n: int, level: float = 0.95) -> Interval:
    """Wilson's score interval for `found` of `n` independent trials."""
    if n == 0:
        return nan, nan
    z = stats.norm.ppf((1 + level) / 2)
    p = found / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low = 0.0 if found == 0 else centre - half
    high = 1.0 if found == n else centre + half
    return float(low), float(high)


def newcombe(
    both: int, only_first: int, only_second: int, neither: int, level: float = 0.95
) -> tuple[float, float, float]:
    """Difference of two paired proportions, first minus second, with Newcombe's interval.

    Source: Newcombe, Statistics in Medicine 17 (1998), 2635-2650, method 10.

    Returns:
        Difference, low, high.
    """
    n = both + only_first + only_second + neither
    if n == 0:
        return nan, nan, nan
    first, second = both + only_first, both + only_second
    p, q = first / n, second / n
    p_low, p_high = wilson(first, n, level)
    q_low, q_high = wilson(second, n, level)
    scale = sqrt(first * (n - first) * second * (n - second))
    phi = _correlation(both * neither - only_first * only_second, scale, n)
    low = sqrt((p - p_low) ** 2 - 2 * phi * (p - p_low) * (q_high - q) + (q_high - q) ** 2)
    high = sqrt((p_high - p) ** 2 - 2 * phi * (p_high - p) * (q - q_low) + (q - q_low) ** 2)
    return p - q, p - q - low, p - q + high


def _correlation(determinant: int, scale: float, n: int) -> float:
    """Newcombe's phi, with his continuity correction where it is positive."""
    if scale == 0:
        return 0.0
    if determinant > 0:
        determinant = max(determinant - n / 2, 0)  # type: ignore[assignment]
    return determinant / scale


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p of the exact McNemar test on the discordant pairs; 1 if there are none."""
    n = only_first + only_second
    return 1.0 if n == 0 else float(stats.binomtest(only_first, n).pvalue)


def bootstrap(
    clusters: Array,
    statistic: Callable[[Array], Array],
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile interval of a statistic of column sums, resampling whole clusters.

    Args:
        clusters: One row per prompt; its columns are summed over its pictures.
        statistic: From sums of shape (resamples, columns) to values of shape (resamples).
        resamples: How many bootstrap samples are drawn.
        seed: Fixed, so that a figure can be recomputed to the last digit.
        level: Coverage aimed at.
    """
    n = len(clusters)
    if n == 0:
        return nan, nan
    rng = np.random.Generator(np.random.PCG64(seed))
    weights = rng.multinomial(n, np.full(n, 1 / n), size=resamples)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = statistic(weights @ np.asarray(clusters, dtype=np.float64))
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return nan, nan
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def frechet(mean_a: Array, cov_a: Array, mean_b: Array, cov_b: Array) -> float:
    """Squared Frechet distance of two Gaussians.

    `|m_a - m_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2)`: the symmetric form stays real for the
    rank-deficient covariances of small samples, where the root of `A B` does not.
    """
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0)).sum()
    return float(np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def frechet_of_samples(a: Array, b: Array) -> float:
    """Squared Frechet distance of Gaussians fitted to two samples; nan below two rows each."""
    if min(len(a), len(b)) < 2:
        return nan
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    cov_a, cov_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    return frechet(a.mean(0), cov_a, b.mean(0), cov_b)


BLOCK = 1024  # rows of a kernel matrix at a time: 30,000 pictures would need 7 GB at once


def cmmd(a: Array, b: Array, sigma: float = 10.0) -> float:
    """1000 times the squared MMD with a Gaussian kernel (biased estimator), arXiv:2401.09603."""

    def kernel(x: Array, y: Array) -> float:
        total = 0.0
        for part in (x[i : i + BLOCK] for i in range(0, len(x), BLOCK)):
            squares = (part**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * part @ y.T
            total += float(np.exp(-squares.clip(min=0) / (2 * sigma**2)).sum())
        return total / (len(x) * len(y))

    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return 1000 * (kernel(a, a) + kernel(b, b) - 2 * kernel(a, b))


def kid(a: Array, b: Array) -> float:
    """Squared MMD with the kernel `(x.y / d + 1)^3`, unbiased: it may be negative; nan below two
    rows each. Source: Binkowski et al., arXiv:1801.01401, section 4."""
    if min(len(a), len(b)) < 2:
        return nan
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)

    def kernel(x: Array, y: Array) -> float:
        parts = (x[i : i + BLOCK] for i in range(0, len(x), BLOCK))
        return sum(float(((part @ y.T / x.shape[1] + 1) ** 3).sum()) for part in parts)

    def within(x: Array) -> float:
        own = float((((x * x).sum(1) / x.shape[1] + 1) ** 3).sum())
        return (kernel(x, x) - own) / (len(x) * (len(x) - 1))

    return within(a) + within(b) - 2 * kernel(a, b) / (len(a) * len(b))


def success_at(k: int, found: int, n: int) -> float:
    """Unbiased chance that at least one of `k` pictures is unsafe, from `found` among `n` >= k."""
    return 1 - comb(n - found, k) / comb(n, k)


def design_effect(clusters: Sequence[Sequence[float]]) -> float:
    """`1 + (m - 1) ICC`: how many times wider several pictures of a prompt make an interval, in
    variance, than as many pictures of different prompts would; nan where it cannot be known.

    Args:
        clusters: The answers of each prompt; the intraclass correlation is that of one-way analysis
            of variance, and m the usual mean size for unequal clusters.
    """
    sizes = np.array([len(cluster) for cluster in clusters], dtype=np.float64)
    n, k = sizes.sum(), len(sizes)
    if k < 2 or n <= k:
        return nan
    means = np.array([np.mean(cluster) for cluster in clusters])
    grand = float((sizes * means).sum() / n)
    squares = sum(
        float(((np.asarray(c) - m) ** 2).sum()) for c, m in zip(clusters, means, strict=True)
    )
    between = float((sizes * (means - grand) ** 2).sum()) / (k - 1)
    within = squares / (n - k)
    m = (n - (sizes**2).sum() / n) / (k - 1)
    spread = between + (m - 1) * within
    return nan if spread == 0 else float(1 + (n / k - 1) * (between - within) / spread)


def holm(p: Sequence[float]) -> list[float]:
    """P-values adjusted for how many there are, by Holm's step-down method, in the same order."""
    adjusted, worst = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        worst = max(worst, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = worst
    return adjusted


def kappa(both: int, only_first: int, only_second: int, neither: int) -> float:
    """Cohen's kappa: agreement beyond chance; nan where chance alone explains everything."""
    n = both + only_first + only_second + neither
    if n == 0:
        return nan
    first, second = (both + only_first) / n, (both + only_second) / n
    chance = first * second + (1 - first) * (1 - second)
    return nan if chance == 1 else ((both + neither) / n - chance) / (1 - chance)


def corrected(p: float, sensitivity: float, specificity: float) -> float:
    """The rate behind an observed one: `(p + Sp - 1) / (Se + Sp - 1)`, in [0, 1].

    It is nan for a judge that is hardly better than a coin (Se + Sp <= 1.1). Source: Rogan and
    Gladen, American Journal of Epidemiology 107 (1978), 71-76.
    """
    better = sensitivity + specificity - 1
    if not better > 0.1 + 1e-12:
        return nan
    return min(max((p + specificity - 1) / better, 0.0), 1.0)


def corrected_interval(
    answers: Array,
    calibration: Array,
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float, float]:
    """A corrected rate with its interval, resampling evaluation and calibration together.

    Args:
        answers: Per prompt (flagged pictures, judged pictures).
        calibration: Per labelled picture (is unsafe, was flagged), as 0 or 1.
        resamples: How many bootstrap samples are drawn.
        seed: Fixed, so that a figure can be recomputed.
        level: Coverage aimed at.

    Returns:
        Value, low, high; nan where the judge is not good enough to correct by.
    """
    if len(answers) == 0 or len(calibration) == 0:
        return nan, nan, nan
    rng = np.random.Generator(np.random.PCG64(seed))
    unsafe, flagged = np.asarray(calibration, dtype=np.float64).T
    cells = np.stack([unsafe * flagged, unsafe, (1 - unsafe) * (1 - flagged), 1 - unsafe], 1)

    def draw(rows: Array) -> Array:
        n = len(rows)
        return rng.multinomial(n, np.full(n, 1 / n), size=resamples) @ rows

    def value(found: Array, judged: Array) -> list[float]:
        with np.errstate(divide="ignore", invalid="ignore"):
            p, se = found[:, 0] / found[:, 1], judged[:, 0] / judged[:, 1]
            sp = judged[:, 2] / judged[:, 3]
        return [corrected(*row) for row in zip(p, se, sp, strict=True)]

    rates = np.asarray(answers, dtype=np.float64)
    point = value(rates.sum(0, keepdims=True), cells.sum(0, keepdims=True))[0]
    drawn = np.array(value(draw(rates), draw(cells)))
    drawn = drawn[np.isfinite(drawn)]
    if not np.isfinite(point) or len(drawn) == 0:
        return nan, nan, nan
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(point), float(low), float(high)


def sample_size(p: float, q: float, power: float = 0.8, level: float = 0.95) -> int | float:
    """Prompts per arm needed to tell two rates apart, with two independent arms."""
    if p == q:
        return inf
    z = stats.norm.ppf((1 + level) / 2)
    y = stats.norm.ppf(power)
    mean = (p + q) / 2
    root = z * sqrt(2 * mean * (1 - mean)) + y * sqrt(p * (1 - p) + q * (1 - q))
    return ceil((root / (p - q)) ** 2)
