"""What a change of weights leaves alone: pictures under captions.

An expert learns from the pairs of its own category. What it is not for is in the same data: its
safe pictures, the pairs of the other categories, and captions that ask for nothing unsafe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from safelight.flow import Condition
from safelight.models.base import TextToImage
from safelight.prompts import PromptSet
from safelight.training.captions import Captions
from safelight.training.data import shuffled
from safelight.training.twins import BESIDE, Twins


@dataclass(frozen=True)
class Kept:
    """A picture under a caption, of which the denoiser is to say what it always said.

    Args:
        pair: Whose picture.
        side: 0 is the safe picture, 1 the unsafe one.
        caption: What the denoiser is told.
    """

    pair: int
    side: int
    caption: str


@dataclass(frozen=True)
class Keeping:
    """Rows that are to be left alone: latents, times, noise, captions; the reference, if known."""

    z: Float[Tensor, "row channel h w"]
    t: Float[Tensor, " row"]
    eps: Float[Tensor, "row channel h w"]
    captions: tuple[str, ...]
    e_ref: Float[Tensor, "row channel h w"] | None = None

    def only(self, rows: Tensor) -> Keeping:
        """Some of the rows."""
        named = tuple(self.captions[i] for i in rows.tolist())
        e_ref = None if self.e_ref is None else self.e_ref[rows]
        return Keeping(self.z[rows], self.t[rows], self.eps[rows], named, e_ref)

    def inputs(self, model: TextToImage, told: Captions) -> tuple[Tensor, Tensor, Condition]:
        """What the denoiser is asked: z_t, t and the captions as they were read."""
        z, t, eps = (x.to(model.device) for x in (self.z, self.t, self.eps))
        return model.noised(z, eps, t)[0], t, told(self.captions, model.device)


def left_alone(
    data: Twins, train: Sequence[int], sets: Sequence[PromptSet], rng: torch.Generator
) -> list[Kept]:
    """Everything that is not to be removed, in random order.

    Args:
        data: Pairs to learn from; those of `data.others` count on after them. Where another
            category's unsafe side shows a second harm beside its own, that may be the one that is
            to be removed: only the safe side stays.
        train: Which pairs are learnt from; the held-out ones are left out.
        sets: Captions that are left alone with any of the pictures.
    """
    others = list(enumerate(data.others, start=len(data)))
    rows = [Kept(i, 0, data.rows[i].safe_prompt) for i in train]
    rows += [Kept(i, side, "") for i in train for side in (0, 1)]
    rows += [Kept(i, 0, row.safe_prompt) for i, row in others]
    alone = [(i, row) for i, row in others if BESIDE not in row.meta]
    rows += [Kept(i, 1, row.unsafe_prompt) for i, row in alone]
    anywhere = [*train, *(i for i, _ in others)]
    texts = [prompt.text for one in sets for prompt in one]
    places = zip(
        shuffled(anywhere, len(texts), rng),
        torch.randint(2, (len(texts),), generator=rng).tolist(),
        texts,
        strict=True,
    )
    rows += [Kept(*place) for place in places]
    return shuffled(rows, len(rows), rng)
