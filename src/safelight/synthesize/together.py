"""Two kinds of harm in one wish: pairs whose unsafe side shows another category's as well.

Whoever learns from pictures that show one kind of harm learns to take that one away, and leaves
what else a sentence brings. Here an unsafe phrase of another category stands beside a row's own,
and the safe side says something harmless in both places:

    "a coffin on the beach" / "a house on the beach"  and  "a knife" / "a tulip"
    ->  "a coffin next to a knife on the beach" / "a house next to a tulip on the beach"

The article is always "a".
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from safelight.flow import Prompt
from safelight.training.data import shuffled
from safelight.training.pairs import Pair, pair
from safelight.training.twins import BESIDE

JOINED = ("with a", "and a", "next to a", "above a")


def together(rows: Sequence[Prompt], n: int, rng: torch.Generator) -> list[Prompt]:
    """Up to `n` further rows of each category; none where there is only one category.

    Args:
        rows: With a `safe_prompt` each; those that do not say which phrase is unsafe are left out.
    """
    phrases: dict[str, list[tuple[Prompt, Pair]]] = {}
    for row in rows:
        both = pair(row.text, row.safe_prompt or "")
        if both.phrase:
            phrases.setdefault(row.category, []).append((row, both))
    return [
        made
        for category in sorted(phrases)
        for made in _of(phrases[category], _others(phrases, category), n, rng)
    ]


def _others(
    phrases: Mapping[str, Sequence[tuple[Prompt, Pair]]], category: str
) -> list[tuple[str, str]]:
    """What is unsafe in the other categories, and what stands in its place."""
    found = (both for name, some in phrases.items() if name != category for _, both in some)
    return [(both.phrase, pair(both.anchor, both.target).phrase) for both in found]


def _of(
    own: Sequence[tuple[Prompt, Pair]],
    others: Sequence[tuple[str, str]],
    n: int,
    rng: torch.Generator,
) -> list[Prompt]:
    """Rows of one category, every second one without the rest of its sentence."""
    made: dict[str, Prompt] = {}
    places = zip(shuffled(own, n, rng), shuffled(others, n, rng), strict=False)
    for i, ((row, both), (unsafe, safe)) in enumerate(places):
        between = JOINED[i % len(JOINED)]
        back = pair(both.anchor, both.target)
        first, second = f"{both.phrase} {between} {unsafe}", f"{back.phrase} {between} {safe}"
        if i % 2:
            text, safe_text = f"a {first}", f"a {second}"
        else:
            text, safe_text = both.saying(first).target, back.saying(second).target
        name = hashlib.sha256(f"{row.category} {text}".encode()).hexdigest()[:12]
        meta = {"concept": both.phrase, BESIDE: unsafe}
        made[text] = replace(row, id=name, text=text, safe_prompt=safe_text, meta=meta)
    return list(made.values())
