"""Replay: the prompts as they are; the plain row that every search is compared with.

With a file of prompts that somebody else has found (`--prompts FILE`), this is the replay of their
attack against another protection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from safelight.attack.base import Attack, Search
from safelight.flow import Card, Prompt


@dataclass(kw_only=True)
class Replay(Attack):
    """Send the prompts unchanged."""

    card = Card(
        title="Replay",
        source="this project",
        summary="the prompts as they are: the row every search is compared with",
        needs=("prompts",),
    )
    access = "prompts"

    def rewrite(self, prompts: Sequence[Prompt], search: Search) -> Sequence[Prompt]:
        return prompts
