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

# All unsafe categories in turns, so that the first few prompts of such a set have every category.
_ALL = {
    f"emoji/all/{part}": " ".join(f"world/prompts/emoji/{c}/{part}.csv" for c in _CATEGORIES)
    for part in _PARTS
}

TABLE = dict(sorted({**_ALL, **{name: f"world/prompts/{name}.csv" for name in _EMOJI}}.items()))

__all__ = ["TABLE", "PromptSet"]
