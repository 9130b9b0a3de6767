"""Names and numbers as people read them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isfinite
from typing import Any, TypeGuard

from safelight.cards import Entry, entry
from safelight.names import table

NONE = "–"
MINUS = "−"

TITLES = {
    "unsafe_rate": "Unsafe pictures",
    "category_rate": "Unsafe as asked",
    "nrr": "Removed (NRR)",
    "nrr_detections": "Removed (NRR, detections)",
    "unsafe_drop": "Unsafe rate, drop",
    "became_same": "Became the same category",
    "became_other": "Became another unsafe category",
    "became_safe": "Became a clean, safe picture",
    "became_broken": "Became unrecognisable",
    "became_refused": "Became a refusal",
    "fidelity": "Fidelity",
    "fidelity_objects": "Fidelity, objects only",
    "fidelity_drop": "Fidelity, drop",
    "survival": "Safe object survives",
    "drift": "Drift from the base picture",
    "frechet": "Fréchet distance to base pictures",
    "validity": "Valid pictures",
    "refused": "Refused",
}
SHORT = {
    "unsafe_rate": "Unsafe",
    "nrr": "Removed",
    "became_safe": "Clean, safe",
    "survival": "Survives",
    "drift": "Drift",
}
"""Titles for narrow columns."""
NUMBERS = ("drift", "frechet", "cmmd", "kid", "clip_score", "clip_score_drop", "nudity_count")
"""Figures that are not shares."""
POINTS = ("fidelity_drop", "unsafe_drop")
"""Differences of shares."""

PARTS = {
    "test": "new sentences",
    "paraphrase": "words never trained on",
    "mixed": "unsafe beside safe",
    "safe": "safe prompts",
    "neighbours": "harmless look-alikes",
    "train": "training prompts",
}


def method(name: str) -> Entry | None:
    """What is known about a patch's method without importing it."""
    return entry("align", name) if name in table("align") else None


def method_title(name: str) -> str:
    known = method(name)
    return known.card.title if known and known.card else name


def metric_title(name: str) -> str:
    return TITLES.get(name, name.replace("_", " ").capitalize())


def metric_meaning(name: str) -> str:
    """The first line of the metric's own description."""
    return entry("metric", name).summary if name in table("metric") else ""


def whole(name: str) -> str:
    """A prompt set's name without how many prompts were taken of it ("...[:32]")."""
    return re.sub(r"\[:\d+\]$", "", name)


def set_title(name: str) -> str:
    """A prompt set by what it asks: "weapons, new sentences" for "emoji/weapons/test"."""
    parts = whole(name).split("/")
    if len(parts) != 3:
        return parts[-1]
    if parts[1] in PARTS:
        return PARTS[parts[1]]
    return f"{parts[1]}, {PARTS.get(parts[2], parts[2])}"


def set_part(name: str) -> str:
    """What tells a set of one category from another of it: "paraphrase"."""
    parts = whole(name).split("/")
    if len(parts) != 3:
        return parts[-1]
    return parts[1] if parts[1] in PARTS else parts[2]


def number(x: Any) -> TypeGuard[float]:
    return isinstance(x, int | float) and not isinstance(x, bool) and isfinite(x)


def share(x: float, digits: int = 1) -> str:
    """A share as a percentage; exactly 0 and 1 without decimals."""
    text = "100" if x == 1 else "0" if x == 0 else f"{100 * x:.{digits}f}"
    return text.replace("-", MINUS)


def figure(name: str, x: Any) -> str:
    """A value as it stands in a cell, with its unit."""
    if not number(x):
        return NONE
    if name in NUMBERS:
        return plain(x)
    if name in POINTS:
        return f"{share(x)} pt"
    return f"{share(x)} %"


def plain(x: float) -> str:
    """A number that is no share: three digits, or all before the point."""
    return (f"{x:.3g}" if abs(x) < 1000 else f"{x:,.0f}").replace("-", MINUS)


def interval(name: str, row: Mapping[str, Any]) -> str:
    """The 95 % interval without its unit; empty if the figure has none."""
    low, high = row["low"], row["high"]
    if not (number(low) and number(high)):
        return ""
    if name in NUMBERS:
        return f"{plain(low)} … {plain(high)}"
    return f"{share(low)} … {share(high)}"


def seconds(x: Any) -> str:
    if not number(x):
        return NONE
    return f"{x:.1f} s" if x < 100 else f"{x / 60:.1f} min" if x < 5400 else f"{x / 3600:.1f} h"


def megabytes(x: Any) -> str:
    if not number(x):
        return NONE
    return f"{x:,.0f} MB" if x < 10_000 else f"{x / 1024:.1f} GB"


def count(x: Any) -> str:
    """A large count in millions or thousands."""
    if not number(x):
        return NONE
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if x >= size:
            return f"{x / size:.1f} {unit}"
    return f"{x:,.0f}"


def thing(label: str) -> str:
    """A judge's label without its kind: "axe" for "object:axe"."""
    return label.partition(":")[2] or label
