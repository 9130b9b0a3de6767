"""Experts: low-rank patches that can become one, and the algebra of their factors.

A pair is `(A, B)` with the scale alpha / rank in B: the change is `B A`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from safelight.errors import BadInput
from safelight.models.base import TextToImage
from safelight.models.patch import Patch
from safelight.models.sampling import Progress
from safelight.prompts import PromptSet

Pair = tuple[Float[Tensor, "_ _"], Float[Tensor, "_ _"]]  # (rank, in), (out, rank)
Pairs = Mapping[str, Sequence[Pair]]  # one per expert, by the weight they change


@dataclass(frozen=True)
class Merged:
    """What a way of merging found.

    Args:
        pairs: The merged change of every weight.
        units: By weight how many output units each expert has; empty if they share them.
        info: What else the patch should remember.
    """

    pairs: Mapping[str, Pair]
    units: Mapping[str, Sequence[int]] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Way(ABC):
    """A way to merge."""

    calibrates: ClassVar[bool] = False  # whether it needs prompts

    @abstractmethod
    def merged(
        self,
        model: TextToImage,
        experts: Pairs,
        prompts: Sequence[PromptSet],
        *,
        seed: int,
        progress: Progress | None,
    ) -> Merged:
        """Many changes of every weight as one."""


def pairs_of(experts: Sequence[Patch]) -> dict[str, list[Pair]]:
    """Their factors in float32, by weight."""
    return {name: [_scaled(*one.low_rank[name]) for one in experts] for name in experts[0].low_rank}


def _scaled(A: Tensor, B: Tensor, alpha: float) -> Pair:
    return A.detach().float().cpu(), B.detach().float().cpu() * (alpha / len(A))


def highest_rank(pairs: Sequence[Pair]) -> int:
    return max(len(A) for A, _ in pairs)


def stacked(pairs: Sequence[Pair], weights: Sequence[float] = ()) -> Pair:
    """The exact (weighted) sum."""
    w = weights or (1.0,) * len(pairs)
    A = torch.cat([A for A, _ in pairs])
    B = torch.cat([w * B for w, (_, B) in zip(w, pairs, strict=True)], 1)
    return A, B


def truncated(
    A: Float[Tensor, "rank in"], B: Float[Tensor, "out rank"], rank: int | None = None
) -> Pair:
    """The best approximation of a pair of some rank; the lowest rank that is exact if None.

    By QR of both, so that only a matrix as small as their rank is decomposed.
    """
    (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(B.double()), torch.linalg.qr(A.T.double())
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    if rank is None:
        noise = S[0] * torch.finfo(A.dtype).eps * max(len(B), A.shape[1])
        rank = max(1, int((noise < S).sum()))
    return _halves(Q_B @ U, S, Vh @ Q_A.T, rank)


def factored(D: Float[Tensor, "out in"], rank: int) -> Pair:
    """The best approximation of a change of some rank."""
    U, S, Vh = torch.linalg.svd(D.double(), full_matrices=False)
    return _halves(U, S, Vh, rank)


def _halves(U: Tensor, S: Tensor, Vh: Tensor, rank: int) -> Pair:
    return Vh[:rank].float(), (U[:, :rank] * S[:rank]).float()


# What cannot become one


def require_alike(model: TextToImage, experts: Sequence[Patch]) -> None:
    """Refuse experts that cannot become one.

    Raises:
        BadInput: None; one that is not low-rank; different bases or weights.
        Unsupported: Of another family.
    """
    if not experts:
        raise BadInput("there is nothing to merge; name at least one expert.")
    for e, one in enumerate(experts):
        if one.full or not one.low_rank:
            what = f"changes {min(one.full)} as a whole" if one.full else "changes nothing"
            raise BadInput(
                f"{_label(one, e)} is not a LoRA: it {what}. Only low-rank changes are merged; "
                "train it as one, for example with scope=lora."
            )
    _require_one_base(model, experts)
    _require_same_weights(model, experts)


def _require_one_base(model: TextToImage, experts: Sequence[Patch]) -> None:
    known = [(_label(one, e), one) for e, one in enumerate(experts) if one.base]
    for label, one in known:
        first_label, first = known[0]
        other = sorted(name for name, sha in one.base.items() if first.base.get(name) != sha)
        if one.family == first.family and other:
            raise BadInput(
                f"{label} was made for other weights of {', '.join(other)} than {first_label}. "
                "Experts are trained apart from one clean base; train them on the same model."
            )
    for one in {(one.family, bool(one.base)): one for one in experts}.values():
        one.check(model)


def _require_same_weights(model: TextToImage, experts: Sequence[Patch]) -> None:
    now = model.parameters()
    every = sorted({name for one in experts for name in one.low_rank})
    for e, one in enumerate(experts):
        lacking = [name for name in every if name not in one.low_rank]
        if lacking:
            raise BadInput(
                f"{_label(one, e)} does not change {lacking[0]} ({len(lacking)} of the "
                f"{len(every)} weights that the experts change in all). Train all of them with "
                "the same targets, or put them on side by side: patches add up."
            )
        for name, (A, B, _) in one.low_rank.items():
            there = tuple(now[name].flatten(1).shape) if name in now else None
            if there != (len(B), A.shape[1]):
                raise BadInput(
                    f"{_label(one, e)} changes {name} as {len(B)} x {A.shape[1]}; in {model.name} "
                    f"it is {' x '.join(map(str, there)) if there else 'not there'}."
                )


def require_one_rank(experts: Pairs) -> None:
    """Refuse experts of different ranks."""
    for name, pairs in experts.items():
        ranks = [len(A) for A, _ in pairs]
        if len(set(ranks)) > 1:
            raise BadInput(
                f"the experts' ranks at {name} are {', '.join(map(str, ranks))}; "
                "granularity=factor needs one rank. granularity=neuron takes any."
            )


def require_positive(way: Any, *names: str) -> None:
    """Refuse settings below 1."""
    for name in names:
        value = getattr(way, name)
        if value is not None and value < 1:
            raise BadInput(f"{name} must be at least 1, not {value}.")


def categories(expert: Patch) -> list[str]:
    """What it removes, as far as it says."""
    return list(expert.info.get("categories", []))


def _label(expert: Patch, e: int) -> str:
    return f"expert {e + 1} ({', '.join(categories(expert)) or expert.method})"
