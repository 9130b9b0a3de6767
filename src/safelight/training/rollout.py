"""Noisy latents as they come by while a model paints, with what its denoiser said about them.

    z_T ~ N(0, I);   z_t = the sampler's state at step k, under guidance and the prompt c
    e_p = predict(z_t, t, c),   e_0 = predict(z_t, t, neutral)

Both predictions are what guidance computes anyway, so one painting leaves several states at no
further cost. They are values: nothing that is trained later can reach them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from safelight.flow import Condition
from safelight.models import sampling
from safelight.models.base import TextToImage


@dataclass(frozen=True)
class States:
    """States of paintings, one per row.

    Args:
        prompts: What was being painted.
        z_t: Noisy latents, as the denoiser is given them.
        t: Their times.
        e_p: What the denoiser said under the prompt.
        e_0: What it said under the neutral condition.
    """

    prompts: tuple[str, ...]
    z_t: Float[Tensor, "state channel h w"]
    t: Float[Tensor, " state"]
    e_p: Float[Tensor, "state channel h w"]
    e_0: Float[Tensor, "state channel h w"]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, rows: Int[Tensor, " row"]) -> States:
        named = tuple(self.prompts[i] for i in rows.tolist())
        return States(named, self.z_t[rows], self.t[rows], self.e_p[rows], self.e_0[rows])

    def to(self, device: torch.device) -> States:
        """The same states on a device."""
        return States(self.prompts, *(x.to(device) for x in (self.z_t, self.t, self.e_p, self.e_0)))

    def draw(self, prompts: Sequence[str], rng: torch.Generator) -> States:
        """For each prompt one of the states that came by while it was painted."""
        rows = []
        for text in prompts:
            own = [i for i, name in enumerate(self.prompts) if name == text]
            rows.append(own[int(torch.randint(len(own), (1,), generator=rng))])
        return self[torch.tensor(rows, dtype=torch.long)]


@torch.no_grad()
def rollouts(
    model: TextToImage,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance: float,
    keep: int,
    rng: torch.Generator,
    batch: int = 16,
) -> States:
    """Paint prompts with the model as it is now and keep some of the states on the way.

    Args:
        prompts: What to paint; each painting of a repeated prompt starts from noise of its own.
        steps: Of the sampler.
        guidance: Scale of classifier-free guidance.
        keep: States of each painting, at steps drawn at random.
        rng: Draws the noise and the steps.
        batch: Paintings made together.
    """
    drawn = torch.randint(2**31, (len(prompts),), generator=rng).tolist()
    order = torch.rand(len(prompts), steps, generator=rng).argsort(1)
    chosen = order < keep  # `keep` distinct steps of each row
    parts: list[States] = []
    for i in range(0, len(prompts), batch):
        rows = slice(i, i + batch)
        eye = _Witness(model, tuple(prompts[rows]), chosen[rows], guidance)
        eye.paint(drawn[rows], steps)
        parts += eye.kept
    return States(
        tuple(name for part in parts for name in part.prompts),
        *(torch.cat([getattr(part, x) for part in parts]) for x in ("z_t", "t", "e_p", "e_0")),
    )


class _Witness:
    """A model to the sampling loop; it writes down what passes through the denoiser."""

    def __init__(
        self,
        model: TextToImage,
        prompts: tuple[str, ...],
        chosen: Bool[Tensor, "row step"],
        guidance: float,
    ) -> None:
        self.model, self.prompts, self.chosen, self.guidance = model, prompts, chosen, guidance
        self.neutral = sampling.repeat(model.empty(1), len(prompts))
        self.kept: list[States] = []
        self.calls = 0

    def paint(self, seeds: Sequence[int], steps: int) -> None:
        model = self.model
        noise = sampling.noise(model.latent_shape(model.default_size), seeds)
        sampling.denoise(
            self,
            model.encode(self.prompts),
            noise.to(model.device, model.dtype),
            negative=self.neutral if model.guides(self.guidance) else None,
            generators=sampling.generators(seeds, skip=noise[0]),
            steps=steps,
            guidance=self.guidance,
        )

    @property
    def distilled(self) -> bool:
        return self.model.distilled

    def schedule(self, steps: int, shape: Sequence[int]) -> Any:
        return self.model.schedule(steps, shape)

    def predict(
        self, z_t: Tensor, t: Tensor, condition: Condition, *, guidance: float | None = None
    ) -> Tensor:
        said = self.model.predict(z_t, t, condition, guidance=guidance)
        n = len(self.prompts)
        if len(z_t) == n:  # no guidance, so nobody has asked about the neutral condition
            e_p, e_0 = said, self.model.predict(z_t, t, self.neutral, guidance=guidance)
        else:
            e_0, e_p = said.chunk(2)
        if self.calls < self.chosen.shape[1]:
            self._keep(z_t[:n], t, e_p, e_0)
        self.calls += 1
        return said

    def _keep(self, z_t: Tensor, t: Tensor, e_p: Tensor, e_0: Tensor) -> None:
        rows = self.chosen[:, self.calls].nonzero().flatten()
        times = t.float().cpu().expand(len(self.prompts))
        self.kept.append(States(self.prompts, z_t.cpu(), times, e_p.cpu(), e_0.cpu())[rows])
