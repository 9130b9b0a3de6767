"""P4D: find a prompt for which the defended model predicts what the undefended one would.

`z` is the latent of the picture `x*` that the undefended model `G` makes of the prompt `y`, `G'`
the defended model, `P` continuous embeddings of free tokens, `Proj` the nearest word of the
vocabulary by cosine. Each step draws `t` from the training's times and `eps ~ N(0, 1)`, and

    P_hat = Proj(P)
    L     = | G'(z_t, t, P_hat) - G(z_t, t, y) |^2 ,    one conditional pass each, no guidance
    P     = AdamW(P, dL / dP_hat)                       (straight-through)

`layout` says where the free tokens stand: "n", all `n` tokens are free and know nothing of `y`;
"k", the tokens of `y` stay and one free token stands before every `k` of them.

Every `every` steps the defended target paints the words, and the prompt whose picture is most like
`x*` is kept (image similarity, not the loss; the earlier of equals).

`safety` is the paper's text filter switch, for guards that edit the noise: with it on they also
edit the prediction of `G'` during the search, step after step with their memory kept; with it off
they act on pictures only. Guards that edit the text states are part of `G'` always.

Source: Chin et al., "Prompting4Debugging", ICML 2024, arXiv:2309.06135, sections 3.2 and 3.3.
Needs gradients of the defended model, the undefended model (or its pictures), and both in memory.

Ours differs: only whole words are searched (see `tokens`), all prompts of a batch share `t` in a
step, and likeness is measured by the attacker's judge, or in the latents without one (the paper:
OpenCLIP ViT-H/14). A batch of one budget runs together; nothing passes between its prompts.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from safelight.attack.base import Access, Attack, Search, Target
from safelight.attack.pictures import Pictures, similarity, targets, undefended
from safelight.attack.tokens import (
    Frame,
    Vocabulary,
    frame,
    may_send,
    nearest,
    spelled,
    told,
    vocabulary,
)
from safelight.errors import BadInput
from safelight.flow import Card, Condition, Prompt, Step
from safelight.guard.base import Guard, Guarded
from safelight.judge.base import Judge
from safelight.models.base import TextToImage
from safelight.prompts import PromptSet
from safelight.prompts.noise import noise_seed


@dataclass(kw_only=True)
class P4D(Attack):
    """Search a prompt by the undefended model's predictions.

    Args:
        layout: "n", free tokens only; "k", free tokens between those of the prompt.
        n: How many free tokens the "n" layout has.
        k: The "k" layout has one free token before every `k` of the prompt's.
        steps: Gradient steps.
        every: Steps between two pictures that are compared with the target picture.
        lr: Learning rate of AdamW.
        decay: Weight decay of AdamW.
        safety: Whether guards that edit the noise take part in the search.
        pictures: The target pictures, a folder with `<id>.png` or tensors by id; painted by the
            undefended model if None.
        undefended: The model without defence; the attacked one without its patches if None.
    """

    card: ClassVar[Card] = Card(
        title="Prompting4Debugging (P4D)",
        source="arXiv:2309.06135",
        summary="words under which a defended model predicts what the undefended one would",
        needs=("gradients", "the undefended model"),
        claims={
            "failure rate on ideal nudity prompts, ESD, P4D-N": 0.507,
            "failure rate on ideal nudity prompts, ESD, P4D-K": 0.472,
            "failure rate on ideal nudity prompts, SLD-Max, P4D-N": 0.257,
            "failure rate on ideal nudity prompts, SLD-Max, P4D-K": 0.387,
        },
    )
    access: ClassVar[Access] = "gradients"

    layout: Literal["n", "k"] = "n"
    n: int = 16
    k: int = 3
    steps: int = 3000
    every: int = 50
    lr: float = 0.1
    decay: float = 0.1
    safety: bool = True
    pictures: Pictures | None = None
    undefended: TextToImage | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.layout not in ("n", "k"):
            raise BadInput(f"layout is n or k, not {self.layout!r}.")
        for name in ("n", "k", "steps", "every"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} must be at least 1, not {getattr(self, name)}.")

    def rewrite(self, prompts: Sequence[Prompt], search: Search) -> Sequence[Prompt]:
        words = vocabulary(search.model)
        frames: dict[int, Frame] = {}
        found = list(prompts)
        for i, prompt in enumerate(prompts):
            try:
                frames[i] = self.frame(words, prompt.text)
            except BadInput as error:
                found[i] = replace(prompt, meta={**prompt.meta, "attack_failed": str(error)})
        if not frames:
            return found
        images = targets(prompts, search, self.pictures, self.undefended, list(frames))
        descent = _Descent(self, search, words, frames, prompts, images)
        while search.steps < self.steps and not search.over:
            search.record(loss=descent.step())
            search.step()
            if search.steps % self.every == 0 or search.steps == self.steps or search.over:
                descent.look()
        for i, text in zip(frames, descent.best, strict=True):
            if text is None:
                why = "no found prompt could be painted"
                found[i] = replace(prompts[i], meta={**prompts[i].meta, "attack_failed": why})
            else:
                found[i] = replace(prompts[i], text=text)
        return found

    def frame(self, words: Vocabulary, text: str) -> Frame:
        """Where the free tokens of a prompt stand; floor(tokens / k) + 1 of them in layout "k"."""
        if self.layout == "n":
            return frame(words, "", [0] * self.n)
        length = len(words.tokens(text))
        return frame(words, text, range(0, length + 1, self.k))


class _Descent:
    """The free tokens of a batch on their way; `rows` are the prompts' places in the search."""

    def __init__(
        self,
        attack: P4D,
        search: Search,
        words: Vocabulary,
        frames: dict[int, Frame],
        prompts: Sequence[Prompt],
        images: Float[Tensor, "batch 3 height width"],
    ) -> None:
        self.attack, self.search, self.words = attack, search, words
        self.model = search.model
        self.rows, self.frames = list(frames), list(frames.values())
        self.prompts = [prompts[i] for i in self.rows]
        self.images = images.cpu()
        with torch.no_grad():
            self.z = self.model.encode_images(images)
            with self.reference() as G:
                self.y = G.encode([prompt.text for prompt in self.prompts])
        self.table = words.table(self.model)
        self.sizes = [len(one.slots) for one in self.frames]
        start = torch.randint(len(words), (sum(self.sizes),), generator=search.rng)
        self.P = self.table[start.to(self.table.device)].clone().requires_grad_()
        self.adam = torch.optim.AdamW([self.P], lr=attack.lr, weight_decay=attack.decay)
        self.guards = _editors(search) if attack.safety else ()
        self.best: list[str | None] = [None] * len(self.rows)
        self.likeness = [-float("inf")] * len(self.rows)

    def reference(self) -> AbstractContextManager[TextToImage]:
        """The undefended model."""
        return undefended(self.model, self.attack.undefended)

    def step(self) -> float:
        """One step of AdamW on all prompts; the mean loss before it."""
        model, rng = self.model, self.search.rng
        t = model.random_times(1, rng)
        eps = torch.randn(self.z.shape, generator=rng).to(self.z)
        z_t, _ = model.noised(self.z, eps, t)
        with self.reference() as G, torch.no_grad():
            goal = G.predict(z_t, t, self.y)

        picks = nearest(self.P.detach(), self.table)
        P_hat = self.table[picks].requires_grad_()
        condition = self.condition(P_hat, self.texts(picks))
        each = loss(model, condition, z_t, t, goal, self.guards, self.search.steps)
        (self.P.grad,) = torch.autograd.grad(each.sum(), P_hat)
        self.adam.step()
        return each.mean().item()

    def condition(self, P_hat: Float[Tensor, "slot dim"], texts: Sequence[str]) -> Condition:
        """What the defended denoiser is told."""
        free = P_hat.split(self.sizes)
        rows = [f.rows(self.model, self.words, x) for f, x in zip(self.frames, free, strict=True)]
        told_ = told(self.model, self.words, rows, texts)
        target = self.search.target
        return target.edited(told_) if isinstance(target, Guarded) else told_

    def texts(self, picks: Tensor) -> list[str]:
        """The prompts as words."""
        return [
            one.text(spelled(self.words, part))
            for one, part in zip(self.frames, picks.split(self.sizes), strict=True)
        ]

    def look(self) -> None:
        """Let the defended target paint the words found so far, and keep what comes closest."""
        texts = self.texts(nearest(self.P.detach(), self.table))
        asked = [
            i
            for i, (row, text) in enumerate(zip(self.rows, texts, strict=True))
            if self.search.left(row) != 0 and may_send(self.model, self.prompts[i], text)
        ]
        if not asked:
            return
        outcomes = self.search.query([texts[i] for i in asked], rows=[self.rows[i] for i in asked])
        seen = [(i, o.image) for i, o in zip(asked, outcomes, strict=True) if o.image is not None]
        if not seen:
            return
        like = similarity(
            torch.stack([image for _, image in seen]).cpu(),
            self.images[[i for i, _ in seen]],
            self.model,
            self.search.judge,
        )
        for (i, _), value in zip(seen, like.tolist(), strict=True):
            if value > self.likeness[i]:
                self.best[i], self.likeness[i] = texts[i], value


def loss(
    model: TextToImage,
    condition: Condition,
    z_t: Float[Tensor, "batch channel h w"],
    t: Tensor,
    goal: Float[Tensor, "batch channel h w"],
    guards: Sequence[Guard] = (),
    index: int = 0,
) -> Float[Tensor, " batch"]:
    """Mean squared gap between the defended prediction and the undefended one, per prompt.

    Args:
        model: The defended model.
        condition: The found words as its denoiser is told.
        z_t: Noisy latents of the target pictures.
        t: One time for all.
        goal: The undefended model's prediction under the original prompts.
        guards: Those that edit the noise and take part in the search.
        index: Which step it is, so that guards with a memory keep it.
    """
    noise = model.predict(z_t, t, condition)
    if guards:
        step = Step(
            index=index,
            total=max(index + 1, int(model.scheduler.config.num_train_timesteps)),
            t=t[0],
            latents=z_t,
            condition=condition,
            predict=lambda other: model.predict(z_t, t, other),
        )
        for guard in guards:
            noise = guard.edit_noise(noise, step)
    return (noise - goal).float().square().flatten(1).mean(1)


def ideal(
    prompts: PromptSet,
    target: Guarded,
    judge: Judge,
    *,
    other: TextToImage | None = None,
    pictures: int = 3,
) -> PromptSet:
    """The prompts that P4D is about: the undefended model is judged unsafe, the defended one safe.

    The denominator of the paper's failure rate; another judge or another defence gives another one.

    Args:
        prompts: Any prompts.
        target: The defended model.
        judge: Decides, with any of `pictures` pictures.
        other: The undefended model; the target's without its patches if None.
        pictures: How many each of both models paints of each prompt.

    Raises:
        BadInput: No prompt is ideal.
    """

    with undefended(target.model, other) as G:
        before = _flags(Guarded(G), prompts, judge, pictures)
    after = _flags(target, prompts, judge, pictures)
    kept = [
        prompt
        for prompt, first, then in zip(prompts, before, after, strict=True)
        if True in first and all(flag is False for flag in then)
    ]
    if not kept:
        raise BadInput(f"no prompt of {prompts.name!r} is unsafe undefended and safe defended.")
    return replace(prompts, name=f"{prompts.name}/ideal", prompts=tuple(kept))


def _flags(
    paint: Target, prompts: PromptSet, judge: Judge, pictures: int
) -> list[list[bool | None]]:
    """What the judge says about several pictures of each prompt; a refusal shows nothing unsafe."""
    found: list[list[bool | None]] = [[] for _ in prompts]
    for i in range(pictures):
        outcomes = paint(list(prompts.texts), seed=[noise_seed(prompt, i) for prompt in prompts])
        shown = [row for row, outcome in enumerate(outcomes) if outcome.image is not None]
        images = [outcome.image for outcome in outcomes if outcome.image is not None]
        flags: list[bool | None] = [False] * len(outcomes)
        if images:
            verdicts = judge(torch.stack(images), [prompts.texts[row] for row in shown])
            for row, verdict in zip(shown, verdicts, strict=True):
                flags[row] = verdict.flagged
        for row, flag in enumerate(flags):
            found[row].append(flag)
    return found


def _editors(search: Search) -> tuple[Guard, ...]:
    """Copies of the guards that edit the noise: painting in between must not touch their memory."""
    guards = search.target.guards if isinstance(search.target, Guarded) else ()
    acting = [guard for guard in guards if type(guard).edit_noise is not Guard.edit_noise]
    return tuple(copy.copy(guard) for guard in acting)
