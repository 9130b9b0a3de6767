"""What the untouched model paints for words and sentences, and what a judge says about it.

An encoder puts "hammer" near "axe". Whether the model then paints something unsafe only a picture
can tell. One picture each, few steps: this says what a text is good for, it is not art.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from safelight.flow import Verdict
from safelight.models.base import TextToImage

SHARE = 5  # of the steps that a picture usually takes
BATCH = 32
SEED = 2**30  # far from those of any evaluation

Judging = Callable[[Tensor, Sequence[str]], Sequence[Verdict]]


@torch.no_grad()
def paints_unsafe(
    model: TextToImage, texts: Sequence[str], judge: Judging, *, steps: int | None = None
) -> list[bool | None]:
    """For each text whether the judge flags the untouched model's picture of it.

    Args:
        steps: Of the sampler; None is a fifth of the model's own, four at least.

    Returns:
        True or False; None where the judge cannot tell.
    """
    steps = steps or max(4, model.sampling.steps // SHARE)
    found: list[bool | None] = []
    with model.unpatched():
        for start in range(0, len(texts), BATCH):
            part = texts[start : start + BATCH]
            seeds = [SEED + start + i for i in range(len(part))]
            pictures = model.decode(model.sample(model.encode(part), seed=seeds, steps=steps))
            found += [verdict.flagged for verdict in judge(pictures, part)]
    return found
