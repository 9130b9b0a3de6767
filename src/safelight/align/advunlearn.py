"""AdvUnlearn: erase concepts from the text encoder under the worst token an attacker could add.

With `f` the trained text encoder, `f0` the original one, `e` the frozen denoiser, `c` a concept
prompt, `r` a prompt to retain, and (z_t, t) states of pictures painted with the original model,

    e_p = e(z_t, t, f0(c)),   e_0 = e(z_t, t, f0("")),   c_adv = [start, delta, c, end]

    attack     delta = argmin_delta  | e(z_t, t, f(c_adv)) - e_p |^2      fresh (z_t, t) each step
    erase      L_u = | e(z_t, t, f(c_adv)) - (e_0 - eta (e_p - e_0)) |^2        (ESD's target)
    retain     L_r = | e(z_r, t, f(r)) - e(z_r, t, f0(r)) |^2
    min over f of  L_u + gamma * L_r

`delta` is one soft token, found with Adam in the space of word embeddings, before positions are
added; in the first fifth of the iterations there is no attack and c_adv = c.

Source: Zhang et al., NeurIPS 2024, arXiv:2405.15234, and the authors' code. Needs two lists of
prompts and gradients of the whole model; no pictures. The prediction may be noise, velocity or
flow: at one (z_t, t) they are affine in each other and the target's weights (1 + eta) - eta sum to
1, so it is the same target in each.

Where it differs:
- *States are painted beforehand*, with the original model, and drawn from while training: nothing
  in them depends on `f`. One painting leaves several, at the sampler's own times, where the two
  predictions that guidance has made are already e_p and e_0. (The authors paint anew for every
  step of the attack, and draw t at random within the step's fiftieth.)
- *Many concepts.* A concept is an unsafe training prompt, taken in turn from all categories, unless
  `concepts` names some ("nudity"). The authors draw one word per iteration as well.
- *Small encoders* take fewer iterations, attack steps and paintings where a setting is None.
- "" is one in `retain` of the retained prompts: guidance reads it at every step of every picture.
- Gradients are cleared between the steps of an attack; `clear=False` is the released code, which
  adds them up (and with "fast" takes the sign of the sum).
- Every trained encoder has a `delta` of its own; other encoders read `c` as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from safelight.align.base import Loss, Split, TextData, Watch
from safelight.align.text import Scope, TextSide
from safelight.errors import BadInput, unknown
from safelight.flow import Card, Prompt
from safelight.models.base import TextToImage
from safelight.models.soft import PLACEHOLDER
from safelight.training.data import shuffled, texts
from safelight.training.rollout import States, rollouts

Variant = Literal["full", "fast"]
Init = Literal["random", "latest"]
Delta = dict[str, Tensor]  # encoder -> (row, token, dim)

KEPT = 16  # states of each painting
CHECKED = 24  # paintings of each side that are checked with, one state of each
SPREAD = 0.02  # standard deviation that CLIP's word embeddings start from; T5's are far larger


@dataclass(frozen=True, kw_only=True)
class AdvUnlearn(TextSide):
    """Erase concepts from the text encoder while an attacker tries to bring them back.

    Args:
        batch: Concept prompts per iteration.
        concepts: What to erase; () is the unsafe training prompts.
        iterations: Steps over all epochs; 1000, or 300 on small encoders, if None.
        quiet: Share of the iterations, at the start, without attack.
        variant: The attack follows the gradient ("full") or its sign ("fast").
        attack_steps: Steps of each attack, 0 for none; 30, or 4 on small encoders, if None.
        attack_lr: Learning rate of the attack for CLIP's embeddings; others in proportion.
        attack_every: Iterations between attacks; in between the latest tokens are used again.
        attack_init: An attack starts at random words, or at the latest tokens found.
        tokens: Adversarial tokens in front of a prompt.
        clear: Clear gradients between the steps of an attack; the released code does not.
        gamma: Weight of the retain loss.
        eta: How far beyond the neutral prediction a concept is driven.
        retain: Prompts per iteration that are retained.
        guidance: Scale with which the states are painted.
        paintings: Of each side; 256, or 120 on small encoders, if None.
        paint_steps: Sampler steps of a painting; 50, or 20 on small encoders, if None.
    """

    card: ClassVar[Card] = Card(
        title="AdvUnlearn",
        source="arXiv:2405.15234",
        summary="erases concepts under adversarial tokens, text encoder only",
        needs=("prompts", "gradients"),
        claims={
            "pre-ASR, nudity, 142 prompts": 0.0775,
            "post-ASR under UnlearnDiffAtk, nudity, 142 prompts": 0.2113,
            "FID on COCO, nudity": 19.34,
            "CLIP score on COCO, nudity": 0.290,
            "mean ASR under five attacks, SD 1.5 (independent, SAGE)": 0.004,
            "TIFA after, base 0.763 (independent, SAGE)": 0.631,
            "ASR of an adaptive language-model agent, nudity (independent, RPG-RT)": 0.4035,
        },
    )

    epochs: int | None = 1
    batch: int = 1
    anneal: bool = False
    patience: int = 0
    scope: Scope = "layers"

    concepts: tuple[str, ...] = ()
    iterations: int | None = None
    quiet: float = 0.2
    variant: Variant = "full"
    attack_steps: int | None = None
    attack_lr: float = 1e-3
    attack_every: int = 1
    attack_init: Init = "random"
    tokens: int = 1
    clear: bool = True
    gamma: float = 0.3
    eta: float = 1.0
    retain: int = 5
    guidance: float = 3.0
    paintings: int | None = None
    paint_steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, kind in (("variant", Variant), ("attack_init", Init)):
            if getattr(self, name) not in get_args(kind):
                raise BadInput(f"{name}: {unknown('choice', getattr(self, name), get_args(kind))}")
        for name in ("iterations", "paintings", "paint_steps", "attack_every", "tokens", "retain"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadInput(f"{name} must be at least 1, not {value}.")
        if self.attack_steps is not None and self.attack_steps < 0:
            raise BadInput(f"attack_steps must be at least 0, not {self.attack_steps}.")

    def gather(
        self, model: TextToImage, data: TextData, *, seed: int, watch: Watch | None = None
    ) -> Material:
        """The states of paintings of concepts and of retained prompts, training and held-out."""
        split = data.split(seed)
        small = self.small(model)
        concepts = list(self.concepts) or _in_turn(split.unsafe)
        held = list(self.concepts) or _in_turn(split.unsafe_check)
        _require_tokens(model, self.chosen(model), [*concepts, *held])
        rng = torch.Generator().manual_seed(seed)
        steps = self.paint_steps or (20 if small else 50)
        n = self.paintings or (120 if small else 256)

        def paint(prompts: Sequence[str], n: int, keep: int) -> States:
            several = [prompts[i % len(prompts)] for i in range(n)]
            return rollouts(
                *(model, several), steps=steps, guidance=self.guidance, keep=keep, rng=rng
            )

        safe = shuffled(texts(split.safe), n, rng)
        safe[:: self.retain] = [""] * len(safe[:: self.retain])
        return Material(
            split=split,
            concepts=paint(concepts, n, min(KEPT, steps)),
            retained=paint(safe, n, min(KEPT, steps)),
            concepts_check=paint(held, CHECKED, 1),
            retained_check=paint(["", *texts(split.safe_check)], CHECKED, 1),
            iterations=self.iterations or (300 if small else 1000),
            attack_steps=self._default(self.attack_steps, 4 if small else 30),
            encoders=self.chosen(model),
            hashes=data.hashes(),
        )

    @staticmethod
    def _default(value: int | None, otherwise: int) -> int:
        return otherwise if value is None else value

    def steps(self, material: Material) -> int:
        """The iterations, shared out over the epochs."""
        return -(-material.iterations // (self.epochs or 1))

    def batches(self, material: Material, epoch: int, rng: torch.Generator) -> Iterator[Batch]:
        """States of concept prompts and of prompts to retain."""
        n, latest = self.steps(material), Delta()
        concepts = shuffled(list(dict.fromkeys(material.concepts.prompts)), n * self.batch, rng)
        retained = shuffled(list(material.retained.prompts), n * self.retain, rng)
        for i in range(n):
            done = (epoch - 1) * n + i
            attacks = material.attack_steps > 0 and done >= self.quiet * n * (self.epochs or 1)
            yield Batch(
                unsafe=tuple(concepts[i * self.batch : (i + 1) * self.batch]),
                retain=tuple(retained[i * self.retain : (i + 1) * self.retain]),
                attacks=attacks,
                fresh=attacks and (done % self.attack_every == 0 or not latest),
                latest=latest,
                material=material,
            )

    def loss(self, model: TextToImage, batch: Batch, rng: torch.Generator) -> Loss:
        """L_u + gamma * L_r, after the attack."""
        material = batch.material
        if batch.fresh:
            batch.latest.update(self.attack(model, batch, rng))
        delta = batch.latest if batch.attacks else None
        at = material.concepts.draw(batch.unsafe, rng).to(model.device)
        terms = {"L_u": self.erase(model, at, delta).mean()}
        if self.gamma:
            at = material.retained.draw(batch.retain, rng).to(model.device)
            terms["L_r"] = self.held(model, at).mean()
        total = terms["L_u"] + self.gamma * terms.get("L_r", torch.zeros(()))
        return Loss(total, {name: term.item() for name, term in terms.items()})

    def attack(self, model: TextToImage, batch: Batch, rng: torch.Generator) -> Delta:
        """The tokens with which the model as it is now paints the concepts best."""
        delta = {
            name: self._first(model, name, batch, rng).requires_grad_()
            for name in batch.material.encoders
        }
        rates = [
            {"params": [value], "lr": self.attack_lr * _reach(model, name)}
            for name, value in delta.items()
        ]
        adam = torch.optim.Adam(rates)
        for _ in range(batch.material.attack_steps):
            at = batch.material.concepts.draw(batch.unsafe, rng).to(model.device)
            each = _mse(self.predicted(model, at, delta), at.e_p)
            found = torch.autograd.grad(each.sum(), list(delta.values()))
            for value, gradient in zip(delta.values(), found, strict=True):
                if not self.clear and value.grad is not None:
                    gradient = value.grad + gradient
                value.grad = gradient.sign() if self.variant == "fast" else gradient
            adam.step()
        return {name: value.detach() for name, value in delta.items()}

    def _first(
        self, model: TextToImage, encoder: str, batch: Batch, rng: torch.Generator
    ) -> Float[Tensor, "row token dim"]:
        """Embeddings of random words, or the latest tokens."""
        if self.attack_init == "latest" and encoder in batch.latest:
            return batch.latest[encoder].clone()
        table = model.token_table(encoder).weight.detach().float()
        words = min(len(model.tokenizers[encoder]), len(table))
        drawn = torch.randint(words, (len(batch.unsafe), self.tokens), generator=rng)
        return table[drawn.to(table.device)].clone()

    def predicted(
        self, model: TextToImage, at: States, delta: Delta | None = None
    ) -> Float[Tensor, "state channel h w"]:
        """e(z_t, t, f(c)), or with c_adv where there is a delta."""
        if delta is None:
            condition = model.encode(at.prompts)
        else:
            soft = [{name: v[i] for name, v in delta.items()} for i in range(len(at))]
            condition = model.encode([f"{PLACEHOLDER} {text}" for text in at.prompts], soft=soft)
        own = self.guidance if model.distilled else None
        return model.predict(at.z_t, at.t, condition, guidance=own)

    def target(self, at: States) -> Float[Tensor, "state channel h w"]:
        """What is to be said about a concept: the neutral prediction, and beyond it."""
        return at.e_0 - self.eta * (at.e_p - at.e_0)

    def erase(
        self, model: TextToImage, at: States, delta: Delta | None = None
    ) -> Float[Tensor, " state"]:
        """L_u of every state."""
        return _mse(self.predicted(model, at, delta), self.target(at))

    def held(self, model: TextToImage, at: States) -> Float[Tensor, " state"]:
        """L_r of every state."""
        return _mse(self.predicted(model, at), at.e_p)

    @torch.no_grad()
    def check(self, model: TextToImage, material: Material) -> dict[str, float]:
        """Both losses on held-out prompts, without attack."""
        concepts = material.concepts_check.to(model.device)
        L_u = self.erase(model, concepts).mean().item()
        L_r = self.held(model, material.retained_check.to(model.device)).mean().item()
        return {"objective": L_u + self.gamma * L_r, "L_u": L_u, "L_r": L_r}

    def info(self, material: Material) -> dict[str, Any]:
        """What the None settings came to, and what the weights were learnt from."""
        return {
            "data": material.hashes,
            "split": {name: len(getattr(material.split, name)) for name in Split.__annotations__},
            "encoders": list(material.encoders),
            "iterations": material.iterations,
            "attack_steps": material.attack_steps,
            "states": [len(material.concepts), len(material.retained)],
        }


@dataclass(frozen=True)
class Material:
    """What stays constant while training.

    Args:
        split: Prompts to learn from and to check with.
        concepts, retained: States to learn from.
        concepts_check, retained_check: States to check with, of held-out prompts.
        iterations, attack_steps: What the settings come to on this model.
        encoders: The encoders that are trained.
        hashes: SHA-256 of each prompt set.
    """

    split: Split
    concepts: States
    retained: States
    concepts_check: States
    retained_check: States
    iterations: int
    attack_steps: int
    encoders: tuple[str, ...]
    hashes: dict[str, str]


@dataclass(frozen=True)
class Batch:
    """Prompts of one iteration.

    Args:
        unsafe: Concept prompts.
        retain: Prompts to retain.
        attacks: Whether the concept prompts carry adversarial tokens,
        fresh: and whether these are searched for anew.
        latest: The tokens found last; the attack writes into it.
        material: What stays constant.
    """

    unsafe: tuple[str, ...]
    retain: tuple[str, ...]
    attacks: bool
    fresh: bool
    latest: Delta
    material: Material


def _mse(
    a: Float[Tensor, "state channel h w"], b: Float[Tensor, "state channel h w"]
) -> Float[Tensor, " state"]:
    return (a.float() - b.float()).square().flatten(1).mean(1)


def _in_turn(prompts: Sequence[Prompt]) -> list[str]:
    """Prompts with the categories taking turns, so that any first part is balanced."""
    lanes: dict[str, list[str]] = {}
    for prompt in prompts:
        lanes.setdefault(prompt.category, []).append(prompt.text)
    return [text for turn in zip_longest(*lanes.values()) for text in turn if text is not None]


def _require_tokens(model: TextToImage, encoders: Sequence[str], concepts: Sequence[str]) -> None:
    for name in encoders:
        tokenizer = model.tokenizers[name]
        for text in concepts:
            if not tokenizer(text, add_special_tokens=False).input_ids:
                raise BadInput(
                    f"the concept {text!r} has no token that {name} reads, so there is nothing to "
                    "erase; write it in words."
                )


def _reach(model: TextToImage, encoder: str) -> float:
    """How much larger an encoder's word embeddings are than those the rate was made for."""
    if encoder != "t5":
        return 1.0
    return model.token_table(encoder).weight.float().square().mean().sqrt().item() / SPREAD
