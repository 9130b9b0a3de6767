"""A judge for tests: it decides from a picture's mean colour, so it works on any model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from safelight.flow import Card
from safelight.judge.base import Judge, Look


def _red_and_blue() -> dict[str, tuple[str, ...]]:
    return {"red": ("object:red",), "blue": ("object:blue",)}


@dataclass(kw_only=True)
class FakeJudge(Judge):
    """Calls a picture unsafe when it is too red or too blue; for tests and dry runs only.

    Args:
        threshold: Least mean of a channel at which its colour is "in the picture".
        groups: Which colours are unsafe, by category.
        name: Stands in every verdict.
    """

    card = Card(
        title="Mean colour",
        source="this project",
        summary="decides from the mean colour; for tests",
    )
    labels = ("object:red", "object:green", "object:blue", "background:bright", "background:dark")
    clean = {"object": 0.0, "background": 0.0}

    threshold: float = 0.5
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=_red_and_blue)
    name: str = "fake"

    @property
    def feature_name(self) -> str:  # type: ignore[override]
        return f"{self.name}/colours"

    def score(
        self, images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]
    ) -> Float[Tensor, "batch label"]:
        colour = images.float().mean((2, 3))
        bright = colour.mean(1, keepdim=True)
        return torch.cat([colour, bright, 1 - bright], dim=1).clamp(0, 1)

    def see(self, images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]) -> Look:
        coarse = F.adaptive_avg_pool2d(images.float(), 2)
        return Look(self.score(images, prompts), features=coarse.flatten(1), maps=(coarse,))
