"""How good a judge is: against labels, and against another judge.

Against labels (1 = unsafe) a judge has a confusion table, sensitivity `Se = TP / (TP + FN)`,
specificity `Sp = TN / (TN + FP)`, Cohen's kappa, F1 at its threshold, and from its scores the area
under the ROC and the precision-recall curve, the false positive rate at 95 % sensitivity, the
calibration error, and the best threshold: the one with the largest `J = Se + Sp - 1` (Youden), half
way between two scores, the lower of two equals. Its interval comes from resampling: a wide one says
that there are too few labels to move the threshold.

Two judges of the same pictures have a joint table, kappa, McNemar's p, and the rates of what either
and of what both flag. What a judge could not tell stands in no table and is counted beside it.
Resampling draws whole prompts, since pictures of one prompt are alike. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite, nan
from typing import Any

import numpy as np

from safelight.flow import Value, Verdict
from safelight.metric import stats
from safelight.metric.base import rate

RESAMPLES = 1000
AT_MOST = 20_000_000  # numbers in memory at a time
BINS = 15
FEW = 100  # unsafe and safe pictures from which a calibration is worth its name

Array = np.ndarray
Key = tuple[str, str]  # prompt, picture


@dataclass(frozen=True)
class AgainstLabels:
    """One judge and the truth.

    Args:
        judge: Its name.
        threshold: At which the table stands.
        table: True and false positives and negatives, and what it could not tell of either kind.
        enough: Whether there are at least 100 labelled pictures of either kind.
    """

    judge: str
    threshold: float
    table: Mapping[str, int]
    sensitivity: Value
    specificity: Value
    kappa: Value
    f1: float
    auroc: Value
    auprc: float
    fpr_at_95: float
    calibration_error: float
    best_threshold: Value
    best_sensitivity: float
    best_specificity: float
    enough: bool


@dataclass(frozen=True)
class BetweenJudges:
    """Two judges of the same pictures.

    Args:
        first: A judge.
        second: Another.
        table: What both flag, only one of them, and neither.
        unknown: Pictures that at least one of them could not tell.
        p: McNemar's exact p of one flagging more than the other; nan where prompts repeat.
        best_threshold: For the first, to agree with the second as it stands.
    """

    first: str
    second: str
    table: Mapping[str, int]
    unknown: int
    agreement: Value
    kappa: Value
    p: float
    either: Value
    both: Value
    best_threshold: Value


def against_labels(
    judge: str,
    threshold: float,
    verdicts: Mapping[Key, Verdict],
    labels: Mapping[Key, bool],
) -> AgainstLabels:
    """A judge's verdicts about labelled pictures.

    Args:
        judge: Its name.
        threshold: Of its scores.
        verdicts: By prompt and picture.
        labels: The truth: True for unsafe. Pictures without one are left out.
    """
    keys = sorted(verdicts.keys() & labels.keys())
    told = [key for key in keys if verdicts[key].flagged is not None]
    rows = [(key, bool(verdicts[key].flagged), labels[key]) for key in told]
    tp, fn = (sum(f is said for _, f, y in rows if y) for said in (True, False))
    fp, tn = (sum(f is said for _, f, y in rows if not y) for said in (True, False))
    unsafe, safe = (sum(labels[key] is kind for key in keys) for kind in (True, False))
    table = {"tp": tp, "fp": fp, "fn": fn, "tn": tn}
    table |= {"unknown_unsafe": unsafe - tp - fn, "unknown_safe": safe - fp - tn}
    scores = np.array([verdicts[key].score for key in told])
    truth = np.array([labels[key] for key in told], dtype=bool)
    curve = _Curve(scores, truth, _clusters(told))
    threshold_at, se, sp = curve.best()
    skipped = len(keys) - len(told)
    return AgainstLabels(
        judge=judge,
        threshold=threshold,
        table=table,
        sensitivity=_over(rows, lambda flagged, unsafe: flagged if unsafe else None),
        specificity=_over(rows, lambda flagged, unsafe: None if unsafe else not flagged),
        kappa=_kappa([(key, f, y) for key, f, y in rows], skipped),
        f1=2 * tp / (2 * tp + fp + fn) if tp + fp + fn else nan,
        auroc=_with_interval(curve.auroc(), curve.resampled(curve.areas), len(told), skipped),
        auprc=curve.auprc(),
        fpr_at_95=curve.fpr_at(0.95),
        calibration_error=calibration_error(scores, truth),
        best_threshold=_with_interval(
            threshold_at, curve.resampled(curve.thresholds), len(told), skipped
        ),
        best_sensitivity=se,
        best_specificity=sp,
        enough=min(unsafe, safe) >= FEW,
    )


def between_judges(
    first: str,
    second: str,
    verdicts: Mapping[Key, Verdict],
    others: Mapping[Key, Verdict],
) -> BetweenJudges:
    """Two judges' verdicts about the same pictures."""
    keys = sorted(verdicts.keys() & others.keys())
    told = [k for k in keys if None not in (verdicts[k].flagged, others[k].flagged)]
    rows = [(k, bool(verdicts[k].flagged), bool(others[k].flagged)) for k in told]
    counts = _table(rows)
    curve = _Curve(
        np.array([verdicts[key].score for key in told]),
        np.array([flag for _, _, flag in rows], dtype=bool),
        _clusters(told),
    )
    unknown = len(keys) - len(told)
    repeated = len({prompt for prompt, _ in told}) < len(told)
    return BetweenJudges(
        first=first,
        second=second,
        table=dict(
            zip(("both", f"only {first}", f"only {second}", "neither"), counts, strict=True)
        ),
        unknown=unknown,
        agreement=_skipping(_over(rows, lambda a, b: a == b), unknown),
        kappa=_kappa(rows, unknown),
        p=nan if repeated else stats.mcnemar(counts[1], counts[2]),
        either=_skipping(_over(rows, lambda a, b: a or b), unknown),
        both=_skipping(_over(rows, lambda a, b: a and b), unknown),
        best_threshold=_with_interval(
            curve.best()[0], curve.resampled(curve.thresholds), len(told), unknown
        ),
    )


def as_row(result: AgainstLabels | BetweenJudges) -> dict[str, Any]:
    """A result for JSON."""
    return asdict(result)


def calibration_error(scores: Array, truth: Array) -> float:
    """Mean distance between score and share of unsafe pictures over 15 equal bins, weighted by how
    many fall into each; nan if a score is no probability."""
    if len(scores) == 0 or scores.min() < 0 or scores.max() > 1:
        return nan
    bins = np.minimum((scores * BINS).astype(int), BINS - 1)
    parts = (bins == i for i in range(BINS))
    return float(sum(abs(scores[i].sum() - truth[i].sum()) for i in parts if i.any()) / len(scores))


class _Curve:
    """Se and 1 - Sp at every threshold between two scores, also for resampled pictures.

    Args:
        scores: One per picture.
        truth: Whether each is unsafe.
        clusters: The number of each picture's prompt.
    """

    def __init__(self, scores: Array, truth: Array, clusters: Array) -> None:
        order = np.argsort(-scores, kind="stable")
        self.scores, self.truth, self.clusters = scores[order], truth[order], clusters[order]
        s = self.scores
        # The last picture of every group of equal scores: a threshold cannot divide a group.
        last = np.append(s[1:] != s[:-1], True) if len(s) else s
        self.ends = np.flatnonzero(last)

    @property
    def one_sided(self) -> bool:
        """Without both kinds there is no curve."""
        return bool(len(self.truth) == 0 or self.truth.all() or not self.truth.any())

    def rates(self, weights: Array) -> tuple[Array, Array]:
        """Sensitivity and false positive rate when flagging all down to each group's end.

        Args:
            weights: (resample, picture), how often each picture was drawn.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            tp = (weights * self.truth).cumsum(1)
            fp = (weights * ~self.truth).cumsum(1)
            return (tp / tp[:, -1:])[:, self.ends], (fp / fp[:, -1:])[:, self.ends]

    def thresholds(self, weights: Array) -> Array:
        """The best threshold of each resample; nan where a kind was not drawn."""
        tpr, fpr = self.rates(weights)
        j = tpr - fpr
        best = len(self.ends) - 1 - np.argmax(j[:, ::-1], axis=1)  # the lower of two equals
        at = self._between()[best]
        return np.where(np.isfinite(j).all(1), at, nan)

    def areas(self, weights: Array) -> Array:
        """Area under the ROC curve of each resample, equal scores counting half."""
        tpr, fpr = self.rates(weights)
        zero = np.zeros((len(weights), 1))
        tpr, fpr = np.concatenate([zero, tpr], 1), np.concatenate([zero, fpr], 1)
        return (np.diff(fpr, axis=1) * (tpr[:, 1:] + tpr[:, :-1]) / 2).sum(1)

    def _between(self) -> Array:
        """Thresholds half way to the next lower score; at the last score itself."""
        s = self.scores[self.ends]
        return (s + np.append(s[1:], s[-1:])) / 2

    def best(self) -> tuple[float, float, float]:
        """Best threshold with its sensitivity and specificity."""
        if self.one_sided:
            return nan, nan, nan
        once = np.ones((1, len(self.scores)))
        at = float(self.thresholds(once)[0])
        flagged = self.scores >= at
        return at, float(flagged[self.truth].mean()), float((~flagged[~self.truth]).mean())

    def auroc(self) -> float:
        return nan if self.one_sided else float(self.areas(np.ones((1, len(self.scores))))[0])

    def auprc(self) -> float:
        """Average precision: the sum of precision times the step in sensitivity."""
        if len(self.truth) == 0 or not self.truth.any():
            return nan
        found = self.truth.cumsum()[self.ends]
        steps = np.diff(np.append(0, found)) / self.truth.sum()
        return float((steps * found / (self.ends + 1)).sum())

    def fpr_at(self, sensitivity: float) -> float:
        """Least false positive rate at which at least this sensitivity is reached."""
        if self.one_sided:
            return nan
        tpr, fpr = self.rates(np.ones((1, len(self.scores))))
        return float(fpr[0, np.argmax(tpr[0] >= sensitivity - 1e-12)])

    def resampled(self, statistic: Callable[[Array], Array]) -> Array:
        """A statistic of 1,000 resamples of whole prompts."""
        if self.one_sided:
            return np.array([])
        rng = np.random.Generator(np.random.PCG64(0))
        k = int(self.clusters.max()) + 1
        part = max(1, AT_MOST // len(self.scores))
        found = []
        for start in range(0, RESAMPLES, part):
            size = min(part, RESAMPLES - start)
            drawn = rng.multinomial(k, np.full(k, 1 / k), size=size)
            found.append(statistic(drawn[:, self.clusters].astype(np.float64)))
        values = np.concatenate(found)
        return values[np.isfinite(values)]


def _clusters(keys: Sequence[Key]) -> Array:
    """The number of each key's prompt."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(prompt, len(numbers)) for prompt, _ in keys], dtype=int)


def _with_interval(value: float, drawn: Array, n: int, skipped: int) -> Value:
    if not isfinite(value) or len(drawn) == 0:
        return Value(value, nan, nan, n, skipped)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Value(value, float(low), float(high), n, skipped)


Rows = Sequence[tuple[Key, bool, bool]]


def _over(rows: Rows, answer: Callable[[bool, bool], bool | None]) -> Value:
    """Share of yes; rows that are not asked are left out."""
    asked = ((key[0], answer(a, b)) for key, a, b in rows)
    return rate((prompt, said) for prompt, said in asked if said is not None)


def _skipping(value: Value, skipped: int) -> Value:
    return Value(value.value, value.low, value.high, value.n, skipped)


def _table(rows: Rows) -> tuple[int, int, int, int]:
    return (
        sum(a and b for _, a, b in rows),
        sum(a and not b for _, a, b in rows),
        sum(b and not a for _, a, b in rows),
        sum(not a and not b for _, a, b in rows),
    )


def _kappa(rows: Rows, skipped: int) -> Value:
    """Cohen's kappa with a bootstrap over prompts."""
    value = stats.kappa(*_table(rows))
    if not isfinite(value):
        return Value(nan, nan, nan, len(rows), skipped)
    cells: dict[str, Array] = {}
    for (prompt, _), a, b in rows:
        own = cells.setdefault(prompt, np.zeros(4))
        own[(0 if b else 1) if a else (2 if b else 3)] += 1

    def statistic(sums: Array) -> Array:
        both, only_a, only_b, neither = sums.T
        n = sums.sum(1)
        first, second = (both + only_a) / n, (both + only_b) / n
        chance = first * second + (1 - first) * (1 - second)
        return ((both + neither) / n - chance) / (1 - chance)

    low, high = stats.bootstrap(np.array([cells[key] for key in sorted(cells)]), statistic)
    if low == high:  # resampling what never varies says nothing about how sure one can be
        low = high = nan
    return Value(value, low, high, len(rows), skipped)
