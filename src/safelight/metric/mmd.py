"""Distances between the pictures of the two arms without assuming that features are Gaussian.

    CMMD = 1000 MMD^2, Gaussian kernel with sigma 10, features of unit length, biased estimator
           (Jayasumana et al., arXiv:2401.09603; its network is CLIP ViT-L/14 at 336 pixels)
    KID  = MMD^2 with the kernel (x.y / d + 1)^3, unbiased
           (Binkowski et al., arXiv:1801.01401; its network is Inception)

Both are computed in the feature network that their row names, and mean nothing in another. Like the
Frechet distance they measure change against the base model's pictures, not quality, and have no
interval: compare equal n only, over several seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from safelight.flow import Record
from safelight.metric import stats
from safelight.metric.frechet import FeatureDistance, feature_pairs


@dataclass(frozen=True, kw_only=True)
class _Discrepancy(FeatureDistance):
    """A maximum mean discrepancy, labelled with its network and N."""

    def notes(self, records: Sequence[Record]) -> Mapping[str, float | str]:
        n = len(feature_pairs(records, self.profile.feature_name))
        network = self.profile.feature_name
        return {"network": network, "label": f"{self.name.upper()} [{network}], N = {n}"}


@dataclass(frozen=True, kw_only=True)
class CMMD(_Discrepancy):
    """1000 MMD^2 (Gaussian kernel) to the base pictures, unit features of the named network."""

    name: ClassVar[str] = "cmmd"

    def between(self, base: np.ndarray, protected: np.ndarray) -> float:
        return stats.cmmd(unit(base), unit(protected))


@dataclass(frozen=True, kw_only=True)
class KID(_Discrepancy):
    """Unbiased MMD^2 (cubic kernel) to the base pictures, features of the named network."""

    name: ClassVar[str] = "kid"

    def between(self, base: np.ndarray, protected: np.ndarray) -> float:
        return stats.kid(base, protected)


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of length one; a row of zeros stays."""
    return x / np.linalg.norm(x, axis=1, keepdims=True).clip(min=1e-12)
