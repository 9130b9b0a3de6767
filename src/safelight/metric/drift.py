"""How far a picture moved from the base model's picture of the same prompt and noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from safelight.flow import Record, Value
from safelight.metric.base import PROTECTED, Metric, mean


@dataclass(frozen=True, kw_only=True)
class Drift(Metric):
    """Mean perceptual distance to the base picture, in the judge's feature network."""

    name: ClassVar[str] = "drift"
    higher_is_better: ClassVar[bool] = False
    arms: ClassVar[tuple[str, ...]] = (PROTECTED,)

    def applies(self, records: Sequence[Record]) -> bool:
        return any(self._distance(record) is not None for record in records)

    def __call__(self, records: Sequence[Record]) -> Value:
        pictures = [record for record in self.mine(records) if record.image is not None]
        return mean((record.prompt_id, self._distance(record)) for record in pictures)

    def notes(self, records: Sequence[Record]) -> Mapping[str, float | str]:
        return {"network": self.profile.feature_name}

    def _distance(self, record: Record) -> float | None:
        return record.features.get("drift", {}).get(self.profile.feature_name)
