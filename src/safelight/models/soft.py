"""Learnt token embeddings in place of a word: what `Prompt.soft` means to a text encoder.

Wherever `<*>` stands in a text, the rows of the learnt embeddings take its token positions. They
enter where the encoder looks up its tokens, so positions, attention and everything after are the
encoder's own, and gradients reach them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from safelight.errors import BadInput

PLACEHOLDER = "<*>"

Soft = Mapping[str, Float[Tensor, "_ _"]]  # encoder -> (tokens, dims)


@dataclass(frozen=True)
class Placed:
    """A text as token ids, with the positions at which embeddings are to stand."""

    ids: tuple[int, ...]
    content: int  # tokens up to and with the end mark
    at: tuple[int, ...]


def without(text: str) -> str:
    """A text without its placeholder: what a guard that reads words can see of it."""
    return " ".join(text.replace(PLACEHOLDER, " ").split()) if PLACEHOLDER in text else text


def write(
    tokenizer: Any, text: str, slots: int, length: int, front: int = 0, behind: int = 0
) -> Placed:
    """A text's ids, with positions for embeddings, padded to `length`.

    Args:
        tokenizer: The encoder's.
        text: The text.
        slots: Positions at every placeholder; with 0 a placeholder is text like any other.
        length: What the encoder reads, marks included.
        front: Positions before the text.
        behind: Positions after it. With either, a text that is too long is cut, and so are the
            embeddings in it, so that what was put around it stays.

    Raises:
        BadInput: No placeholder, or the embeddings do not fit into what the encoder reads.
    """
    pieces = text.split(PLACEHOLDER) if slots else [text]
    if slots and len(pieces) == 1:
        raise BadInput(
            f"learnt embeddings need a {PLACEHOLDER!r} in the prompt, not {text[:60]!r}."
        )
    *start, end = tokenizer("").input_ids
    any_word = next(i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids)
    ids: list[int] = []
    own: list[int] = []
    for number, piece in enumerate(pieces):
        if number:
            own += range(len(ids), len(ids) + slots)
            ids += [any_word] * slots  # overwritten by the embeddings
        if piece.strip():
            ids += tokenizer(piece, add_special_tokens=False, verbose=False).input_ids
    around = len(start) + front + behind + 1
    room = length - around
    if room < 0:
        raise BadInput(
            f"{front + behind} embeddings around the prompt do not fit; the encoder reads {length} "
            "tokens with its marks."
        )
    if own and not (front or behind) and max(own) >= room:
        raise BadInput(
            f"{slots} learnt embeddings end at token {len(start) + max(own) + 1} of "
            f"{text[:60]!r}; the encoder reads {length - 1} and an end mark."
        )
    ids = ids[:room]
    before = len(start) + front
    at = [
        *range(len(start), before),
        *(before + place for place in own if place < room),
        *range(before + len(ids), before + len(ids) + behind),
    ]
    ids = [*start, *[any_word] * front, *ids, *[any_word] * behind, end]
    padding = [tokenizer.pad_token_id] * (length - len(ids))
    return Placed((*ids, *padding), len(ids), tuple(at))


@contextmanager
def standing(
    table: nn.Module, rows: Sequence[Sequence[int]], values: Sequence[Tensor]
) -> Iterator[None]:
    """Embeddings in place of what a token table would give.

    Args:
        table: The encoder's token embedding.
        rows: Per text the positions.
        values: Per text one embedding for each of them.
    """
    where = [(i, position) for i, own in enumerate(rows) for position in own]
    new = torch.cat(list(values))

    def put(module: nn.Module, given: Any, out: Tensor) -> Tensor:
        row, position = torch.tensor(where, device=out.device).unbind(1)
        return out.index_put((row, position), new.to(out))

    hook = table.register_forward_hook(put)
    try:
        yield
    finally:
        hook.remove()
