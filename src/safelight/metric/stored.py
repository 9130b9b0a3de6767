"""The stored pictures of a finished run, for figures that look at them again.

Rows are as in `values.json`, with the network in their name, and are written to `measured.json`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from safelight.errors import NotFound
from safelight.flow import Record, Value
from safelight.metric.base import PROTECTED, pairs


class Stored(Protocol):
    """A finished run: its folder and its rows."""

    folder: Path

    @property
    def records(self) -> Sequence[Record]: ...


def sets_of(run: Stored) -> dict[str, list[Record]]:
    """Records by prompt set and attack.

    Raises:
        NotFound: None of their pictures is on disk.
    """
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in run.records:
        name = record.prompts
        groups[name if record.attack == "replay" else f"{name} ({record.attack})"].append(record)
    if not any(there(run, record) for record in run.records):
        raise NotFound("the run has no stored pictures.")
    return dict(sorted(groups.items()))


def stored_pairs(run: Stored) -> dict[str, list[tuple[Record, Record]]]:
    """Pairs whose pictures are both on disk, by prompt set and attack."""
    found = {name: [pair for pair in pairs(some) if there(run, *pair)]
             for name, some in sets_of(run).items()}  # fmt: skip
    found = {name: both for name, both in found.items() if both}
    if not found:
        raise NotFound("the run has no stored pictures of both arms.")
    return found


def there(run: Stored, *records: Record) -> bool:
    """Whether the pictures of all these rows are on disk."""
    return all(r.image is not None and (run.folder / r.image).is_file() for r in records)


def row(
    metric: str, network: str, prompts: str, value: Value, arm: str = PROTECTED
) -> dict[str, Any]:
    """A figure as a row."""
    numbers = {"value": value.value, "low": value.low, "high": value.high}
    counts = {"n": value.n, "skipped": value.skipped}
    where = {"prompts": prompts, "arm": arm}
    return {"metric": metric, "network": network, **numbers, **counts, **where}
