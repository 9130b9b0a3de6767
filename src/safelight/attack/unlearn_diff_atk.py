"""UnlearnDiffAtk: a few words in front of a prompt, found by the defended model's own likelihood.

`z` is the latent of a picture of the concept, `k` slots hold distributions `p` over the words, and

    v   = onehot(sample(p))                      one word drawn per slot
    L   = | eps - eps_defended(z_t, t, v + y) |^2      at fresh noise eps, `y` the prompt
    p   = Pi(Adam(p, clamp(dL / dv, -1, 1)))     Pi: the Euclidean projection to the simplex

A low loss means that the defended model finds the picture likely under the prompt: it is its own
classifier, and no second diffusion model takes part in the search. `t` rises through `times` evenly
spaced times (10, 30, ..., 990 of 1000), `iterations` steps at each; after each time the most likely
words are painted by the whole target at the prompt's own noise and judged, and a prompt that
succeeds is done. Prompts that succeed as they are, are never attacked.

Source: Zhang et al., ECCV 2024, arXiv:2310.11868, section 4; the schedule from the authors' code.
Needs gradients of the defended model, a picture of the concept per prompt, a judge to stop at.

Where it differs: only whole words are searched (see `tokens`); models with another
parametrisation are compared with their own training target instead of eps. The loss sees the
weights and the guards' edits of the text states; guards that edit the noise act only on the
pictures, as in the paper. Without a judge nothing is painted and the last words are kept.

`control` puts a control in the search's place with the same pictures: random "words", or other
start noise for the prompt as it is ("seeds"). The attack must beat both to mean anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from safelight.attack.base import Access, Attack, Search
from safelight.attack.pictures import Pictures, targets
from safelight.attack.tokens import (
    Frame,
    Vocabulary,
    frame,
    may_send,
    sampled,
    simplex,
    spelled,
    told,
    vocabulary,
)
from safelight.errors import BadInput
from safelight.flow import Card, Condition, Prompt
from safelight.guard.base import Guarded
from safelight.models import sampling
from safelight.models.base import TextToImage


@dataclass(kw_only=True)
class UnlearnDiffAtk(Attack):
    """Words in front of the prompt that make the defended model find the picture likely.

    Args:
        k: Words to find; the paper takes 5 for nudity, 3 for styles.
        place: Where they stand.
        times: Evenly spaced times; one picture after each.
        iterations: Steps at each time.
        lr: Learning rate of Adam.
        decay: Weight decay of Adam.
        start: Distributions to start from: all words alike, or random.
        control: Run a control instead of the search, see above.
        pictures: Pictures of the concept, a folder with `<id>.png` or tensors by id; painted by
            the undefended model if None.
        undefended: The model without defence; the attacked one without its patches if None.
    """

    card: ClassVar[Card] = Card(
        title="UnlearnDiffAtk",
        source="arXiv:2310.11868",
        summary="a few words that make the defended model find the unsafe picture likely",
        needs=("gradients", "images"),
        claims={
            "post-ASR, nudity, 142 prompts, ESD": 0.7605,
            "post-ASR, nudity, 142 prompts, UCE": 0.7958,
            "post-ASR, nudity, 142 prompts, SLD": 0.8239,
            "post-ASR, nudity, 142 prompts, AdvUnlearn": 0.2113,
            "post-ASR, nudity, 142 prompts, SalUn": 0.1127,
        },
    )
    access: ClassVar[Access] = "gradients"

    k: int = 5
    place: Literal["prefix", "middle", "suffix"] = "prefix"
    times: int = 50
    iterations: int = 40
    lr: float = 0.01
    decay: float = 0.1
    start: Literal["uniform", "random"] = "uniform"
    control: Literal["none", "words", "seeds"] = "none"
    pictures: Pictures | None = None
    undefended: TextToImage | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("k", "times", "iterations"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} must be at least 1, not {getattr(self, name)}.")

    def rewrite(self, prompts: Sequence[Prompt], search: Search) -> Sequence[Prompt]:
        words = vocabulary(search.model)
        run = _Run(self, search, words, list(prompts))
        run.baseline()
        if not run.active:
            return run.found
        if self.control == "none":
            self._search(run)
        else:
            for _ in range(self.times):
                if not run.active or search.over:
                    break
                run.ask(*(run.random_words() if self.control == "words" else run.other_noise()))
        return run.found

    def _search(self, run: _Run) -> None:
        model, search = run.search.model, run.search
        there = list(run.active)  # those that succeed as they are need no picture
        images = targets(run.prompts, search, self.pictures, self.undefended, there)
        with torch.no_grad():
            seen = model.encode_images(images)
        z = seen.new_zeros(len(run.prompts), *seen.shape[1:])
        z[there] = seen
        table = run.words.table(model)
        p = self.first(len(z), len(run.words), search.rng).to(z.device).requires_grad_()
        adam = torch.optim.Adam([p], lr=self.lr, weight_decay=self.decay)
        for t in self.schedule(model):
            for _ in range(self.iterations):
                rows = run.active
                eps = torch.randn((len(rows), *z.shape[1:]), generator=search.rng).to(z)
                v = sampled(p[rows], search.rng)
                each = loss(model, run.condition(v, table), z[rows], eps, t.to(z.device))
                adam.zero_grad()
                each.sum().backward()
                adam.step()
                with torch.no_grad():
                    p[rows] = simplex(p[rows])
                search.record(loss=each.mean().item(), t=t.item())
                search.step()
                if search.over:
                    break
            run.ask(run.texts(p[run.active].argmax(-1)))
            if not run.active or search.over:
                return

    def first(self, n: int, words: int, rng: torch.Generator) -> Float[Tensor, "batch slot word"]:
        """The distributions at the start."""
        if self.start == "uniform":
            return torch.full((n, self.k, words), 1 / words)
        return simplex(torch.rand((n, self.k, words), generator=rng))

    def schedule(self, model: TextToImage) -> list[Tensor]:
        """The middles of `times` equal parts of the training's times, ascending."""
        total = model.scheduler.config.num_train_timesteps
        return [torch.tensor([(i + 0.5) * total / self.times]) for i in range(self.times)]

    def frame(self, words: Vocabulary, text: str) -> Frame:
        """Where the free tokens of a prompt stand."""
        length = len(words.tokens(text))
        before = {"prefix": 0, "middle": length // 2, "suffix": length}[self.place]
        return frame(words, text, [before] * self.k)


def loss(
    model: TextToImage,
    condition: Condition,
    z: Float[Tensor, "batch channel h w"],
    eps: Float[Tensor, "batch channel h w"],
    t: Tensor,
) -> Float[Tensor, " batch"]:
    """How unlikely the defended model finds pictures: its mean squared error on their noise.

    Args:
        model: The defended model.
        condition: What its denoiser is told.
        z: Latents of the pictures.
        eps: Noise.
        t: One time for all.
    """
    z_t, target = model.noised(z, eps, t)
    return (model.predict(z_t, t, condition) - target).float().square().flatten(1).mean(1)


class _Run:
    """A batch on its way: which prompts are still searched for, and what was found."""

    def __init__(
        self, attack: UnlearnDiffAtk, search: Search, words: Vocabulary, prompts: list[Prompt]
    ) -> None:
        self.attack, self.search, self.words, self.prompts = attack, search, words, prompts
        self.found = list(prompts)
        self.frames: dict[int, Frame] = {}
        for i, prompt in enumerate(prompts):
            try:
                self.frames[i] = attack.frame(words, prompt.text)
            except BadInput as error:
                self.found[i] = replace(prompt, meta={**prompt.meta, "attack_failed": str(error)})
        self.active = list(self.frames)  # places in the batch

    def baseline(self) -> None:
        """Paint the prompts as they are; those that succeed are not attacked."""
        if self.search.judge is None:
            return
        asked = [i for i in range(len(self.prompts)) if self.search.left(i) != 0]
        texts = [self.prompts[i].text for i in asked]
        for i, success in zip(asked, self._judged(asked, texts, None), strict=True):
            if success and i in self.active:
                self.active.remove(i)
                self.found[i] = self._marked(i, pre="yes")

    def texts(self, picks: Int[Tensor, "batch slot"]) -> list[str]:
        """The active prompts with words in their free places."""
        return [
            self.frames[i].text(spelled(self.words, pick))
            for i, pick in zip(self.active, picks, strict=True)
        ]

    def condition(
        self, v: Float[Tensor, "batch slot word"], table: Float[Tensor, "word dim"]
    ) -> Condition:
        """What the defended denoiser is told about the active prompts; differentiable in `v`."""
        model = self.search.model
        rows = [
            self.frames[i].rows(model, self.words, one @ table)
            for i, one in zip(self.active, v, strict=True)
        ]
        seen = told(model, self.words, rows, self.texts(v.argmax(-1)))
        target = self.search.target
        return target.edited(seen) if isinstance(target, Guarded) else seen

    def random_words(self) -> tuple[list[str]]:
        shape = (len(self.active), self.attack.k)
        return (self.texts(torch.randint(len(self.words), shape, generator=self.search.rng)),)

    def other_noise(self) -> tuple[list[str], list[int]]:
        drawn = torch.randint(2**31, (len(self.active),), generator=self.search.rng)
        return [self.prompts[i].text for i in self.active], drawn.tolist()

    def ask(self, texts: Sequence[str], seeds: Sequence[int] | None = None) -> None:
        """Paint and judge the active prompts' texts; those that succeed are done."""
        search, model = self.search, self.search.model
        sent = []
        for place, (i, text) in enumerate(zip(self.active, texts, strict=True)):
            if seeds is not None or may_send(model, self.prompts[i], text):
                self._keep(i, text, None if seeds is None else seeds[place])
                if search.left(i) != 0:
                    sent.append(place)
        if search.judge is None or not sent:
            return
        rows = [self.active[place] for place in sent]
        noise = None if seeds is None else [seeds[place] for place in sent]
        judged = self._judged(rows, [texts[place] for place in sent], noise)
        done = {i for i, success in zip(rows, judged, strict=True) if success}
        self.active = [i for i in self.active if i not in done]

    def _keep(self, i: int, text: str, seed: int | None) -> None:
        """The last words stand, unless a later picture succeeds."""
        self.found[i] = replace(self.prompts[i], text=text)
        if seed is not None:
            size = self.search.sampling.get("size") or self.search.model.default_size
            noise = sampling.noise(self.search.model.latent_shape(size), [seed])[0]
            self.found[i] = replace(self._marked(i, noise_seed=str(seed)), latents=noise)

    def _judged(
        self, rows: Sequence[int], texts: Sequence[str], seeds: Sequence[int] | None
    ) -> list[bool]:
        """Whether the judge flags what the target makes; a refusal is no success."""
        outcomes = self.search.query(list(texts), seeds=seeds, rows=rows)
        shown = [i for i, outcome in enumerate(outcomes) if outcome.image is not None]
        success = [False] * len(rows)
        if shown and self.search.judge is not None:
            images = torch.stack([o.image for o in outcomes if o.image is not None])
            verdicts = self.search.judge(images, [texts[i] for i in shown])
            for i, verdict in zip(shown, verdicts, strict=True):
                success[i] = verdict.flagged is True
        return success

    def _marked(self, i: int, **notes: str) -> Prompt:
        prompt = self.prompts[i]
        return replace(prompt, meta={**prompt.meta, **notes})
