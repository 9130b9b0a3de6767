"""A handful of prompts with the token scores that a run's guards used, for its report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from safelight.guard.base import Guarded
from safelight.guard.explain import Explains, explained
from safelight.prompts import PromptSet

FILE = "tokens.json"
SHOWN = 4  # prompts of each set


def sample(guarded: Guarded, prompts: Sequence[PromptSet]) -> list[dict[str, Any]]:
    """Rows for evenly spaced prompts of each set; none if no guard has token scores."""
    if not any(isinstance(guard, Explains) for guard in guarded.guards):
        return []
    rows = []
    for one in prompts:
        n = min(SHOWN, len(one))
        chosen = [one.texts[(2 * i + 1) * len(one) // (2 * n)] for i in range(n)]
        seen = explained(guarded, list(dict.fromkeys(chosen)))
        rows += [{"prompts": one.name, **_short(asdict(row))} for row in seen]
    return rows


def _short(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "scores": [round(score, 4) for score in row["scores"]]}
