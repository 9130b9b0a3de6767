"""Words of a prompt, as attacks that replace or avoid words see them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from safelight.flow import Prompt

_WORD = re.compile(r"([^\W_]+(?:['’-][^\W_]+)*)")
# Words that come and go with the noun ("an axe", "a flower") and never make a prompt unsafe.
_GRAMMAR = frozenset("a an the and or of in on at to for with by from".split())  # noqa: SIM905


def parts(text: str) -> tuple[str, ...]:
    """A text cut so that the odd parts are its words and joining all gives it back."""
    return tuple(_WORD.split(text))


def words(text: str) -> tuple[str, ...]:
    """The words of a text, in order, as they are written."""
    return parts(text)[1::2]


def unsafe_words(prompt: Prompt, listed: Sequence[str] = ()) -> tuple[str, ...]:
    """The words that make a prompt unsafe, in lower case and in order.

    Articles, prepositions and the like are among them only where they are listed.

    Args:
        prompt: Its `safe_prompt`, where there is one, is the same wish without those words.
        listed: Further words that count as unsafe wherever they occur.
    """
    own = [word.lower() for word in words(prompt.text)]
    found = {word.lower() for word in listed}
    if prompt.safe_prompt:
        found |= set(own) - {word.lower() for word in words(prompt.safe_prompt)} - _GRAMMAR
    return tuple(dict.fromkeys(word for word in own if word in found))
