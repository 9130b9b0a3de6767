"""Alignments of the text encoder: which encoders, which of their weights, how fast."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from safelight.align.base import Trained
from safelight.errors import BadInput, unknown
from safelight.models.base import TextToImage
from safelight.models.patch import Patch
from safelight.training import geometry
from safelight.training.data import texts
from safelight.training.embedding import Reading, distance, size
from safelight.training.weights import Loan, full, lora

Scope = Literal["all", "layers", "lora"]


@dataclass(frozen=True, kw_only=True)
class TextSide(Trained):
    """A trained alignment that touches text encoders only.

    Every patch says which encoders it changes (`info["encoders"]`), which it leaves as they are
    (`info["untouched"]`: unsafe prompts still reach the denoiser through those), and how much of
    the geometry of held-out safe prompts it keeps (`info["geometry"]`).

    Args:
        encoders: Names of the encoders to train; () is all of them.
        scope: Train "all" weights, the "layers" without embedding tables, or "lora" factors.
        rank: Rank of the LoRA factors.
        alpha: Scale of the LoRA factors; None is the rank.
        targets: Last names of the linear layers that LoRA adapts; () is every linear layer.
    """

    lr: float | None = None

    encoders: tuple[str, ...] = ()
    scope: Scope = "all"
    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope not in get_args(Scope):
            raise BadInput(f"scope: {unknown('choice', self.scope, get_args(Scope))}")
        if self.rank < 1:
            raise BadInput(f"rank must be at least 1, not {self.rank}.")

    def chosen(self, model: TextToImage) -> tuple[str, ...]:
        """The encoders to train."""
        for name in self.encoders:
            if name not in model.text_encoders:
                raise BadInput(unknown("text encoder", name, model.text_encoders))
        return self.encoders or tuple(model.text_encoders)

    def small(self, model: TextToImage) -> bool:
        """Whether the chosen encoders are far smaller than those of published settings."""
        widths = [model.text_encoders[name].config.hidden_size for name in self.chosen(model)]
        return max(widths) < 512

    def rate(self, model: TextToImage) -> float:
        """1e-5 as published for CLIP-L (DES, AdvUnlearn); small encoders take larger steps."""
        return self.lr or (3e-4 if self.small(model) else 1e-5)

    def lend(self, model: TextToImage, rng: torch.Generator) -> AbstractContextManager[Loan]:
        """The chosen encoders' weights."""
        encoders = self.chosen(model)
        if self.scope == "lora":
            alpha = self.alpha or float(self.rank)
            return lora(model, encoders, rank=self.rank, alpha=alpha, rng=rng, layers=self.targets)
        return full(model, encoders, embeddings=self.scope == "all")

    def harmless(self, material: Any) -> Sequence[str]:
        """Safe prompts that nothing is trained on: those of the split that `gather` keeps."""
        return texts(material.split.safe_check)

    def train(self, model: TextToImage, material: Any, *, seed: int = 0, **descent: Any) -> Patch:
        """A patch, and what every text-side patch should remember; see `Trained.train`."""
        patch = super().train(model, material, seed=seed, **descent)
        encoders = self.chosen(model)
        about = {
            "encoders": list(encoders),
            "untouched": [name for name in model.text_encoders if name not in encoders],
            "geometry": geometry.kept(model, patch, self.harmless(material), encoders),
        }
        return replace(patch, info={**patch.info, **about})


def moved(now: Reading, then: Reading) -> dict[str, Float[Tensor, " row"]]:
    """Two figures that compare across methods: how far each prompt is from where it was.

    `drift` is the relative Euclidean shift of a reading, `cosine` its |cos| to the original; both
    over all token positions, and averaged over the pieces.
    """
    drift = [
        distance(now[name], then[name], "euclidean", "flatten") / size(then[name], "flatten")
        for name in now
    ]
    cosine = [-distance(now[name], then[name], "neg_abs_cosine", "flatten") for name in now]
    return {"drift": torch.stack(drift).mean(0), "cosine": torch.stack(cosine).mean(0)}
