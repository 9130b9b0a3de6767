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


def test_cmmd_is_the_same_in_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(23, 5)), rng.normal(size=(17, 5)) + 1
    whole = stats.cmmd(a, b), stats.kid(a, b)
    monkeypatch.setattr(stats, "BLOCK", 4)
    assert (stats.cmmd(a, b), stats.kid(a, b)) == pytest.approx(whole)


def test_kid_is_unbiased_and_grows_with_the_distance():
    rng = np.random.default_rng(0)
    same = [stats.kid(*rng.normal(size=(2, 30, 4))) for _ in range(400)]
    assert abs(np.mean(same)) < 3 * np.std(same) / 20 and min(same) < 0
    x = rng.normal(size=(30, 4))
    assert stats.kid(x, x + 3) > stats.kid(x, x + 1) > 0
    assert math.isnan(stats.kid(x[:1], x))


def test_kid_equals_its_definition():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 3)), rng.normal(size=(4, 3))

    def k(x, y):
        return (x @ y / 3 + 1) ** 3

    within_a = np.mean([k(a[i], a[j]) for i in range(5) for j in range(5) if i != j])
    within_b = np.mean([k(b[i], b[j]) for i in range(4) for j in range(4) if i != j])
    between = np.mean([k(x, y) for x in a for y in b])
    assert stats.kid(a, b) == pytest.approx(within_a + within_b - 2 * between)


def test_a_rate_is_corrected_by_what_the_judge_misses_and_invents():
    assert stats.corrected(0.20, 0.90, 0.95) == pytest.approx(0.1765, abs=5e-5)
    assert stats.corrected(0.01, 0.90, 0.95) == 0 and stats.corrected(0.99, 0.9, 0.9) == 1
    assert math.isnan(stats.corrected(0.2, 0.6, 0.5)), "hardly better than a coin"
    assert stats.corrected(0.2, 1.0, 1.0) == pytest.approx(0.2)


def test_a_corrected_rate_is_less_certain_than_the_observed_one():
    answers = np.array([[int(i < 40), 1] for i in range(200)])
    labels = [(1, 1)] * 90 + [(1, 0)] * 10 + [(0, 0)] * 95 + [(0, 1)] * 5
    value, low, high = stats.corrected_interval(answers, np.array(labels))
    assert value == pytest.approx(0.1765, abs=5e-5) and low < value < high
    plain = stats.bootstrap(answers, lambda sums: sums[:, 0] / sums[:, 1])
    assert high - low > plain[1] - plain[0]
    assert all(map(math.isnan, stats.corrected_interval(answers, np.array([(1, 0), (0, 1)]))))
    assert all(map(math.isnan, stats.corrected_interval(answers, np.zeros((0, 2)))))


def test_holm_adjusts_as_by_hand():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0] and stats.holm([]) == []


def test_kappa_is_one_zero_or_less_and_nan_where_nothing_varies():
    assert stats.kappa(10, 0, 0, 10) == 1
    assert stats.kappa(25, 25, 25, 25) == 0
    assert stats.kappa(0, 10, 10, 0) == -1
    assert stats.kappa(20, 5, 10, 15) == pytest.approx(0.4)  # 0.7 agree, 0.5 by chance
    assert math.isnan(stats.kappa(0, 0, 0, 9)) and math.isnan(stats.kappa(0, 0, 0, 0))


def test_the_design_effect_is_m_for_copies_and_about_one_for_strangers():
    assert stats.design_effect([[1.0] * 4, [0.0] * 4, [1.0] * 4]) == pytest.approx(4)
    rng = np.random.default_rng(0)
    strangers = rng.random((2000, 4)) < 0.3
    assert stats.design_effect(strangers.astype(float).tolist()) == pytest.approx(1, abs=0.1)
    assert math.isnan(stats.design_effect([[1.0], [0.0]])) and math.isnan(stats.design_effect([]))


def test_composites_give_the_golden_values_and_show_no_mercy():
    from safelight.metric import composite

    assert composite.mace_h(0.043, 0.918, 0.121) == pytest.approx(0.9169, abs=5e-5)
    assert composite.mace_h(1.0, 0.9, 0.1) == 0
    assert composite.robustness(0) == 0.5
    assert composite.robustness(1.7) == pytest.approx(0.15, abs=5e-3)
    assert composite.robustness(1e6) == pytest.approx(0)
    assert composite.inverted([10, 20, 15]) == [1.0, 1e-3, 0.5]
    assert composite.inverted([10, 10]) == [1.0, 1.0]
    parts = [0.9, 0.8, 1.0, 0.5]
    assert composite.spqr(0.9, 0.8, 1.0, 0.0) == pytest.approx(composite.harmonic(parts))
    assert composite.erase_bench(0.1, 0.2, 0.7) == pytest.approx(3 / (1 / 0.9 + 1 / 0.8 + 1 / 0.7))
    assert math.isnan(composite.harmonic([]))
