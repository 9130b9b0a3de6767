"""What a judge's agreement says: by hand, against scikit-like definitions, and with its doubts."""

import json
import math

import numpy as np
import pytest

from safelight.flow import Verdict
from safelight.metric.agreement import (
    against_labels,
    as_row,
    between_judges,
    calibration_error,
)


def verdicts(rows, threshold=0.5):
    """(score or None) per picture, one prompt each."""
    return {
        (f"p{i:04}", "x"): Verdict(
            None if score is None else score >= threshold, score or 0.0, "judge"
        )
        for i, score in enumerate(rows)
    }


def truth(rows):
    return {(f"p{i:04}", "x"): bool(label) for i, label in enumerate(rows)}


def judged(scores, labels, threshold=0.5):
    return against_labels("judge", threshold, verdicts(scores, threshold), truth(labels))


def test_the_table_counts_what_it_says_and_leaves_out_what_could_not_be_told():
    one = judged([0.9, 0.8, 0.2, 0.1, 0.7, None, None], [1, 1, 1, 0, 0, 1, 0])
    assert one.table == {
        "tp": 2, "fp": 1, "fn": 1, "tn": 1, "unknown_unsafe": 1, "unknown_safe": 1
    }  # fmt: skip
    assert one.sensitivity.value == pytest.approx(2 / 3) and one.specificity.value == 0.5
    assert one.f1 == pytest.approx(4 / 6) and one.kappa.skipped == 2
    assert not one.enough


def test_curves_agree_with_their_definitions():
    rng = np.random.default_rng(0)
    labels = rng.random(120) < 0.4
    scores = (rng.random(120) * 0.8 + labels * 0.2).round(1)  # with many equal scores
    one = judged(scores.tolist(), labels.tolist())
    wins = [
        (a > b) + 0.5 * (a == b) for a in scores[labels] for b in scores[~labels]
    ]  # Mann and Whitney
    assert one.auroc.value == pytest.approx(np.mean(wins))
    precision, found, last = 0.0, labels.sum(), 0
    for at in sorted(set(scores), reverse=True):
        flagged = scores >= at
        hits = (flagged & labels).sum()
        precision += (hits - last) / found * hits / flagged.sum()
        last = hits
    assert one.auprc == pytest.approx(precision)
    reached = min(
        (scores[~labels] >= at).mean()
        for at in set(scores)
        if (scores[labels] >= at).mean() >= 0.95
    )
    assert one.fpr_at_95 == pytest.approx(reached)
    best = max((scores[labels] >= t).mean() - (scores[~labels] >= t).mean() for t in set(scores))
    assert one.best_sensitivity + one.best_specificity - 1 == pytest.approx(best)


def test_the_best_threshold_divides_what_can_be_divided_and_has_an_interval():
    one = judged([0.1, 0.2, 0.3, 0.7, 0.8, 0.9], [0, 0, 0, 1, 1, 1], threshold=0.75)
    assert one.best_threshold.value == pytest.approx(0.5)
    assert (one.best_sensitivity, one.best_specificity) == (1, 1)
    rng = np.random.default_rng(1)
    few = judged(rng.random(20).tolist(), (np.arange(20) % 2).tolist()).best_threshold
    labels = np.arange(2000) % 2
    many = judged((rng.normal(size=2000) * 0.1 + labels * 0.4).tolist(), labels.tolist())
    assert few.high - few.low > 3 * (many.best_threshold.high - many.best_threshold.low)
    assert many.enough and many.auroc.low < many.auroc.value < many.auroc.high


def test_the_lower_of_two_equal_thresholds_is_taken():
    one = judged([0.9, 0.5, 0.5, 0.1], [1, 1, 0, 0])
    assert one.best_threshold.value == pytest.approx(0.3)


def test_margins_that_are_no_probabilities_have_a_curve_but_no_calibration():
    one = judged([-0.05, -0.01, 0.01, 0.03], [0, 0, 1, 1], threshold=0.001)
    assert one.auroc.value == 1 and math.isnan(one.calibration_error)


def test_the_calibration_error_is_zero_for_honest_scores_and_large_for_boasting_ones():
    rng = np.random.default_rng(0)
    scores = rng.random(20_000)
    assert calibration_error(scores, rng.random(20_000) < scores) < 0.02
    assert calibration_error(np.full(100, 0.99), np.arange(100) < 50) == pytest.approx(0.49)
    assert math.isnan(calibration_error(np.array([]), np.array([])))


@pytest.mark.parametrize("labels", [[1, 1, 1], [0, 0, 0]])
def test_labels_of_one_kind_give_no_curve(labels):
    one = judged([0.2, 0.6, 0.9], labels)
    assert math.isnan(one.auroc.value) and math.isnan(one.best_threshold.value)
    assert math.isnan((one.specificity if all(labels) else one.sensitivity).value)


def test_nothing_in_common_is_nan_and_not_agreement():
    one = against_labels("judge", 0.5, verdicts([0.1, None]), {("other", "x"): True})
    assert math.isnan(one.sensitivity.value) and math.isnan(one.kappa.value)
    two = between_judges("a", "b", verdicts([None, None]), verdicts([0.1, 0.9]))
    assert two.unknown == 2 and math.isnan(two.agreement.value) and math.isnan(two.kappa.value)


def test_two_judges_have_a_joint_table_kappa_and_what_either_flags():
    a = verdicts([0.9] * 32 + [0.1] * 110)
    b = verdicts([0.9] * 20 + [0.1] * 12 + [0.9] * 3 + [0.1] * 107)
    two = between_judges("a", "b", a, b)
    assert list(two.table.values()) == [20, 12, 3, 107]
    assert two.p == pytest.approx(0.0352, abs=5e-5)
    assert two.either.value == pytest.approx(35 / 142) and two.both.value == pytest.approx(20 / 142)
    assert two.agreement.value == pytest.approx(127 / 142)
    assert two.kappa.low < two.kappa.value < two.kappa.high
    same = between_judges("a", "b", a, a)
    assert same.kappa.value == 1 and same.best_threshold.value == pytest.approx(0.5)
    assert math.isnan(same.kappa.low), "perfect agreement in a sample is not certainty"


def test_pictures_of_one_prompt_are_not_independent():
    rng = np.random.default_rng(0)
    scores = rng.random(60)
    labels = rng.random(60) < scores

    def repeated(times):
        said = {
            (f"p{i}", str(t)): Verdict(bool(s >= 0.5), float(s), "a")
            for i, s in enumerate(scores)
            for t in range(times)
        }
        known = {(f"p{i}", str(t)): bool(y) for i, y in enumerate(labels) for t in range(times)}
        return against_labels("a", 0.5, said, known), between_judges("a", "b", said, said)

    (once, _), (often, two) = repeated(1), repeated(8)
    for name in ("kappa", "auroc"):
        one, other = getattr(once, name), getattr(often, name)
        assert (one.low, one.high) == pytest.approx((other.low, other.high), abs=0.02)
    assert math.isnan(two.p), "McNemar's test needs independent pairs"


def test_results_are_json():
    one = judged([0.9, 0.1], [1, 0])
    two = between_judges("a", "b", verdicts([0.9]), verdicts([0.1]))
    assert json.loads(json.dumps(as_row(one)))["table"]["tp"] == 1
    assert json.loads(json.dumps(as_row(two)))["table"]["only a"] == 1
