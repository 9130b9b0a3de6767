"""Haven: every unsafe prompt gets a safe place to go, also when somebody pushes it elsewhere.

Our own recipe for the text encoder, of parts that others have shown to matter. With `tau` the
original encoder, `tau_s` the trained one, `p` an unsafe prompt, `p'` its safe counterpart, D_s safe
prompts with "" among them, and `d` the Euclidean distance in units of a safe reading's mean norm:

    L_d = mean over D_u of d(tau_s(p), tau(p'))                         destination
    L_w = mean over D_u of d(tau_s(v, q + delta), tau(p')),             worst case
          v, delta = argmin over |delta_i| <= r of d(tau_s(v, q + delta), tau(p)),
          q = p, or p' for a share `planted`
    L_h = mean over D_s of d(tau_s(p), tau(p))                          hold
    L_s = max(0, S(tau(D_s)) - S(tau_s(D_s)))                           spread

    min over the layers of tau_s of   L_d + worst * L_w + hold * L_h + spread * L_s

- *Destination.* Different is not safe (the first objection to SafeText): where an unsafe prompt
  goes is said, not left open. Sources: Safe-CLIP, arXiv:2311.16254; DES, arXiv:2501.18877.
- *Layers only.* The embedding tables stay as they are. A table that may change learns the words on
  the list; layers alone must learn what the words mean, and carry it over to words of the same
  meaning that no list names. Of all parts this one does most for paraphrases.
- *Wider lists.* D_u grows by prompts in which an unsafe phrase is exchanged for words of the
  tokenizer's vocabulary that the original encoder finds like it, and unlike anything benign, and by
  such phrases among random words, with the safe phrase at the same place as destination.
- *Worst case.* Pushes of the words' embeddings, and words `v` in front of the prompt, that bring
  the *trained* encoder nearest to the old reading, found anew at every step (AdvUnlearn,
  arXiv:2405.15234, does so through the denoiser). L_w is over one half of a batch, L_d over the
  other.
- *Hold and spread.* Safe prompts, and variants of them with random words of the vocabulary inside
  or in front but for those that come near unsafe prompts, stay where they were, and as far apart
  (SAGE, arXiv:2607.00402). "" is in every batch: classifier-free guidance asks for it.

Source: this project. All categories are learnt at once. Needs two lists of prompts and gradients of
the text encoder; no pictures, no denoiser.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from safelight.align.base import Loss, Split, TextData, Watch
from safelight.align.text import Scope, TextSide, moved
from safelight.errors import BadInput
from safelight.flow import Card
from safelight.models.base import TextToImage
from safelight.training.counterparts import destinations, harmless
from safelight.training.data import shuffled, texts
from safelight.training.embedding import Reading, Reference, distance, read, remember, size
from safelight.training.geometry import spread
from safelight.training.wider import near_ones, scattered, sorted_words, varied
from safelight.training.worst import Front, Vocabulary, pushed, worst_case

KEPT = 64  # worst words that are remembered per category


@dataclass(frozen=True, kw_only=True)
class Haven(TextSide):
    """Send unsafe prompts to their safe counterparts, under attack too, and hold safe ones.

    Args:
        worst: Weight of the worst case; 0 leaves it out.
        radius: Of a token's push, in units of the mean norm of a word's embedding.
        inner: Steps in which the worst case is looked for.
        slots: Words in front of the prompt that the worst case may choose. Half the time it goes on
            from words that it chose for a prompt of the same category, so that they get worse.
        planted: Share of worst cases in which those words stand in front of the safe counterpart.
        nearby: Prompts with neighbours of unsafe phrases, as a share of the unsafe prompts. Only
            prompts with a `safe_prompt` tell which phrase is unsafe.
        scattered: Unsafe phrases and neighbours of them among random words, as such a share.
        hold: Weight of holding safe prompts.
        spread: Weight of keeping safe prompts apart.
        variants: Copies of each safe prompt that are held as well: with one or two words exchanged
            for random words of the tokenizer's vocabulary, with some in front, with nothing else.
        avoid: Words that nothing made up may use.
    """

    card: ClassVar[Card] = Card(
        title="Haven",
        source="this project",
        summary="sends unsafe prompts to safe counterparts, also under attack; text encoder only",
        needs=("prompts", "gradients"),
    )

    epochs: int = 2
    batch: int = 64
    patience: int = 0
    scope: Scope = "layers"

    worst: float = 1.0
    radius: float = 0.3
    inner: int = 1
    slots: int = 5
    planted: float = 0.5
    nearby: float = 0.5
    scattered: float = 0.5
    hold: float = 2.0
    spread: float = 1.0
    variants: int = 2
    avoid: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "worst",
            "radius",
            "hold",
            "spread",
            "slots",
            "nearby",
            "scattered",
            "variants",
        ):
            if getattr(self, name) < 0:
                raise BadInput(f"{name} must be at least 0, not {getattr(self, name)}.")
        if self.batch < 4:
            raise BadInput(f"batch must be at least 4 (half safe, half unsafe), not {self.batch}.")
        if self.inner < 1:
            raise BadInput(f"inner must be at least 1, not {self.inner}.")

    def gather(
        self, model: TextToImage, data: TextData, *, seed: int, watch: Watch | None = None
    ) -> Material:
        """The split, tau's reading of every prompt, and each unsafe prompt's destination."""
        split, encoders = data.split(seed), self.chosen(model)
        rng = torch.Generator().manual_seed(seed)
        words = sorted_words(model, encoders[0], split.unsafe, split.safe, self.avoid, rng)
        made = [
            *near_ones(split.unsafe, words, self.nearby, rng),
            *scattered(split.unsafe, words, self.scattered, rng),
        ]
        unsafe, safe = (*split.unsafe, *made, *split.unsafe_check), texts(split.safe)
        known = [p.safe_prompt for p in unsafe if p.safe_prompt]
        pairs = varied(safe, words.harmless, float(self.variants), rng)
        everything = ["", *safe, *texts((*split.safe_check, *unsafe)), *known]
        tau = remember(model, [*everything, *(variant for _, variant in pairs)], encoders)
        return Material(
            split=split,
            unsafe=texts((*split.unsafe, *made)),
            held=(*safe, *harmless(tau, pairs, texts(split.unsafe))),
            tau=tau,
            goals=destinations(tau, unsafe, safe),
            scale={name: size(p, "flatten").mean().item() for name, p in tau(["", *safe]).items()},
            hashes=data.hashes(),
            categories={prompt.text: prompt.category for prompt in unsafe},
            words=Vocabulary.of(model, encoders),
        )

    def steps(self, material: Material) -> int:
        """An epoch reads every unsafe prompt once."""
        return -(-len(material.unsafe) // (self.batch // 2))

    def batches(self, material: Material, epoch: int, rng: torch.Generator) -> Iterator[Batch]:
        """Half unsafe and half safe prompts; "" is always among the safe ones."""
        half, steps = self.batch // 2, self.steps(material)
        if epoch == 1:
            material.chosen.clear()
        unsafe = shuffled(material.unsafe, half * steps, rng)
        safe = shuffled(material.held, (half - 1) * steps, rng)
        for i in range(steps):
            kept = safe[i * (half - 1) : (i + 1) * (half - 1)]
            yield Batch(("", *kept), tuple(unsafe[i * half : (i + 1) * half]), material)

    def loss(self, model: TextToImage, batch: Batch, rng: torch.Generator) -> Loss:
        """L_d + worst * L_w + hold * L_h + spread * L_s.

        Half of the unsafe prompts are attacked, the others read as they are; an epoch later it may
        be the other way round.
        """
        fight = bool(self.worst and (self.radius or self.slots))
        plain, attacked = batch.halves() if fight else (batch, batch)
        now = batch.material.tau.now(model, (*plain.safe, *plain.unsafe))
        terms = {name: rows.mean() for name, rows in self._plain(now, plain).items()}
        if fight:
            terms["L_w"] = self._under_attack(model, attacked, rng).mean()
        if self.spread:
            terms["L_s"] = self._shrunk(now, plain)
        return Loss(self._objective(terms), {name: term.item() for name, term in terms.items()})

    def _objective(self, terms: Mapping[str, Any]) -> Any:
        weights = {"L_d": 1.0, "L_w": self.worst, "L_h": self.hold, "L_s": self.spread}
        return sum(weights[name] * term for name, term in terms.items())

    def _plain(self, now: Reading, batch: Batch) -> dict[str, Tensor]:
        """d of every unsafe prompt to its destination, and of every safe one to itself."""
        n, tau = len(batch.safe), batch.material.tau
        kept = {name: piece[:n] for name, piece in now.items()}
        sent = {name: piece[n:] for name, piece in now.items()}
        return {
            "L_d": batch.material.apart(sent, tau(batch.goals)),
            "L_h": batch.material.apart(kept, tau(batch.safe)),
        }

    def _under_attack(self, model: TextToImage, batch: Batch, rng: torch.Generator) -> Tensor:
        """d to the destination, of every attacked prompt: unsafe ones and, in turns, safe ones."""
        material = batch.material
        old, goals = material.tau(batch.unsafe), material.tau(batch.goals)
        from_safe = torch.rand(len(batch.unsafe), generator=rng) < self.planted
        pairs = zip(batch.unsafe, batch.goals, from_safe.tolist(), strict=True)
        started = material.tau.tokens_of([goal if safe else text for text, goal, safe in pairs])
        front = material.begin(batch.unsafe, self.slots, rng)
        tokens, delta = worst_case(
            model,
            started,
            lambda now: material.apart(now, old),
            radius=self.radius,
            steps=self.inner,
            rng=rng,
            words=material.words,
            front=front,
        )
        if front:
            material.keep(batch.unsafe, material.words.in_front(tokens, self.slots))
        with pushed(model, delta):
            return material.apart(read(model, tokens), goals)

    def _shrunk(self, now: Reading, batch: Batch) -> Tensor:
        """What the spread of the safe prompts has lost."""
        n, then = len(batch.safe), batch.material.tau(batch.safe)
        each = [
            (spread(then[name].states.flatten(1)) - spread(now[name].states[:n].flatten(1)))
            for name in now
        ]
        return torch.stack(each).clamp(min=0).mean()

    @torch.no_grad()
    def check(self, model: TextToImage, material: Material) -> dict[str, float]:
        """L_d and L_h on held-out prompts, and two figures that compare across methods."""
        rows: dict[str, list[Tensor]] = {}
        for batch in material.held_out():
            now = material.tau.now(model, (*batch.safe, *batch.unsafe))
            then = material.tau([*batch.safe, *batch.unsafe])
            n, plain = len(batch.safe), moved(now, then)
            found = self._plain(now, batch) | {
                "drift": plain["drift"][:n],
                "cosine": plain["cosine"][n:],
            }
            for name, part in found.items():
                rows.setdefault(name, []).append(part)
        figures = {name: torch.cat(parts).mean().item() for name, parts in rows.items()}
        return {"objective": figures["L_d"] + self.hold * figures["L_h"], **figures}

    def info(self, material: Material) -> dict[str, Any]:
        """What the weights were learnt from."""
        return {
            "data": material.hashes,
            "held": len(material.held),
            "made_up": len(material.unsafe) - len(material.split.unsafe),
            "split": {name: len(getattr(material.split, name)) for name in Split.__annotations__},
            "scale": material.scale,
        }


@dataclass(frozen=True)
class Material:
    """What stays constant while training, and the worst words found on the way.

    Args:
        split: Prompts to learn from and to check with.
        unsafe: Unsafe prompts to learn from, those with neighbours included.
        held: Safe prompts to learn from, variants included.
        tau: The original encoders' readings.
        goals: The destination of each unsafe prompt.
        scale: Mean norm of a safe reading, by piece.
        hashes: SHA-256 of each prompt set.
        categories: The category of each unsafe prompt.
        words: What may stand in front of a prompt.
        chosen: The last worst words of each category; every training begins without any.
    """

    split: Split
    unsafe: Sequence[str]
    held: tuple[str, ...]
    tau: Reference
    goals: Mapping[str, str]
    scale: Mapping[str, float]
    hashes: dict[str, str]
    categories: Mapping[str, str]
    words: Vocabulary
    chosen: dict[str, list[dict[str, Tensor]]] = field(default_factory=dict)

    def begin(self, prompts: Sequence[str], slots: int, rng: torch.Generator) -> Front | None:
        """Words to begin with: half of them random, half chosen before for the same category."""
        if not slots:
            return None
        front = self.words.random(len(prompts), slots, rng)
        for row, prompt in enumerate(prompts):
            known = self.chosen.get(self.categories[prompt], [])
            if known and torch.rand(1, generator=rng) < 0.5:
                some = known[int(torch.randint(len(known), (1,), generator=rng))]
                for name, ids in some.items():
                    front[name][row] = ids
        return front

    def keep(self, prompts: Sequence[str], front: Front) -> None:
        """Remember the words that were chosen for some prompts, the last of each category."""
        for row, prompt in enumerate(prompts):
            known = self.chosen.setdefault(self.categories[prompt], [])
            known.append({name: ids[row].cpu() for name, ids in front.items()})
            del known[:-KEPT]

    def apart(self, now: Reading, then: Reading) -> Tensor:
        """d of each row, averaged over the pieces."""
        each = [
            distance(now[name], then[name], "euclidean", "flatten") / self.scale[name]
            for name in now
        ]
        return torch.stack(each).mean(0)

    def held_out(self, size: int = 64) -> Iterator[Batch]:
        """The validation prompts in batches; one side may run out before the other."""
        safe, unsafe = ("", *texts(self.split.safe_check)), texts(self.split.unsafe_check)
        for i in range(0, max(len(safe), len(unsafe)), size):
            yield Batch(tuple(safe[i : i + size]), tuple(unsafe[i : i + size]), self)


@dataclass(frozen=True)
class Batch:
    """Safe and unsafe prompts of one step."""

    safe: tuple[str, ...]
    unsafe: tuple[str, ...]
    material: Material

    def halves(self) -> tuple[Batch, Batch]:
        """Twice the same safe prompts, with half of the unsafe ones each."""
        half = len(self.unsafe) // 2
        return replace(self, unsafe=self.unsafe[:half]), replace(self, unsafe=self.unsafe[half:])

    @property
    def goals(self) -> list[str]:
        """Where the unsafe prompts are to go."""
        return [self.material.goals[text] for text in self.unsafe]
