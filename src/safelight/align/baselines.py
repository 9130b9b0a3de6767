"""Ways to merge experts that look at their weights only: what Co-Merge is compared with.

With `D_e = s_e B_e A_e` an expert's change and `w_e` its weight (`weights`):

    cat             sum_e w_e D_e, stacked: exact, of rank sum_e rank_e
    sum             the same at the lowest rank that holds it
    svd             the same at the highest rank of an expert, or `rank`
    ties_svd        TIES on the D_e (trim, elect signs, mean of those that agree), then SVD
    dare_ties_svd   the same with random dropping and rescaling in place of trimming

These are peft's `add_weighted_adapter`, on patches. Its `linear`, `ties` and `dare_*` are left out:
they merge A and B apart, so that products of one expert's A and another's B come in.

Source: peft 0.21; TIES, arXiv:2306.01708; DARE, arXiv:2311.03099.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from safelight.align.experts import (
    Merged,
    Pair,
    Pairs,
    Way,
    factored,
    highest_rank,
    require_positive,
    stacked,
    truncated,
)
from safelight.errors import BadInput
from safelight.models.base import TextToImage
from safelight.models.sampling import Progress
from safelight.prompts import PromptSet


@dataclass(frozen=True, kw_only=True)
class Baseline(Way):
    """A way that looks at one weight at a time, and at no data."""

    weights: tuple[float, ...] = ()

    @abstractmethod
    def combined(self, pairs: Sequence[Pair]) -> Pair:
        """Many changes of one weight as one."""

    def merged(
        self,
        model: TextToImage,
        experts: Pairs,
        prompts: Sequence[PromptSet] = (),
        *,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Merged:
        count = max(len(pairs) for pairs in experts.values())
        if self.weights and len(self.weights) != count:
            raise BadInput(f"there are {len(self.weights)} weights for {count} experts.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # peft's DARE draws from the global generator
            return Merged({name: self.combined(pairs) for name, pairs in experts.items()})


@dataclass(frozen=True, kw_only=True)
class Cat(Baseline):
    """The sum, stacked.

    Args:
        weights: One per expert; all 1 if ().
    """

    def combined(self, pairs: Sequence[Pair]) -> Pair:
        return stacked(pairs, self.weights)


@dataclass(frozen=True, kw_only=True)
class Sum(Baseline):
    """The sum at the lowest rank that holds it.

    Args:
        weights: One per expert; all 1 if ().
    """

    def combined(self, pairs: Sequence[Pair]) -> Pair:
        return truncated(*stacked(pairs, self.weights))


@dataclass(frozen=True, kw_only=True)
class SVD(Baseline):
    """The sum's best approximation of some rank.

    Args:
        weights: One per expert; all 1 if ().
        rank: Of the result; the highest of an expert if None.
    """

    rank: int | None = None

    def __post_init__(self) -> None:
        require_positive(self, "rank")

    def combined(self, pairs: Sequence[Pair]) -> Pair:
        return truncated(*stacked(pairs, self.weights), self.rank or highest_rank(pairs))


@dataclass(frozen=True, kw_only=True)
class TiesSVD(Baseline):
    """TIES, then SVD.

    Args:
        weights: One per expert; all 1 if ().
        rank: Of the result; the highest of an expert if None.
        density: Share of each change that is kept, the largest in size.
    """

    rank: int | None = None
    density: float = 0.2

    def __post_init__(self) -> None:
        require_positive(self, "rank")
        _require_share(self.density)

    def combined(self, pairs: Sequence[Pair]) -> Pair:
        from peft.utils.merge_utils import ties

        return _elected(ties, pairs, self.weights, self.density, self.rank)


@dataclass(frozen=True, kw_only=True)
class DareTiesSVD(Baseline):
    """DARE, then the election of TIES, then SVD.

    Args:
        weights: One per expert; all 1 if ().
        rank: Of the result; the highest of an expert if None.
        density: Share of each change that is kept, drawn at random, and divided by this share.
    """

    rank: int | None = None
    density: float = 0.5  # the paper names no single one

    def __post_init__(self) -> None:
        require_positive(self, "rank")
        _require_share(self.density)

    def combined(self, pairs: Sequence[Pair]) -> Pair:
        from peft.utils.merge_utils import dare_ties

        return _elected(dare_ties, pairs, self.weights, self.density, self.rank)


def _elected(
    election: Callable[..., torch.Tensor],
    pairs: Sequence[Pair],
    weights: Sequence[float],
    density: float,
    rank: int | None,
) -> Pair:
    """One of peft's elections on whole changes, then SVD."""
    rank = rank or highest_rank(pairs)
    if len(pairs) == 1:  # nothing to agree on
        return truncated(*stacked(pairs, weights), rank)
    changes = [B @ A for A, B in pairs]
    with warnings.catch_warnings():  # peft warns of a density of 1, which prunes nothing
        warnings.filterwarnings("ignore", "The density", UserWarning)
        merged = election(changes, torch.tensor(weights or (1.0,) * len(pairs)), density)
    return factored(merged, rank)


def _require_share(density: float) -> None:
    if not 0 < density <= 1:
        raise BadInput(f"density must be above 0 and at most 1, not {density}.")
