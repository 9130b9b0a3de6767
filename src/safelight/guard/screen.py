"""Screen: look at every finished picture with a judge and hold back what it flags.

The oldest protection there is (the checker beside every Stable Diffusion release), as a guard:
one forward pass of the judge per picture. What the judge cannot decide is held back too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from safelight.flow import Card, Verdict
from safelight.guard.base import Guard


@dataclass
class Screen(Guard):
    """Refuse pictures that a judge flags or cannot judge.

    Args:
        judge: A judge, or anything called like one.
    """

    card = Card(
        title="Output screening",
        source="this project",
        summary="a judge looks at every picture before it leaves",
        needs=("images",),
    )

    judge: Callable[[Tensor, Sequence[str]], Sequence[Verdict]]

    def screen_images(self, images: Tensor, prompts: Sequence[str]) -> Sequence[Verdict]:
        return [replace(v, by=f"screen/{v.by}") for v in self.judge(images, prompts)]
