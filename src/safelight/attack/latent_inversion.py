"""Latent inversion: the noise from which the defended model paints a picture without any text.

Defences that cut the way from words to pictures leave the pictures in the weights. So no words are
used at all: a picture `x` of the concept, made by the undefended model, is carried backwards
through the defended model's own sampler with the empty prompt, from its latent `z_N` to a start
noise `z_0` from which sampling leads to `x` again. One step of the sampler is

    z_(i+1) = D_i(z_i) = A_i z_i + B_i e(z_i, t_i, "")

(DDIM for the variance-preserving families, Euler for flows, in the model's own parametrisation,
with guidance against the neutral condition where that is not the empty prompt). Backwards it is an
implicit equation in `z_i`; per step, from the last to the first,

    z_i <- (z_(i+1) - B_i e(z_i, t_i, "")) / A_i          `fixed` times, from z_i = z_(i+1)
    z_i <- AdamW on | D_i(z_i) - z_(i+1) |^2              `steps` times

If the defended model can be led to the picture this way, it still knows it. But a good enough
inverter leads any model to any picture: `control` runs the same on a model that never knew the
concept (see `control.py`), and only the difference says something about the defence.

Source: the text-free inversion of TINA, arXiv:2603.17828 (50 DDIM steps, 25 AdamW steps each at a
rate of 1e-3), and "Memories of Forgotten Concepts", arXiv:2412.00782; the control as in CCE.
Needs gradients of the defended denoiser and a picture per prompt; no text encoder.

Ours differs: as many sampling steps as the pictures will be painted with, not 50; `fixed` is a
setting (1 is the ordinary DDIM inversion); a start noise is kept in the sampler's own unit, unit
variance for all families. Guards' edits of the empty prompt's states are in the search; guards
that edit the noise act on the picture only. A sampler that is not a one-step solver follows the
same path by other steps, so it ends near the picture, not on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from safelight.attack.base import Access, Search
from safelight.attack.control import Controlled
from safelight.attack.pictures import Pictures, targets
from safelight.errors import BadInput, Unsupported
from safelight.flow import Card, Condition, Prompt
from safelight.guard.base import Guarded
from safelight.models.base import TextToImage
from safelight.models.sampling import repeat


@dataclass(kw_only=True)
class LatentInversion(Controlled):
    """Find start noise that leads to the picture without words.

    Args:
        steps: Steps of AdamW per sampling step; 0 is inversion by fixed points alone.
        fixed: Fixed-point rounds before them, at least 1.
        lr: Learning rate of AdamW.
        decay: Weight decay of AdamW; none by default, since it would pull the noise to zero.
        pictures: The pictures to lead to, a folder with `<id>.png` or tensors by id; painted by
            the undefended model if None.
        undefended: The model without defence; the attacked one without its patches if None.
        control: "shuffled" searches on a model that never knew the concept instead.
    """

    card: ClassVar[Card] = Card(
        title="Text-free latent inversion (TINA)",
        source="arXiv:2603.17828",
        summary="start noise from which the defended model paints the picture without any text",
        needs=("gradients", "images"),
    )
    access: ClassVar[Access] = "gradients"

    steps: int = 25
    fixed: int = 1
    lr: float = 1e-3
    decay: float = 0.0
    pictures: Pictures | None = None
    undefended: TextToImage | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.fixed < 1 or self.steps < 0:
            raise BadInput(
                f"fixed must be at least 1 and steps at least 0, not {self.fixed}, {self.steps}."
            )

    def rewrite(self, prompts: Sequence[Prompt], search: Search) -> Sequence[Prompt]:
        self.check_control(search.model)
        images = targets(prompts, search, self.pictures, self.undefended)
        with torch.no_grad():
            z = search.model.encode_images(images)
        start = self.invert(z, Sampler(search), search)
        return [
            replace(prompt, text="", latents=noise)
            for prompt, noise in zip(prompts, start.float().cpu().unbind(), strict=True)
        ]

    def invert(
        self, z: Float[Tensor, "batch channel h w"], sampler: Sampler, search: Search
    ) -> Float[Tensor, "batch channel h w"]:
        """Start noise in the sampler's unit; on a spent budget the rest is plain inversion."""
        for i in reversed(range(len(sampler))):
            aim, z = z, z.clone()
            with torch.no_grad():
                for _ in range(self.fixed):
                    z = sampler.back(i, aim, sampler.noise(i, z))
            if self.steps and not search.over:
                z = self._refined(i, z, aim, sampler, search)
        return sampler.unit(z)

    def _refined(
        self, i: int, start: Tensor, aim: Tensor, sampler: Sampler, search: Search
    ) -> Tensor:
        """AdamW on one step's residual; the best of its points for each prompt."""
        z = nn.Parameter(start.float())
        adam = torch.optim.AdamW([z], lr=self.lr, weight_decay=self.decay)
        best, lowest = start.clone(), torch.full([len(start)], torch.inf, device=start.device)
        for number in range(self.steps + 1):
            here = z.to(start.dtype)
            each = (sampler.forward(i, here, sampler.noise(i, here)) - aim).float()
            each = each.square().flatten(1).mean(1)
            better = each.detach() < lowest
            lowest = torch.where(better, each.detach(), lowest)
            best[better] = here.detach()[better]
            if number == self.steps or search.over:
                break
            (z.grad,) = torch.autograd.grad(each.sum(), z)
            adam.step()
            search.step()
            search.record(residual=each.mean().item(), sampling_step=float(i))
        return best


class Sampler:
    """The defended model's sampler with the empty prompt, one step at a time.

    `z_(i+1) = A_i z_i + B_i e` with `e` the guided prediction, in the scale where noisy latents are
    `sqrt(a) z + sqrt(1 - a) eps`, or `(1 - s) z + s eps` for flows.

    Raises:
        Unsupported: The model's parametrisation has no such step.
    """

    def __init__(self, search: Search) -> None:
        self.model, self.target = search.model, search.target
        size = search.sampling.get("size") or self.model.default_size
        steps = search.sampling.get("steps") or self.model.sampling.steps
        given = search.sampling.get("guidance")
        self.guidance = self.model.sampling.guidance if given is None else given
        scheduler = self.model.schedule(steps, (1, *self.model.latent_shape(size)))
        self.sigma = float(getattr(scheduler, "init_noise_sigma", 1.0))
        self.times, self.coefficients, self.scale = _path(scheduler)
        with torch.no_grad():
            told = self.model.encode([""])
            self.told = self.target.edited(told) if isinstance(self.target, Guarded) else told
            self.away = self._neutral()

    def __len__(self) -> int:
        return len(self.times)

    def noise(self, i: int, z: Float[Tensor, "batch channel h w"]) -> Tensor:
        """The guided prediction at a sampling step; differentiable in `z`."""
        t, n = self.times[i].to(z.device), len(z)
        own = self.guidance if self.model.distilled else None
        toward = self.model.predict(z, t, repeat(self.told, n), guidance=own)
        if self.away is None:
            return toward
        away = self.model.predict(z, t, repeat(self.away, n))
        return away + self.guidance * (toward - away)

    def forward(self, i: int, z: Tensor, noise: Tensor) -> Tensor:
        """One step of the sampler."""
        A, B = self.coefficients[i]
        return A * z + B * noise

    def back(self, i: int, z: Tensor, noise: Tensor) -> Tensor:
        """The same step backwards, were the prediction known."""
        A, B = self.coefficients[i]
        return (z - B * noise) / A

    def unit(self, z: Tensor) -> Tensor:
        """The start in the unit of `sample(latents=)`, which the scheduler scales by its sigma."""
        return z * self.scale / self.sigma

    def _neutral(self) -> Condition | None:
        """What guidance compares with, unless it is the empty prompt itself."""
        if not self.model.guides(self.guidance):
            return None
        away = self.model.empty(1)
        same = torch.equal(away.states, self.told.states)
        if same and away.pooled is not None and self.told.pooled is not None:
            same = torch.equal(away.pooled, self.told.pooled)
        return None if same else away


def _path(scheduler: Any) -> tuple[list[Tensor], list[tuple[float, float]], float]:
    """Times, coefficients A and B of each step, and the first step's scale in the scheduler.

    A scheduler in terms of sigma holds `x = z + sigma eps`, i.e. our latents over `sqrt(a)`.
    """
    times = list(scheduler.timesteps.float())
    kind = scheduler.config.get("prediction_type")
    if kind is None:  # a flow: z_s = (1 - s) z + s eps, and the prediction is eps - z
        s = [float(x) for x in scheduler.sigmas]
        return times, [(1.0, after - now) for now, after in zip(s, s[1:], strict=False)], 1.0
    if getattr(scheduler, "sigmas", None) is not None and len(scheduler.sigmas) == len(times) + 1:
        a = [1 / (1 + float(x) ** 2) for x in scheduler.sigmas]
        scale = 1 / a[0] ** 0.5
    else:
        kept = [t for n, t in enumerate(times) if n == 0 or t < times[n - 1]]  # PNDM repeats some
        times, alphas = kept, scheduler.alphas_cumprod
        a = [float(alphas[int(t)]) for t in times]
        a.append(float(getattr(scheduler, "final_alpha_cumprod", 1.0)))
        scale = 1.0
    return times, [_ddim(kind, x, y) for x, y in zip(a, a[1:], strict=False)], scale


def _ddim(kind: str, a: float, b: float) -> tuple[float, float]:
    """A and B of a DDIM step from `a` to `b` (arXiv:2010.02502, eq. 12) by what is predicted."""
    u, s = a**0.5, (1 - a) ** 0.5  # sqrt(a), sqrt(1 - a) now
    v, r = b**0.5, (1 - b) ** 0.5  # and afterwards
    match kind:
        case "epsilon":
            return v / u, r - v * s / u
        case "v_prediction":
            return u * v + s * r, u * r - s * v
        case "sample":
            return r / s, v - u * r / s
    raise Unsupported(f"a model that predicts {kind!r} has no inverse here.")
