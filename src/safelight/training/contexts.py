"""What original encoders say of pairs and benign texts, read once, and cut into batches.

Target contexts with their anchors, and benign texts beside them: what guards learn from that change
the first into the second and leave the third alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from safelight.models.base import TextToImage
from safelight.training.embedding import Reference, remember
from safelight.training.pairs import Aligned, Pair, aligned, article_ids


@dataclass(frozen=True)
class Material:
    """What stays constant while learning.

    Args:
        pairs: Pairs to learn from, then pairs to check with.
        learnt: How many of them are to learn from.
        benign: Texts that must not change, "" and variants included.
        held: Benign texts to check with.
        tau: The original encoders' readings.
        beside: Per encoder how each pair's tokens align.
        scale: Mean squared norm of a benign token, by tensor: the unit of L_map and L_id.
        nearby: Words that augmentation put in place of targets.
        spoken_of: Subjects of benign texts.
        said: All words of benign texts.
        hashes: SHA-256 of each prompt set.
    """

    pairs: tuple[Pair, ...]
    learnt: int
    benign: tuple[str, ...]
    held: tuple[str, ...]
    tau: Reference
    beside: Mapping[str, Aligned]
    scale: dict[str, float]
    nearby: tuple[str, ...]
    spoken_of: tuple[str, ...]
    said: tuple[str, ...]
    hashes: dict[str, str]

    def mask(self, encoder: str, said: Sequence[str]) -> Tensor:
        """1 where a token is content or end mark."""
        rows = [self.tau.rows[text] for text in said]
        return self.tau.tokens[encoder][1][rows].to(self.tau.device)

    def sizes(self) -> dict[str, int]:
        """How many tokens each text has, marks included, for the first encoder."""
        _, mask = next(iter(self.tau.tokens.values()))
        return dict(zip(self.tau.rows, mask.sum(1).tolist(), strict=True))

    def held_out(self, size: int) -> Iterator[Batch]:
        """The pairs and benign texts that nothing was learnt from, in batches."""
        rows = torch.arange(self.learnt, len(self.pairs))
        for i in range(0, len(rows), size):
            benign = self.held[i : i + size] or self.held[:1]
            yield Batch(rows[i : i + size], tuple(benign), self)


def remembered(
    model: TextToImage,
    encoders: Sequence[str],
    pairs: Sequence[Pair],
    held: Sequence[Pair],
    benign: Sequence[str],
    safe_held: Sequence[str],
    *,
    nearby: Sequence[str] = (),
    spoken_of: Sequence[str] = (),
    said: Sequence[str] = (),
    hashes: Mapping[str, str] | None = None,
) -> Material:
    """What the original encoders say of pairs and benign texts, read once."""
    both = (*pairs, *held)
    every = [*benign, *safe_held, *(text for p in both for text in (p.target, p.anchor))]
    tau = remember(model, every, encoders)
    scale = {
        piece: seen.states.square().sum(-1).mean().item() for piece, seen in tau(benign).items()
    }
    return Material(
        pairs=both,
        learnt=len(pairs),
        benign=tuple(benign),
        held=tuple(safe_held),
        tau=tau,
        beside={name: _beside(model, tau, name, both) for name in encoders},
        scale=scale,
        nearby=tuple(nearby),
        spoken_of=tuple(spoken_of),
        said=tuple(said),
        hashes=dict(hashes or {}),
    )


@dataclass(frozen=True)
class Batch:
    """Pairs by their place in the material, and benign texts, of one step."""

    rows: Int[Tensor, " pair"]
    benign: tuple[str, ...]
    material: Material


def thinned(
    mask: Int[Tensor, "batch token"], rng: torch.Generator | None, kept: int = 4
) -> tuple[Int[Tensor, " place"], Float[Tensor, " place"]]:
    """All places up to the longest text's end, and a few after it that stand for the rest.

    Args:
        rng: Draws those few, so that in time all are seen; None spaces them evenly.

    Returns:
        The places, and how many each stands for.
    """
    longest = int(mask.sum(1).max())
    rest = mask.shape[1] - longest
    few = min(kept, rest)
    after = torch.randperm(rest, generator=rng)[:few].sort()[0] if rng else evenly(rest, few)
    places = torch.cat([torch.arange(longest), longest + after])
    counts = torch.ones(len(places))
    counts[longest:] = rest / max(few, 1)
    return places.to(mask.device), counts.to(mask.device)


def by_length(
    items: Sequence[Any], length: Callable[[Any], int], size: int, window: int = 8
) -> list[Any]:
    """Items in batches of alike lengths: sorted inside every `window` batches.

    A batch costs as much as its longest text; batches come in the order of windows, so shuffle.
    """
    step = window * size
    parts = [sorted(items[i : i + step], key=length) for i in range(0, len(items), step)]
    return [item for part in parts for item in part]


def evenly(n: int, few: int) -> Int[Tensor, " place"]:
    """`few` of `n` places at equal distances."""
    return (2 * torch.arange(few) + 1) * n // max(2 * few, 1)


def _beside(model: TextToImage, tau: Reference, encoder: str, pairs: Sequence[Pair]) -> Aligned:
    """How the tokens of each pair align for one encoder."""
    ids, mask = tau.tokens[encoder]
    u, a = ([tau.rows[getattr(p, side)] for p in pairs] for side in ("target", "anchor"))
    return aligned(ids[u], mask[u], ids[a], mask[a], article_ids(model, encoder))
