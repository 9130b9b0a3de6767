"""The one denoising loop: predict, guide, let guards edit, step.

    noise = negative + guidance * (positive - negative)

with both from a single call of the denoiser. At a guidance of 1 or less, and for models that take
the guidance as an input, there is no negative half. The noise of picture i comes from its own
generator, on the CPU in float32, so that a picture depends neither on its batch nor on the device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from safelight.errors import BadInput
from safelight.flow import Condition, Step

OnNoise = Callable[[Tensor, Step], Tensor]
Progress = Callable[[int, int], None]


@runtime_checkable
class Denoiser(Protocol):
    """What the loop needs of a model."""

    @property
    def distilled(self) -> bool: ...

    def schedule(self, steps: int, shape: Sequence[int]) -> Any: ...

    def predict(
        self, z_t: Tensor, t: Tensor, condition: Condition, *, guidance: float | None = None
    ) -> Tensor: ...


@torch.no_grad()
def denoise(
    model: Denoiser,
    condition: Condition,
    noise: Float[Tensor, "batch channel h w"],
    *,
    negative: Condition | None,
    generators: list[torch.Generator],
    steps: int,
    guidance: float,
    on_noise: Sequence[OnNoise] = (),
    progress: Progress | None = None,
) -> Float[Tensor, "batch channel h w"]:
    """From noise to clean latents.

    Args:
        negative: Row by row what to steer away from; None for no guidance.
        generators: One per picture, for schedulers that add noise on the way.
    """
    scheduler = model.schedule(steps, noise.shape)
    both = condition if negative is None else join(repeat(negative, len(condition)), condition)
    own = guidance if model.distilled else None
    random = _randomness(scheduler, generators)
    z_t = noise * getattr(scheduler, "init_noise_sigma", 1.0)

    for index, t in enumerate(scheduler.timesteps):
        seen = z_t
        if hasattr(scheduler, "scale_model_input"):
            seen = scheduler.scale_model_input(z_t, t)
        if negative is None:
            eps = model.predict(seen, t, both, guidance=own)
        else:
            away, toward = model.predict(torch.cat([seen, seen]), t, both).chunk(2)
            eps = away + guidance * (toward - away)
        if on_noise:
            step = Step(
                index=index,
                total=len(scheduler.timesteps),
                t=t,
                latents=z_t,
                condition=condition,
                predict=_predict(model, seen, t, own),
            )
            for edit in on_noise:
                eps = edit(eps, step)
        z_t = scheduler.step(eps, t, z_t, return_dict=False, **random)[0].to(noise.dtype)
        if progress is not None:
            progress(min(index + 1, steps), steps)
    return z_t


def join(first: Condition, second: Condition) -> Condition:
    """Two conditions, one above the other."""
    pooled = None
    if first.pooled is not None and second.pooled is not None:
        pooled = torch.cat([first.pooled, second.pooled])
    return replace(
        first,
        prompts=first.prompts + second.prompts,
        states=torch.cat([first.states, second.states]),
        pooled=pooled,
        masks={name: torch.cat([m, second.masks[name]]) for name, m in first.masks.items()},
        written=None,
    )


def repeat(condition: Condition, n: int) -> Condition:
    """A condition of one row, `n` times; one of `n` rows as it is."""
    if len(condition) == n:
        return condition
    if len(condition) != 1:
        raise BadInput(f"the negative condition has {len(condition)} rows; expected 1 or {n}.")
    pooled = condition.pooled
    return replace(
        condition,
        prompts=condition.prompts * n,
        states=condition.states.expand(n, -1, -1),
        pooled=None if pooled is None else pooled.expand(n, -1),
        masks={name: mask.expand(n, -1) for name, mask in condition.masks.items()},
        written=None,
    )


def seeds(seed: int | Sequence[int], n: int) -> tuple[int, ...]:
    """One seed per picture: `seed, seed + 1, ...`, or those that were given."""
    if isinstance(seed, int):
        return tuple(range(seed, seed + n))
    if len(seed) != n:
        raise BadInput(f"there are {len(seed)} seeds for {n} pictures.")
    return tuple(seed)


def noise(
    shape: Sequence[int],
    seeds: Sequence[int],
    given: Sequence[Tensor | None] | Tensor | None = None,
) -> Float[Tensor, "batch channel h w"]:
    """The first noise of each picture, a function of its own seed only.

    Args:
        shape: Channels, height, width.
        seeds: One per picture.
        given: Noise that some pictures start from instead.

    Raises:
        BadInput: Given noise of another shape or number.
    """
    own = [torch.randn(tuple(shape), generator=_generator(seed)) for seed in seeds]
    if given is None:
        return torch.stack(own)
    if len(given) != len(own):
        raise BadInput(f"there are start latents for {len(given)} of {len(own)} pictures.")
    for i, latents in enumerate(given):
        if latents is None:
            continue
        if tuple(latents.shape) != tuple(shape):
            raise BadInput(
                f"start latents {i} have the shape {tuple(latents.shape)}; expected {tuple(shape)}."
            )
        own[i] = latents.detach().float().cpu()
    return torch.stack(own)


def generators(seeds: Sequence[int], skip: Tensor) -> list[torch.Generator]:
    """Generators that have drawn the first noise already and go on from there."""
    found = [_generator(seed) for seed in seeds]
    for one in found:
        torch.randn(skip.shape, generator=one)
    return found


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _randomness(scheduler: Any, generators: list[torch.Generator]) -> dict[str, Any]:
    """The generators, for schedulers whose steps draw noise."""
    takes = "generator" in inspect.signature(scheduler.step).parameters
    return {"generator": generators} if takes else {}


def _predict(
    model: Denoiser, seen: Tensor, t: Tensor, guidance: float | None
) -> Callable[[Condition], Tensor]:
    return lambda condition: model.predict(seen, t, condition, guidance=guidance)
