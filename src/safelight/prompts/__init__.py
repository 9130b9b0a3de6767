"""Prompt sets: texts with an id, a category and, where known, a safe counterpart."""

from __future__ import annotations

from itertools import product

from safelight.prompts.set import PromptSet

_CATEGORIES = ("alcohol", "death", "drugs", "gesture", "gore", "weapons")
_PARTS = ("mixed", "paraphrase", "test", "train")
_EMOJI = (
    *(f"emoji/{category}/{part}" for category, part in product(_CATEGORIES, _PARTS)),
    "emoji/neighbours/test",
    "emoji/safe/test",
    "emoji/safe/train",
)

TABLE = {name: f"world/prompts/{name}.csv" for name in sorted(_EMOJI)}

__all__ = ["TABLE", "PromptSet"]
