"""Guards and the model behind them.

A guard may act in four places: refuse a prompt, edit what the denoiser is told, edit its noise,
refuse a picture. It fails closed: whatever breaks in a guard, and whatever it cannot decide, gives
no picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import isfinite
from typing import Any, ClassVar

import torch
from torch import Tensor

from safelight.errors import BadInput, GuardFailed, SafelightError, Unsupported
from safelight.flow import Card, Condition, Outcome, Prompt, Step, Verdict
from safelight.models.base import TextToImage
from safelight.models.soft import Soft, without

Opinions = tuple[Verdict, ...]


class Guard:
    """Acts while pictures are made; override what you need.

    A verdict with `flagged` True or None refuses. Returning no verdicts at all means "no opinion".
    """

    card: ClassVar[Card]

    def prepare(self, model: TextToImage) -> None:
        """Called once per model, before anything else."""

    def screen_prompts(self, prompts: Sequence[str]) -> Sequence[Verdict]:
        """One verdict per prompt, before any cost; or none at all."""
        return ()

    def screen_learnt(
        self, prompts: Sequence[str], soft: Sequence[Soft | None]
    ) -> Sequence[Verdict]:
        """As `screen_prompts`, where some prompts hold learnt embeddings at `<*>`.

        A guard that reads words sees the words; one that reads embeddings should override this, or
        it is blind to what exists only below the words.
        """
        pairs = zip(prompts, soft, strict=True)
        return self.screen_prompts([without(text) if own else text for text, own in pairs])

    def edit_condition(self, condition: Condition) -> Condition:
        """What the denoiser is told instead.

        A guard that encodes prompts again starts from `condition.written`, and says so by setting
        it; where that is None another guard has edited the states, and it must come first.
        """
        return condition

    def edit_noise(self, noise: Tensor, step: Step) -> Tensor:
        """The guided prediction of one step, changed."""
        return noise

    def screen_images(self, images: Tensor, prompts: Sequence[str]) -> Sequence[Verdict]:
        """One verdict per picture; or none at all."""
        return ()


class Guarded:
    """A model behind guards, called like a bare model. Without guards it is the bare model.

    Args:
        model: The model; patches that are on it stay on it.
        guards: In the order in which they act.

    Raises:
        Unsupported: A guard does not run on this model's family.
        GuardFailed: A guard could not be prepared.
    """

    def __init__(self, model: TextToImage, guards: Sequence[Guard] = ()) -> None:
        self.model = model
        self.guards = tuple(guards)
        for guard in self.guards:
            if model.family not in guard.card.families:
                raise Unsupported(
                    f"{name_of(guard)} supports {', '.join(guard.card.families)}; "
                    f"this model is {model.family}."
                )
            with _closed(guard, "prepare for this model"):
                guard.prepare(model)

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        batch: int = 16,
        **sampling: Any,
    ) -> list[Outcome]:
        """One outcome per prompt: a picture, or a refusal with its verdicts.

        Args:
            prompts: Texts to paint.
            seed: Seed of the first picture (the next uses `seed + 1`), or one seed per picture.
            batch: Pictures at a time.
            **sampling: `steps`, `guidance`, `size`; the model's own where not given.

        Raises:
            GuardFailed: A guard broke; there are no pictures then.
        """
        seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
        asked = [Prompt(id=str(i), text=text) for i, text in enumerate(prompts)]
        return self.show(asked, seeds, batch=batch, **sampling)

    def show(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], *, batch: int = 16, **sampling: Any
    ) -> list[Outcome]:
        """One outcome per prompt, with the learnt embeddings and start noise that prompts carry.

        Guards that read or review texts see them without the placeholder of learnt embeddings.

        Args:
            prompts: What to paint.
            seeds: One per prompt; where it has `latents`, those are the noise instead.
            batch: Pictures at a time.
            **sampling: `steps`, `guidance`, `size`; the model's own where not given.

        Raises:
            BadInput: Not one seed per prompt, or embeddings or noise that do not fit.
            GuardFailed: A guard broke; there are no pictures then.
        """
        if len(seeds) != len(prompts):
            raise BadInput(f"{len(prompts)} prompts but {len(seeds)} seeds; give one seed each.")
        outcomes: list[Outcome] = []
        for start in range(0, len(prompts), batch):
            part = slice(start, start + batch)
            outcomes += self._batch(list(prompts[part]), list(seeds[part]), sampling)
        return outcomes

    def _batch(
        self, prompts: list[Prompt], seeds: list[int], sampling: dict[str, Any]
    ) -> list[Outcome]:
        before = self.admit([prompt.text for prompt in prompts], soft_of(prompts))
        kept = [i for i, opinions in enumerate(before) if not refuses(opinions)]
        outcomes = [
            Outcome(prompt.text, seed, None, opinions)
            for prompt, seed, opinions in zip(prompts, seeds, before, strict=True)
        ]
        if not kept:
            return outcomes
        asked = [prompts[i] for i in kept]
        condition = self.condition([prompt.text for prompt in asked], soft_of(asked))
        images = self.paint(
            condition, [seeds[i] for i in kept], latents=latents_of(asked), **sampling
        )
        reviews = self.review(images, condition.prompts)
        for i, image, after in zip(kept, images, reviews, strict=True):
            shown = None if refuses(after) else image
            outcomes[i] = replace(outcomes[i], image=shown, verdicts=before[i] + after)
        return outcomes

    @torch.no_grad()
    def admit(
        self, prompts: Sequence[str], soft: Sequence[Soft | None] | None = None
    ) -> list[Opinions]:
        """What the guards say about the prompts, learnt embeddings included; see `refuses`."""

        def ask(guard: Guard) -> Sequence[Verdict]:
            return (
                guard.screen_prompts(prompts)
                if soft is None
                else guard.screen_learnt(prompts, soft)
            )

        return self._opinions(prompts, ask)

    @torch.no_grad()
    def condition(
        self, prompts: Sequence[str], soft: Sequence[Soft | None] | None = None
    ) -> Condition:
        """What the denoiser is told about the prompts, after the guards' edits."""
        return self.edited(self.model.encode(prompts, soft=soft))

    def edited(self, condition: Condition) -> Condition:
        """A condition after the guards' edits; differentiable where the guards are."""
        for guard in self.guards:
            with _closed(guard, "edit the text states"):
                edited = guard.edit_condition(condition)
            _finite(guard, edited.states, condition.states)
            condition = _honest(edited, condition)
        return condition

    @torch.no_grad()
    def paint(
        self,
        condition: Condition,
        seeds: Sequence[int],
        *,
        negative: Condition | None = None,
        **sampling: Any,
    ) -> Tensor:
        """Pictures in [0, 1] for a condition, one seed each."""
        z = self.model.sample(
            condition,
            negative=negative,
            seed=list(seeds),
            on_noise=[_noise_edit(guard) for guard in self.guards if _edits_noise(guard)],
            **sampling,
        )
        return self.model.decode(z)

    def review(self, images: Tensor, prompts: Sequence[str]) -> list[Opinions]:
        """What the guards say about the pictures; see `refuses`."""
        return self._opinions(prompts, lambda guard: guard.screen_images(images, prompts))

    def _opinions(
        self, prompts: Sequence[str], ask: Callable[[Guard], Sequence[Verdict]]
    ) -> list[Opinions]:
        opinions: list[Opinions] = [()] * len(prompts)
        for guard in self.guards:
            with _closed(guard, "screen"):
                verdicts = list(ask(guard))
            if not verdicts:
                continue
            _check(guard, verdicts, len(prompts))
            opinions = [old + (new,) for old, new in zip(opinions, verdicts, strict=True)]
        return opinions


def refuses(opinions: Opinions) -> bool:
    """Whether any verdict refuses: flagged, or could not tell."""
    return any(verdict.flagged is not False for verdict in opinions)


def soft_of(prompts: Sequence[Prompt]) -> list[Soft | None] | None:
    """The learnt embeddings of prompts; None if there are none at all."""
    found = [prompt.soft for prompt in prompts]
    return found if any(found) else None


def latents_of(prompts: Sequence[Prompt]) -> list[Tensor | None] | None:
    """The start noise of prompts; None if there is none at all."""
    found = [prompt.latents for prompt in prompts]
    return None if all(latents is None for latents in found) else found


def name_of(guard: Guard) -> str:
    return type(guard).__name__


@contextmanager
def _closed(guard: Guard, doing: str) -> Iterator[None]:
    """Whatever breaks inside a guard is a failed protection."""
    try:
        yield
    except SafelightError:
        raise
    except Exception as error:
        raise GuardFailed(
            f"guard {name_of(guard)} could not {doing}: {type(error).__name__}: {error}"
        ) from error


def _check(guard: Guard, verdicts: Sequence[Verdict], n: int) -> None:
    if len(verdicts) != n:
        raise GuardFailed(f"guard {name_of(guard)} gave {len(verdicts)} verdicts for {n} requests")
    for verdict in verdicts:
        if not isfinite(verdict.score):
            raise GuardFailed(f"guard {name_of(guard)} gave a score that is not a number")


def _finite(guard: Guard, new: Tensor, old: Tensor) -> None:
    if new.shape != old.shape or not torch.isfinite(new).all():
        raise GuardFailed(f"guard {name_of(guard)} returned a tensor of wrong shape or with NaN")


def _honest(new: Condition, old: Condition) -> Condition:
    """A condition that claims to be what was written only if it is."""
    same = new.states is old.states and new.pooled is old.pooled
    return new if same or new.written is not old.written else replace(new, written=None)


def _edits_noise(guard: Guard) -> bool:
    return type(guard).edit_noise is not Guard.edit_noise


def _noise_edit(guard: Guard) -> Callable[[Tensor, Step], Tensor]:
    def edit(noise: Tensor, step: Step) -> Tensor:
        with _closed(guard, "edit the noise"):
            edited = guard.edit_noise(noise, step)
        _finite(guard, edited, noise)
        return edited

    return edit
