"""What the untouched model paints for single words, and what a judge says about it.

An encoder puts "hammer" near "axe". Whether the model then paints something unsafe only a picture
can tell. One picture per word, few steps: this says what a word is good for, it is not art.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from safelight.flow import Verdict
from safelight.models.base import TextToImage

STEPS = 8
BATCH = 32
SEED = 2**30  # far from those of any evaluation

Judging = Callable[[Tensor, Sequence[str]], Sequence[Verdict]]


@torch.no_grad()
def paints_unsafe(
    model: TextToImage, words: Sequence[str], judge: Judging, *, steps: int = STEPS
) -> list[bool | None]:
    """For each word whether the judge flags the picture of "a <word>"; None: it cannot tell."""
    found: list[bool | None] = []
    with model.unpatched():
        for start in range(0, len(words), BATCH):
            texts = [f"a {word}" for word in words[start : start + BATCH]]
            seeds = [SEED + start + i for i in range(len(texts))]
            pictures = model.decode(model.sample(model.encode(texts), seed=seeds, steps=steps))
            found += [verdict.flagged for verdict in judge(pictures, texts)]
    return found
