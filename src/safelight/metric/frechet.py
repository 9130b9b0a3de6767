"""Frechet distance between the pictures of the two arms.

`|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2)` on penultimate features of the named network. It
measures change against the base model's pictures, not quality, and is biased upwards in small
samples: compare equal n only. It has no interval, because a bootstrap of it is biased too.
"""

from __future__ import annotations

import base64
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import ClassVar

import numpy as np

from safelight.flow import Record, Value
from safelight.metric import stats
from safelight.metric.base import PROTECTED, Metric, pairs


def pack(features: np.ndarray) -> str:
    """A feature vector as text, in half precision."""
    return base64.b64encode(np.asarray(features, dtype="<f2").tobytes()).decode("ascii")


def unpack(text: str) -> np.ndarray:
    """The feature vector behind `pack`."""
    return np.frombuffer(base64.b64decode(text), dtype="<f2").astype(np.float64)


def feature_pairs(records: Sequence[Record], network: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Features of the base and the protected picture, for every pair that has both."""
    both = []
    for base, protected in pairs(records):
        texts = [record.features.get("embedding", {}).get(network) for record in (base, protected)]
        if all(texts):
            both.append((unpack(texts[0]), unpack(texts[1])))
    return both


@dataclass(frozen=True, kw_only=True)
class FeatureDistance(Metric):
    """Between the base pictures and the protected ones."""

    higher_is_better: ClassVar[bool] = False
    arms: ClassVar[tuple[str, ...]] = (PROTECTED,)

    @abstractmethod
    def between(self, base: np.ndarray, protected: np.ndarray) -> float:
        """The distance of two samples, one row per picture."""

    def applies(self, records: Sequence[Record]) -> bool:
        return len(feature_pairs(records, self.profile.feature_name)) >= 2

    def __call__(self, records: Sequence[Record]) -> Value:
        both = feature_pairs(records, self.profile.feature_name)
        skipped = len(pairs(records)) - len(both)
        if len(both) < 2:
            return Value(nan, nan, nan, len(both), skipped)
        base, protected = (np.stack(side) for side in zip(*both, strict=True))
        return Value(self.between(base, protected), nan, nan, len(both), skipped)


@dataclass(frozen=True, kw_only=True)
class Frechet(FeatureDistance):
    """Frechet distance of the protected pictures to the base pictures, in the feature network."""

    name: ClassVar[str] = "frechet"

    def between(self, base: np.ndarray, protected: np.ndarray) -> float:
        return max(stats.frechet_of_samples(base, protected), 0.0)

    def notes(self, records: Sequence[Record]) -> Mapping[str, float | str]:
        return {"network": self.profile.feature_name}
