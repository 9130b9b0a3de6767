"""What a model's encoders say about texts, computed once and kept for a whole training run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from safelight.flow import Condition
from safelight.models.base import TextToImage


@dataclass(frozen=True)
class Captions:
    """Readings of different texts, on the CPU.

    Args:
        at: The row of each text.
        read: All readings as one condition.
    """

    at: dict[str, int]
    read: Condition

    @classmethod
    @torch.no_grad()
    def of(cls, model: TextToImage, texts: Sequence[str], batch: int = 16) -> Captions:
        """Read texts, each once however often it is there."""
        each = tuple(dict.fromkeys(texts))
        found = [model.encode(each[i : i + batch]) for i in range(0, len(each), batch)]
        pooled = [one.pooled for one in found if one.pooled is not None]
        whole = replace(
            found[0],
            prompts=each,
            states=_stacked([one.states for one in found]),
            pooled=_stacked(pooled) if pooled else None,
            masks={name: _stacked([one.masks[name] for one in found]) for name in found[0].masks},
            written=None,
        )
        return cls({text: i for i, text in enumerate(each)}, whole)

    def __call__(self, texts: Sequence[str], device: torch.device) -> Condition:
        """The readings of some of the texts."""
        rows = [self.at[text] for text in texts]
        whole = self.read
        return replace(
            whole,
            prompts=tuple(texts),
            states=whole.states[rows].to(device),
            pooled=None if whole.pooled is None else whole.pooled[rows].to(device),
            masks={name: mask[rows].to(device) for name, mask in whole.masks.items()},
        )


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.cpu() for part in parts])
