"""Variants of prompts: words exchanged for random words that the tokenizer knows.

A list of safe prompts is short; what it does not mention is free to drift. Variants mention
everything now and then, without anybody writing prompts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

MARKS = ("</w>", "\u2581")  # how byte-pair and sentence-piece vocabularies mark whole words


def vocabulary(tokenizer: Any) -> list[str]:
    """The whole words of at least three letters that a tokenizer knows, in alphabetical order."""
    found = set()
    for token in tokenizer.get_vocab():
        word = token.removesuffix(MARKS[0]).removeprefix(MARKS[1])
        if word != token and re.fullmatch("[a-z]{3,}", word):
            found.add(word)
    return sorted(found)


def exchanged(
    texts: Sequence[str], words: Sequence[str], rng: torch.Generator
) -> list[tuple[str, str]]:
    """Each text with a variant in which one or two of its words are random ones.

    Args:
        texts: Prompts.
        words: What may be put in; without any there are no variants.
    """
    if not words:
        return []

    def draw(n: int) -> int:
        return int(torch.randint(n, (1,), generator=rng))

    pairs = []
    for text in texts:
        parts = text.split()
        places = [i for i, part in enumerate(parts) if len(part) > 2] or list(range(len(parts)))
        for _ in range(1 + draw(2)):
            parts[places[draw(len(places))]] = words[draw(len(words))]
        pairs.append((text, " ".join(parts)))
    return pairs
