"""Guards that can say which token made them act, and a common form for what they say.

A guard joins by having `explain`; `explained` asks every guard in turn with the text states that it
really was given, which is what the guards before it have left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from safelight.flow import Condition
from safelight.guard.base import Guarded, name_of
from safelight.models.base import TextToImage

POOLED = "the whole prompt"  # the one "token" of a pooled vector


@dataclass(frozen=True)
class TokenScores:
    """One prompt as one encoder reads it, with a score for each token.

    Args:
        prompt: The text.
        by: The guard.
        reads: The encoder, or `<encoder>.pooled`.
        tokens: The tokens; a space at the end says that a word ends there.
        scores: In [0, 1]; the ones that the guard used.
    """

    prompt: str
    by: str
    reads: str
    tokens: tuple[str, ...]
    scores: tuple[float, ...]


@runtime_checkable
class Explains(Protocol):
    """A guard with token scores."""

    def explain(self, model: TextToImage, condition: Condition) -> list[TokenScores]:
        """The scores that `edit_condition` uses for this condition."""


def explained(guarded: Guarded, prompts: Sequence[str]) -> list[TokenScores]:
    """What the guards that can say so made of some prompts."""
    condition = guarded.model.encode(prompts)
    found: list[TokenScores] = []
    for guard in guarded.guards:
        if isinstance(guard, Explains):
            found += guard.explain(guarded.model, condition)
        condition = guard.edit_condition(condition)
    return found


def words_of(model: TextToImage, encoder: str, prompt: str) -> tuple[tuple[str, ...], int]:
    """A prompt's tokens as people read them, without marks, and the place of the first one."""
    tokenizer = model.tokenizers[encoder]
    start = len(tokenizer("").input_ids) - 1
    ids, mask = model.tokenize(encoder, [prompt])
    own = ids[0, start : int(mask.sum()) - 1].tolist()
    pieces = [str(piece) for piece in tokenizer.convert_ids_to_tokens(own)]
    words = [_readable(tokenizer, i, piece) for i, piece in zip(own, pieces, strict=True)]
    opens = [piece.startswith("\u2581") for piece in pieces]  # sentence pieces begin words
    if any(opens):
        ends = [*opens[1:], True]
        words = [f"{w.strip()} " if end else w for w, end in zip(words, ends, strict=True)]
    return tuple(words), start


def _readable(tokenizer: Any, i: int, piece: str) -> str:
    """One token without the vocabulary's own marks."""
    plain = piece.removesuffix("</w>").removeprefix("\u2581")
    if not plain.isascii():
        plain = tokenizer.decode([i]).strip()
    return f"{plain} " if piece.endswith("</w>") else plain


__all__ = ["POOLED", "Explains", "TokenScores", "explained", "name_of", "words_of"]
