"""Is the geometry of harmless prompts still there? Two figures, whatever was trained.

A tuned text encoder can paint well by every usual figure and still have lost how harmless prompts
lie to each other: they crowd together, and their neighbours change. With `z_i` the flattened
readings of n safe prompts, each scaled to norm 1, and `z~_i` the same after training:

    S(z) = 1 / (n - 1) * sum_i |z_i - mean z|^2              spread
    R_s  = S(z~) / S(z)                                      1: as before, 0: all prompts collapsed
    J    = mean_i |N_i & N~_i| / |N_i | N~_i|                1: no prompt has a new neighbour

with `N_i` the K prompts of highest cosine to prompt i. Source: SAGE, arXiv:2607.00402, which uses
both to predict what structured prompts (counts, relations) will lose.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from safelight.models.base import Change, TextToImage
from safelight.training.embedding import Piece, Reading, remember

K = 15  # neighbours, as in SAGE; a quarter of the prompts where there are few
MOST = 256  # prompts; more would not move the figures, and T5's readings are large


def kept(
    model: TextToImage, change: Change, prompts: Sequence[str], encoders: Sequence[str]
) -> dict[str, Any]:
    """How much of the geometry of some prompts a change of weights keeps.

    Args:
        change: A patch.
        prompts: Harmless ones that nothing was trained on; the first `MOST` are read.
        encoders: Whose readings are compared.
    """
    texts = list(dict.fromkeys(prompts))[:MOST]
    before = remember(model, texts, encoders).pieces
    with model.patched(change):
        after = remember(model, texts, encoders).pieces
    return compare(before, after)


def compare(before: Reading, after: Reading) -> dict[str, Any]:
    """`spread_ratio` and `jaccard`, by piece and on average; None where prompts are too few."""
    n = len(next(iter(before.values())).states)
    k = max(1, min(K, n // 4))
    pieces = {name: _compare(before[name], after[name], k) for name in before}
    means: dict[str, float | None] = {}
    for figure in ("spread_ratio", "jaccard"):
        seen = [one[figure] for one in pieces.values()]
        known = [x for x in seen if x is not None]
        means[figure] = fmean(known) if len(known) == len(seen) else None
    return {**means, "prompts": n, "k": k, "pieces": pieces}


def _compare(before: Piece, after: Piece, k: int) -> dict[str, float | None]:
    x, y = (piece.states.flatten(1) for piece in (before, after))
    wide = len(x) > 2 and spread(x) > 0
    return {
        "spread_ratio": (spread(y) / spread(x)).item() if wide else None,
        "jaccard": overlap(neighbours(x, k), neighbours(y, k)).item() if len(x) > 2 else None,
    }


def spread(x: Float[Tensor, "row dim"]) -> Float[Tensor, ""]:
    """S: the trace of the covariance of rows scaled to norm 1."""
    unit = F.normalize(x, dim=1)
    return (unit - unit.mean(0)).square().sum() / (len(unit) - 1)


def cosines(x: Float[Tensor, "row dim"]) -> Float[Tensor, "row row"]:
    """Every row's cosine to every other."""
    unit = F.normalize(x, dim=1)
    return unit @ unit.T


def neighbours(x: Float[Tensor, "row dim"], k: int) -> Int[Tensor, "row k"]:
    """N: each row's `k` other rows of highest cosine."""
    return cosines(x).fill_diagonal_(-torch.inf).topk(k, dim=1).indices


def overlap(a: Int[Tensor, "row k"], b: Int[Tensor, "row k"]) -> Float[Tensor, ""]:
    """J: the mean Jaccard overlap of rows of indices."""
    both = (a[:, :, None] == b[:, None, :]).sum((1, 2))
    return (both / (2 * a.shape[1] - both)).mean()
