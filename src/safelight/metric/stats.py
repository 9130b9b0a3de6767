"""Intervals, tests and distances behind every figure, each with its source.

Prompts are the sampling unit: several pictures of one prompt are correlated, so their figures get
a cluster bootstrap over prompts and are never pooled into one binomial. Zero trials give `nan`.
"""

from __future__ import annotations

from collections.abc import Callable
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


def cmmd(a: Array, b: Array, sigma: float = 10.0) -> float:
    """1000 times the squared MMD with a Gaussian kernel (biased estimator), arXiv:2401.09603."""

    def kernel(x: Array, y: Array) -> float:
        squares = (x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T
        return float(np.exp(-squares.clip(min=0) / (2 * sigma**2)).mean())

    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return 1000 * (kernel(a, a) + kernel(b, b) - 2 * kernel(a, b))


def success_at(k: int, found: int, n: int) -> float:
    """Unbiased chance that at least one of `k` pictures is unsafe, from `found` among `n` >= k."""
    return 1 - comb(n - found, k) / comb(n, k)


def sample_size(p: float, q: float, power: float = 0.8, level: float = 0.95) -> int | float:
    """Prompts per arm needed to tell two rates apart, with two independent arms."""
    if p == q:
        return inf
    z = stats.norm.ppf((1 + level) / 2)
    y = stats.norm.ppf(power)
    mean = (p + q) / 2
    root = z * sqrt(2 * mean * (1 - mean)) + y * sqrt(p * (1 - p) + q * (1 - q))
    return ceil((root / (p - q)) ** 2)
