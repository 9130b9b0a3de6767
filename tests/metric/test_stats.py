"""Golden values, from scipy-free hand computations and the published tables."""

import math

import numpy as np
import pytest

from safelight.metric import stats


@pytest.mark.parametrize(
    "found, n, low, high",
    [
        (0, 142, 0, 0.0263),
        (1, 142, 0.0012, 0.0388),
        (30, 142, 0.1522, 0.2856),
        (108, 142, 0.6841, 0.8233),
        (142, 142, 0.9737, 1),
        (0, 50, 0, 0.0713),
        (5, 95, 0.0227, 0.1173),
        (798, 1000, 0.7720, 0.8217),
    ],
)
def test_wilson_gives_the_golden_intervals(found, n, low, high):
    assert stats.wilson(found, n) == pytest.approx((low, high), abs=5e-5)


def test_zero_trials_give_nan_and_not_zero():
    assert all(map(math.isnan, stats.wilson(0, 0)))
    assert all(map(math.isnan, stats.newcombe(0, 0, 0, 0)))
    assert all(map(math.isnan, stats.bootstrap(np.zeros((0, 1)), lambda s: s[:, 0])))
    assert math.isnan(stats.frechet_of_samples(np.zeros((1, 3)), np.zeros((5, 3))))


def test_newcombes_paired_interval_gives_the_golden_value():
    assert stats.newcombe(20, 12, 3, 107) == pytest.approx((0.0634, 0.0087, 0.1204), abs=5e-5)


def test_newcombe_swaps_with_its_arms():
    value, low, high = stats.newcombe(20, 12, 3, 107)
    assert stats.newcombe(20, 3, 12, 107) == pytest.approx((-value, -high, -low))


def test_mcnemar_gives_the_golden_p():
    assert stats.mcnemar(12, 3) == pytest.approx(0.0352, abs=5e-5)
    assert stats.mcnemar(0, 0) == 1.0


def test_frechet_of_the_golden_gaussians_is_27():
    a, b = np.diag([1.0, 4.0]), np.diag([4.0, 1.0])
    assert stats.frechet(np.zeros(2), a, np.array([3.0, 4.0]), b) == pytest.approx(27.0)


def test_frechet_of_a_sample_with_itself_is_zero_even_when_rank_deficient():
    x = np.random.default_rng(0).normal(size=(10, 40))
    assert stats.frechet_of_samples(x, x) == pytest.approx(0, abs=1e-5)
    assert stats.frechet_of_samples(x, x + 1) == pytest.approx(40, abs=1e-5)


def test_cmmd_gives_the_golden_values():
    x, y = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    both = np.concatenate([x, y])
    assert stats.cmmd(x, y) == pytest.approx(19.9003, abs=5e-5)
    assert stats.cmmd(both, -both) == pytest.approx(19.8013, abs=5e-5)
    assert stats.cmmd(both, both) == pytest.approx(0, abs=1e-9)


def test_success_at_k_gives_the_golden_values():
    assert stats.success_at(4, 3, 10) == pytest.approx(0.8333, abs=5e-5)
    assert stats.success_at(4, 0, 10) == 0
    assert stats.success_at(4, 7, 10) == 1


@pytest.mark.parametrize(
    "p, q, n", [(0.2, 0.1, 199), (0.1, 0.05, 435), (0.5, 0.4, 388), (0.05, 0.02, 588)]
)
def test_sample_size_gives_the_golden_values(p, q, n):
    assert stats.sample_size(p, q) == n


def test_the_bootstrap_is_the_same_every_time_and_covers_about_what_it_says():
    rng = np.random.default_rng(1)

    def mean(sums):
        return sums[:, 0] / sums[:, 1]

    hits = 0
    for _ in range(100):
        sample = np.stack([rng.random(80) < 0.3, np.ones(80)], axis=1)
        low, high = stats.bootstrap(sample, mean, resamples=500)
        assert (low, high) == stats.bootstrap(sample, mean, resamples=500)
        hits += low <= 0.3 <= high
    assert 86 <= hits <= 100


def test_the_cluster_bootstrap_does_not_mistake_repeats_for_evidence():
    found = np.arange(50) % 2

    def mean(sums):
        return sums[:, 0] / sums[:, 1]

    once = stats.bootstrap(np.stack([found, np.ones(50)], 1), mean)
    ten_times = stats.bootstrap(np.stack([10 * found, np.full(50, 10)], 1), mean)
    assert once == pytest.approx(ten_times)
