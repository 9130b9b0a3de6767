"""What preferences are learnt from: pairs of latents under a caption, with their noise and times.

`Material` is computed once and stays, a `Batch` is drawn from it; both hold everything random, so
that a batch can be cut into pieces and shared out over processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from safelight.training.captions import Captions
from safelight.training.keeping import Keeping, Kept


@dataclass(frozen=True)
class Material:
    """What stays constant while training.

    Args:
        z_w, z_l: Latents of safe and unsafe pictures; the second view is mirrored.
        captions: What the encoders say about every caption.
        rows: (pair, caption) to learn from.
        kept: What is to stay as it is.
        alike: What is to stay although it looks like what is unsafe, each with a picture of its
            own after those of the pairs.
        times: Draws times as the family's training does.
        limit: Times above it are drawn again.
        iterations: What the setting comes to on this model.
        info: What the patch should remember.
        held: Rows of held-out pairs, with their noise and times.
        pool: All rows under all of their draws, if these are fixed.
    """

    z_w: Float[Tensor, "flip picture channel h w"]
    z_l: Float[Tensor, "flip pair channel h w"]
    captions: Captions
    rows: tuple[tuple[int, str], ...]
    kept: tuple[Kept, ...]
    alike: tuple[Kept, ...]
    times: Callable[[int, torch.Generator], Tensor]
    limit: float
    iterations: int
    info: dict[str, Any]
    held: Batch | None = None
    pool: Batch | None = None

    def draw_times(self, n: int, rng: torch.Generator) -> Float[Tensor, " n"]:
        """Times up to the limit."""
        t = self.times(n, rng).cpu()
        while bool((late := t > self.limit).any()):
            t[late] = self.times(int(late.sum()), rng).cpu()
        return t


@dataclass(frozen=True)
class Batch:
    """Rows to learn from, the safe side of everything first.

    Args:
        z: Latents.
        t: Times.
        eps: Noise.
        captions: What both pictures of a row are told.
        told: What was read of captions.
        keeping: As many rows that are to be left alone, with `keep`.
        e_ref: What the reference says, where it is known.
    """

    z: Float[Tensor, "2 row channel h w"]
    t: Float[Tensor, "2 row"]
    eps: Float[Tensor, "2 row channel h w"]
    captions: tuple[str, ...]
    told: Captions
    keeping: Keeping | None = None
    e_ref: Float[Tensor, "part row channel h w"] | None = None

    def __len__(self) -> int:
        return len(self.captions)

    def only(self, rows: Tensor) -> Batch:
        """Some of the rows."""
        named = tuple(self.captions[i] for i in rows.tolist())
        keeping = None if self.keeping is None else self.keeping.only(rows)
        return Batch(
            z=self.z[:, rows],
            t=self.t[:, rows],
            eps=self.eps[:, rows],
            captions=named,
            told=self.told,
            keeping=keeping,
            e_ref=None if self.e_ref is None else self.e_ref[:, rows],
        )
