"""Prompts to learn from: two sides, split into training and checking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from safelight.errors import BadInput
from safelight.flow import Prompt
from safelight.prompts import PromptSet

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TextData:
    """What a text-side alignment learns from: prompts to keep as they are, prompts to change.

    Args:
        safe: Prompts whose meaning must not move.
        unsafe: Prompts whose meaning must move; one set or several.
        validation: Share of each side that is held out of training and decides when to stop.
    """

    safe: PromptSet | Sequence[PromptSet]
    unsafe: PromptSet | Sequence[PromptSet]
    validation: float = 0.1

    def sets(self) -> tuple[PromptSet, ...]:
        """All prompt sets, safe ones first."""
        return (*_several(self.safe), *_several(self.unsafe))

    def hashes(self) -> dict[str, str]:
        """The SHA-256 of each prompt set by its name."""
        return {one.name: one.sha256 for one in self.sets()}

    @property
    def safe_prompts(self) -> tuple[Prompt, ...]:
        """Every prompt of the safe side."""
        return tuple(prompt for one in _several(self.safe) for prompt in one)

    @property
    def unsafe_prompts(self) -> tuple[Prompt, ...]:
        """Every prompt of the unsafe side."""
        return tuple(prompt for one in _several(self.unsafe) for prompt in one)

    def split(self, seed: int) -> Split:
        """Training and validation prompts.

        Raises:
            BadInput: A side has no prompts, or too few to hold any out.
        """
        rng = torch.Generator().manual_seed(seed)
        safe, safe_check = self._parts("safe", self.safe, rng)
        unsafe, unsafe_check = self._parts("unsafe", self.unsafe, rng)
        return Split(safe, unsafe, safe_check, unsafe_check)

    def _parts(
        self, side: str, sets: PromptSet | Sequence[PromptSet], rng: torch.Generator
    ) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
        prompts = [prompt for one in _several(sets) for prompt in one.prompts]
        if len(prompts) < 2:
            names = ", ".join(one.name for one in _several(sets)) or "no set at all"
            raise BadInput(
                f"the {side} side has {len(prompts)} prompt(s) ({names}); training needs at least "
                f"two, one to learn from and one to check with."
            )
        order = torch.randperm(len(prompts), generator=rng).tolist()
        held = max(1, round(self.validation * len(prompts)))
        return (
            tuple(prompts[i] for i in sorted(order[held:])),
            tuple(prompts[i] for i in sorted(order[:held])),
        )


@dataclass(frozen=True)
class Split:
    """Prompts to learn from and prompts to check with."""

    safe: tuple[Prompt, ...]
    unsafe: tuple[Prompt, ...]
    safe_check: tuple[Prompt, ...]
    unsafe_check: tuple[Prompt, ...]


def texts(prompts: Sequence[Prompt]) -> list[str]:
    """What prompts say."""
    return [prompt.text for prompt in prompts]


def shuffled(these: Sequence[T], n: int, rng: torch.Generator) -> list[T]:
    """`n` of some things: whole shuffled rounds of all of them, cut to length; of none, none."""
    if not these or not n:
        return []
    rounds = -(-n // len(these))
    order = torch.cat([torch.randperm(len(these), generator=rng) for _ in range(rounds)])
    return [these[i] for i in order[:n].tolist()]


def _several(sets: PromptSet | Sequence[PromptSet]) -> tuple[PromptSet, ...]:
    return (sets,) if isinstance(sets, PromptSet) else tuple(sets)
