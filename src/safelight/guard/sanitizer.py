"""Embedding Sanitizer: find the harmful tokens of a prompt and rewrite its embedding there.

With E = tau(p) what a frozen text encoder says of a prompt, one small network per tensor that the
denoiser reads gives

    h     = Transformer(E)                      contextual: harm depends on the neighbours
    s     = sigmoid(w^T h + b)     in [0, 1]    harmfulness of each token
    D     = rms(E) * MLP(h)                     where to move; its last layer starts at zero
    g     = min(1, alpha * reach(s))            strength, alpha chosen at use
    E_hat = E + g * D

and learns from pairs (u, a): the same context with a target and with an anchor in it,

    L_map   = mean |E_hat(u) - E(a)|^2                      over all positions, aligned
    L_id    = mean |E_hat(p) - E(p)|^2                      benign prompts and the anchors a
    L_score = BCE(s, y)                                     y = 1 at the target's tokens
    min  L_map + identity * L_id + score * L_score

Source: Qiu et al., "Safe Text-to-Image Generation: Simply Sanitize the Prompt Embedding",
arXiv:2411.10329. Only its abstract could be read: scores per token, alpha, a residual and training
on target-anchor contexts are the paper's; layers, fusion and losses are a reconstruction, and the
variants that were measured are in docs/sanitizer.md.

Ours, beyond the paper:
- *Reach.* In a causal encoder every token after a harmful one, the padding included, has seen it
  and carries it on, and the denoiser reads them all. So a token's strength is the highest score up
  to it (in T5, which looks both ways, the highest of all): the score names the culprit, the
  strength follows it. `fusion="own"` is each token's own score, padding taking the end mark's.
- *Neighbours.* A concept list is short. With `nearby` > 0 contexts also get words that the original
  encoder puts nearer to a target than to any benign word, or, with a `witness`, that make the model
  paint something unsafe.
- *Scenes.* What a word does beside others, only a picture of both can tell: a `witness` also looks
  at variants of benign prompts, made of harmless words and of words that are unsafe alone, and at
  target contexts with another word in their phrase. Words that say little to a model paint
  something unsafe by chance: only what does so in each of `looks` pictures is unsafe.
- *Reading again.* With `reread` the words whose strength is 1 are taken out of the prompt, and the
  encoders read what is left; only then is E rewritten. What a residual leaves behind, a word that
  was never read cannot. A sentence about nothing is painted as anything: where no subject is left,
  `instead` stands in their place. Subjects are the words that benign prompts say more often than
  unsafe ones do beside what is unsafe in them. Around words that are found, searches put others
  that nobody knows the harm of: where a score is above `strict`, only words stay that benign
  prompts say.
- *Strange contexts.* Whoever searches for prompts writes no sentences: targets also stand behind
  and among random words (`led`, `scattered`), and so do benign texts (`variants`).
- *Every tensor.* Each encoder's token states and each pooled vector has its own network.

The start mark, and a prompt without any token (""), are never scored and stay as they are.
Needs pairs of prompts; no gradients of the model, and no pictures but those of a `witness`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from safelight.errors import BadInput, unknown
from safelight.flow import Card, Condition, Prompt
from safelight.guard.base import name_of
from safelight.guard.explain import POOLED, TokenScores, words_of
from safelight.guard.tokenwise import Network, fused, reached, scored, with_padding
from safelight.guard.trained import TrainedGuard
from safelight.guard.wording import Found, Rereading
from safelight.models.base import TextToImage
from safelight.names import find, table
from safelight.prompts import PromptSet
from safelight.training.augment import Look
from safelight.training.contexts import Batch, Material, by_length, remembered, thinned
from safelight.training.data import TextData, shuffled
from safelight.training.descent import Loss, Watch
from safelight.training.embedding import readable
from safelight.training.looks import paints_unsafe
from safelight.training.pairs import (
    TEMPLATES,
    Pair,
    check_tokens,
    concept_list,
    in_templates,
    of_prompts,
    pair,
    said_in,
    subjects,
)
from safelight.training.wider import (
    Words,
    instead_of,
    led,
    near_ones,
    scattered,
    sorted_words,
    substituted,
    varied,
)

Fusion = Literal["reach", "own"]
Estimate = Literal["residual", "anchor"]
Supervision = Literal["target", "shift", "none"]
SMALL = 512  # encoders narrower than this are toys: wider steps, narrower networks
WORTH_A_LOOK = (0.3, 0.0)  # cosine to a phrase, and its lead over benign words
NARROWEST = 16  # numbers in an attention head; narrower ones cost more and see less


@dataclass(frozen=True, kw_only=True)
class Sanitizer(TrainedGuard):
    """Score every token of a prompt and rewrite the prompt's embedding where it is harmful.

    Args:
        alpha: Strength at use: 0 changes nothing, 1 is as trained, more acts on lower scores too.
        reread: Read the prompt again without the words whose strength is 1, before the rest is
            rewritten.
        strict: With `reread`: where a score is above this, only those words of the prompt stay that
            benign prompts and anchors say; 1 is never.
        instead: With `reread`, words that stand where others were taken out, if that leaves no
            subject in the prompt.
        depth: Transformer layers of each network.
        width: Their width; None is the encoder's own up to 768, half of it for small encoders.
        heads: Attention heads, fewer where each would have less than 16 numbers.
        fusion: A token's strength is its "reach" (the highest score it has seen) or its "own".
        estimate: What is learnt is a "residual", or the "anchor" that is interpolated to.
        supervise: Scores are taught the "target" tokens, the "shift" that a token needs, or "none".
        identity: Weight of leaving benign prompts and anchors alone.
        score: Weight of teaching the scores.
        encoders: Sanitize only what these encoders say; () is all of them.
        concepts: Entries "target > anchor", or CSV files with the columns target and anchor.
        templates: Texts with {} for the concepts.
        contexts: Pairs to learn from, at most.
        witness: Name of a judge. With one, doubtful words are painted once and looked at, and what
            it sees decides, instead of `least` and `lead`, whether a word is a neighbour.
        looks: Pictures of a text, each with other noise, that all have to be unsafe before the
            witness takes it for unsafe. What is unsafe by chance is neither held nor a target.
        scenes: Variants of benign prompts, and of phrases, that the witness looks at. Only those
            that paint nothing unsafe are held; the others are targets, and the prompts that they
            are variants of the anchors.
        again: How often such a target is learnt from per epoch.
        kept: Sentences that are held for each doubtful word which looks harmless.
        least: Cosine to a target from which on a word of the vocabulary may be its neighbour.
        lead: By how much that must be above its cosine to any benign word.
        nearby: Copies of the pairs with a neighbour of the target in its place.
        scattered: Copies of targets, and of their neighbours, among random words.
        led: Copies of the pairs behind one to five random words.
        variants: Copies of benign prompts with random words inside, in front, or nothing but those;
            with a witness `scenes` take their place.
        avoid: Words that none of these may use; the name of a prompt set stands for its words, so
            that what is tested later is not learnt by chance.
        dropout: Share of the inputs that is dropped while learning.
        noise: Size of noise on the inputs while learning, as a share of them.
    """

    card: ClassVar[Card] = Card(
        title="Embedding Sanitizer (reconstruction)",
        source="arXiv:2411.10329",
        summary="scores every token and rewrites the prompt embedding where it is harmful",
        needs=("prompts",),
        claims={
            "FSR, NSFW unlearning, IGMU leaderboard (independent)": 0.951,
            "CSDR, same (independent, lower is better)": 0.118,
            "harmful rate on I2P, SD 1.4, from 38.1 % (independent)": 0.181,
            "harmful rate on I2P, SDXL, from 33.6 % (independent)": 0.335,
        },
    )

    # Nothing about training is public; these were measured on the Emoji World.
    epochs: int = 6
    batch: int = 64
    lr: float | None = None
    patience: int = 0

    alpha: float = 1.0
    reread: bool = False
    strict: float = 1.0
    instead: str = ""
    depth: int = 2
    width: int | None = None
    heads: int = 4
    fusion: Fusion = "reach"
    estimate: Estimate = "residual"
    supervise: Supervision = "target"
    identity: float = 1.0
    score: float = 0.1
    encoders: tuple[str, ...] = ()
    concepts: tuple[str, ...] = ()
    templates: tuple[str, ...] = TEMPLATES
    contexts: int = 1800
    witness: str = ""
    looks: int = 2
    kept: int = 3
    scenes: int = 1200
    again: int = 2
    least: float = 0.5
    lead: float = 0.15
    nearby: float = 0.5
    scattered: float = 1.0
    led: float = 1.0
    variants: float = 1.5
    avoid: tuple[str, ...] = ()
    dropout: float = 0.1
    noise: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = (("fusion", Fusion), ("estimate", Estimate), ("supervise", Supervision))
        for name, kind in choices:
            if getattr(self, name) not in get_args(kind):
                raise BadInput(f"{name}: {unknown('choice', getattr(self, name), get_args(kind))}")
        if self.witness not in ("", *table("judge")):
            raise BadInput(f"witness: {unknown('judge', self.witness, table('judge'))}")
        if not 0 <= self.strict <= 1:
            raise BadInput(f"strict must be between 0 and 1, not {self.strict}.")
        if not self.alpha >= 0:
            raise BadInput(f"alpha must be 0 or more, not {self.alpha}.")
        for name in ("depth", "heads", "contexts", "looks"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} must be at least 1, not {getattr(self, name)}.")
        for name in (
            "dropout",
            "noise",
            "nearby",
            "scattered",
            "led",
            "variants",
            "scenes",
            "again",
            "kept",
            "identity",
            "score",
        ):
            value, most = getattr(self, name), 1.0 if name == "dropout" else math.inf
            if not 0 <= value < most:
                raise BadInput(f"{name} must be 0 or more and below {most:g}, not {value}.")
        for template in self.templates:
            if "{}" not in template:
                raise BadInput(f"the template {template!r} has no {{}} for the concept.")
        # The entries themselves are kept, not the name of a file that may change or go.
        object.__setattr__(self, "concepts", concept_list(self.concepts))

    # What acts

    starts_ = {}  # type: dict[str, int]  # how many marks each encoder puts before a text
    model_ = None  # type: Any
    subjects_ = frozenset()  # type: frozenset[str]
    said_ = frozenset()  # type: frozenset[str]

    def prepare(self, model: TextToImage) -> None:
        super().prepare(model)
        object.__setattr__(self, "model_", model)
        info = self.fitted_.info if self.fitted_ else {}
        object.__setattr__(self, "subjects_", frozenset(info.get("subjects", ())))
        object.__setattr__(self, "said_", frozenset(info.get("said", ())))
        if self.strict < 1 and not self.said_:
            raise BadInput(
                "this sanitizer was trained before there was strict and does not know what benign "
                "prompts say; train it again, or use it with strict=1."
            )

    def network(self, model: TextToImage) -> nn.Module:
        """One sanitizer for every tensor of the chosen encoders that the denoiser reads."""
        object.__setattr__(self, "starts_", _starts(model))
        return nn.ModuleDict({_key(piece): self._one(dim) for piece, dim in self._pieces(model)})

    def _one(self, dim: int) -> Network:
        width = self.width or min(dim if dim >= SMALL else max(dim // 2, 8), 768)
        heads = max(1, min(self.heads, width // NARROWEST))
        return Network(dim, -(-width // heads) * heads, self.depth, heads, self.estimate)

    def _pieces(self, model: TextToImage) -> list[tuple[str, int]]:
        """Each tensor's name and width: `<encoder>` for states, `<encoder>.pooled`."""
        found = []
        for encoder in self.reads(model):
            span = model.layout[encoder]
            if span.tokens.stop > span.tokens.start:
                found.append((encoder, span.dims.stop - span.dims.start))
            if span.pooled is not None:
                found.append((f"{encoder}.pooled", span.pooled.stop - span.pooled.start))
        return found

    def reads(self, model: TextToImage) -> tuple[str, ...]:
        """The chosen encoders."""
        for name in self.encoders:
            if name not in model.text_encoders:
                raise BadInput(unknown("text encoder", name, model.text_encoders))
        return tuple(self.encoders or model.text_encoders)

    def edit_condition(self, condition: Condition) -> Condition:
        """E_hat in place of E, for the states and pooled vectors of the chosen encoders."""
        if self.alpha == 0:
            return condition
        if self.reread:
            condition = self._read_again(condition)

        def states(encoder: str, E: Tensor) -> Tensor:
            return self._sanitized(encoder, E, condition.masks[encoder])

        def pooled(encoder: str, e: Tensor) -> Tensor:
            return self._sanitized(f"{encoder}.pooled", e[:, None], condition.masks[encoder])[:, 0]

        return condition.edit(states, pooled)

    def _read_again(self, condition: Condition) -> Condition:
        """The prompts read without the words whose strength is 1, until none is left of these."""
        if condition.written is None:
            raise BadInput(
                "sanitizer with reread encodes prompts again, which would undo the guards before "
                "it; name it before guards that edit the text states."
            )
        again = Rereading(self.model_, self.starts_, self.instead, self.subjects_, self.said_)
        return again.read(condition, self._strong)

    @torch.no_grad()
    def _strong(self, condition: Condition) -> dict[int, Found]:
        """By row the tokens whose own strength is 1, and whether a score is above `strict`."""
        places: dict[int, dict[str, list[int]]] = {}
        sure = set()
        for encoder in condition.encoders:
            if _key(encoder) not in self.network_:
                continue
            s, _ = self._seen(encoder, condition.stream(encoder), condition.masks[encoder])
            sure |= set((s > self.strict).any(1).nonzero().flatten().tolist())
            for i, place in (self.alpha * s >= 1).nonzero().tolist():
                places.setdefault(i, {}).setdefault(encoder, []).append(place)
        return {i: Found(found, i in sure) for i, found in places.items()}

    def _sanitized(self, piece: str, E: Tensor, mask: Tensor) -> Tensor:
        if _key(piece) not in self.network_:
            return E
        s, D = self._seen(piece, E, mask)
        return fused(E, self._strength(piece, s, mask, self.alpha), D)

    def _seen(self, piece: str, E: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """s and D of one tensor."""
        start = self.starts_[piece.partition(".")[0]]
        return self.network_[_key(piece)](E.float(), scored(mask, start, E.shape[1]))

    def _strength(self, piece: str, s: Tensor, mask: Tensor, alpha: float) -> Tensor:
        """g = min(1, alpha * reach(s))."""
        if piece.endswith(".pooled"):
            reach = s
        elif self.fusion == "own":
            reach = with_padding(s, mask)
        else:
            reach = reached(s, mask, causal=piece.startswith("clip"))
        return (alpha * reach).clamp(max=1)

    @torch.no_grad()
    def explain(self, model: TextToImage, condition: Condition) -> list[TokenScores]:
        """The scores that `edit_condition` uses for this condition, token by token."""
        found = []
        for piece, _ in self._pieces(model):
            encoder, _, whole = piece.partition(".")
            E = condition.pooled_stream(encoder) if whole else condition.stream(encoder)
            if E is None:
                continue
            s, _ = self._seen(piece, E[:, None] if whole else E, condition.masks[encoder])
            for prompt, row in zip(condition.prompts, s, strict=True):
                words, start = ((POOLED,), 0) if whole else words_of(model, encoder, prompt)
                scores = row[start : start + len(words)].tolist()
                found.append(TokenScores(prompt, name_of(self), piece, words, tuple(scores)))
        order = {prompt: i for i, prompt in enumerate(condition.prompts)}
        return sorted(found, key=lambda one: order[one.prompt])

    # What it learns from

    def rate(self, model: TextToImage) -> float:
        """1e-4 where encoders have their real width; small ones take larger steps."""
        widest = max(dim for _, dim in self._pieces(model))
        return self.lr or (1e-4 if widest >= SMALL else 1e-3)

    def gather(
        self, model: TextToImage, data: TextData, *, seed: int, watch: Watch | None = None
    ) -> Material:
        """The pairs, what the original encoders say of them, and how their tokens align."""
        rng = torch.Generator().manual_seed(seed)
        encoders = self.reads(model)
        given = (*of_prompts(data.unsafe_prompts), *in_templates(self.concepts, self.templates))
        check_tokens(model, given, encoders)
        pairs, held = _parts("unsafe", given, self.contexts, data.validation, rng)
        safe, safe_held = _parts(
            "safe", [p.text for p in data.safe_prompts], self.contexts, data.validation, rng
        )
        look = self._look(model, watch)
        words = self._words(model, pairs, safe, look, rng)
        made = self._made_up(pairs, words, rng)
        variants, bad = self._variants(pairs, safe, words, look, rng)
        more = _read_whole(model, encoders, (*made, *self.again * bad))
        alone = instead_of(pairs, self.kept * words.kept, rng)
        whole = readable(model, [*variants, *alone], encoders)
        held_still = [text for text in (*variants, *alone) if text in whole]
        with torch.autocast(model.device.type, torch.bfloat16, enabled=self.autocast):
            return remembered(
                model,
                encoders,
                (*pairs, *more),
                held,
                ("", *safe, *held_still),
                safe_held,
                nearby=words.unsafe,
                spoken_of=subjects(pairs, safe),
                said=said_in([*safe, *(one.anchor for one in pairs)]),
                hashes=data.hashes(),
            )

    def _words(
        self,
        model: TextToImage,
        pairs: Sequence[Pair],
        safe: Sequence[str],
        look: Look | None,
        rng: torch.Generator,
    ) -> Words:
        """The vocabulary, sorted by what it is like."""
        if not (look or self.nearby or self.scattered or self.led or self.variants):
            return Words({}, ())
        benign = [Prompt(id=str(i), text=text) for i, text in enumerate(safe)]
        return sorted_words(
            model,
            self.reads(model)[0],
            _prompts(pairs),
            benign,
            _avoided(self.avoid),
            rng,
            least=self.least,
            lead=self.lead,
            look=None if look is None else lambda words: look([f"a {word}" for word in words]),
            doubt=WORTH_A_LOOK,
        )

    def _variants(
        self,
        pairs: Sequence[Pair],
        safe: Sequence[str],
        words: Words,
        look: Look | None,
        rng: torch.Generator,
    ) -> tuple[list[str], tuple[Pair, ...]]:
        """Variants of benign prompts, and those that a witness finds unsafe with their prompts.

        What a word is like alone does not say what it does beside others: a quarter of the variants
        that a witness looks at are made of words that are unsafe alone, and half are target
        contexts with a word of their phrase exchanged for one like it.
        """
        if look is None:
            return [new for _, new in varied(safe, words.harmless, self.variants, rng)], ()
        share = self.scenes / len(safe) / 4
        made = [
            *varied(safe, words.harmless, share, rng),
            *varied(safe, words.unsafe, share, rng),
            *substituted(pairs, words.akin, round(self.scenes / 2), rng),
        ]
        flags = look([new for _, new in made])
        harmless = [new for (_, new), flag in zip(made, flags, strict=True) if flag is False]
        bad = [pair(new, old) for (old, new), flag in zip(made, flags, strict=True) if flag]
        return harmless, tuple(bad)

    def _look(self, model: TextToImage, watch: Watch | None) -> Look | None:
        if not self.witness:
            return None
        judge = find("judge", self.witness)()
        judge.require()
        return lambda texts: paints_unsafe(model, texts, judge, looks=self.looks, watch=watch)

    def _made_up(
        self, pairs: Sequence[Pair], words: Words, rng: torch.Generator
    ) -> tuple[Pair, ...]:
        """More pairs than anybody wrote."""
        unsafe = _prompts(pairs)
        made = [
            *near_ones(unsafe, words, self.nearby, rng),
            *scattered(unsafe, words, self.scattered, rng),
            *led(unsafe, words, self.led, rng),
        ]
        return of_prompts(made)

    def steps(self, material: Material) -> int:
        """An epoch reads every pair once."""
        return -(-material.learnt // (self.batch // 2))

    def batches(self, material: Material, epoch: int, rng: torch.Generator) -> Iterator[Batch]:
        """Half target contexts with their anchors, half benign prompts."""
        half, steps = self.batch // 2, self.steps(material)
        rows = shuffled(range(material.learnt), half * steps, rng)
        benign = shuffled(material.benign, half * steps, rng)
        size, pairs = material.sizes(), material.pairs
        rows = by_length(rows, lambda i: max(size[pairs[i].target], size[pairs[i].anchor]), half)
        benign = by_length(benign, lambda text: size[text], half)
        order = torch.randperm(steps, generator=rng).tolist()
        for i in order:
            part = slice(i * half, (i + 1) * half)
            yield Batch(torch.tensor(rows[part]), tuple(benign[part]), material)

    def loss(self, model: TextToImage, batch: Batch, rng: torch.Generator) -> Loss:
        """L_map + identity * L_id + score * L_score."""
        terms = self._terms(batch, rng)
        total = terms["L_map"] + self.identity * terms["L_id"]
        if self.supervise != "none":
            total = total + self.score * terms["L_score"]
        return Loss(total, {name: terms[name].item() for name in ("L_map", "L_id", "L_score")})

    def _terms(self, batch: Batch, rng: torch.Generator | None = None) -> dict[str, Tensor]:
        """The loss terms, and the share of texts whose highest score is above a half."""
        each = [self._on(piece, batch, rng) for piece in batch.material.tau.pieces]
        return {name: torch.stack([one[name] for one in each]).mean() for name in each[0]}

    def _on(self, piece: str, batch: Batch, rng: torch.Generator | None) -> dict[str, Tensor]:
        """The terms of one tensor; with `rng` the network sees it through dropout and noise."""
        m, n = batch.material, len(batch.rows)
        pairs = [m.pairs[i] for i in batch.rows.tolist()]
        said = [*(p.target for p in pairs), *(p.anchor for p in pairs), *batch.benign]
        encoder, _, whole = piece.partition(".")
        E, mask = m.tau(said)[piece].states, m.mask(encoder, said)
        beside = m.beside[encoder][batch.rows].to(E.device)
        goal = torch.cat([_placed(E[n : 2 * n], beside.goal, bool(whole)), E[n:]])
        target, counts = beside.target, E.new_ones(1)
        if not whole:  # most of a text is padding, and a few places of it say what all say
            places, counts = thinned(mask, rng)
            E, goal, mask, target = (x[:, places] for x in (E, goal, mask, target))
        x = E if rng is None else _disturbed(E, self.dropout, self.noise, rng)
        s, D = self._seen(piece, x, mask)
        E_hat = fused(E, self._strength(piece, s, mask, 1.0), D)
        apart = (E_hat - goal).square().sum(-1) @ counts / counts.sum() / m.scale[piece]
        own = scored(mask, self.starts_[encoder], E.shape[1])
        y, counted = self._labels(E[:n], goal[:n], target, own, bool(whole))
        top = s.amax(1)
        return {
            "L_map": apart[:n].mean(),
            "L_id": apart[n:].mean(),
            "L_score": F.binary_cross_entropy(s[counted], y[counted]),
            "found": (top[:n] > 0.5).float().mean(),
            "false": (top[n:] > 0.5).float().mean(),
            "margin": top[:n].mean() - top[n:].mean(),
        }

    def _labels(
        self, E: Tensor, goal: Tensor, target: Tensor, own: Tensor, whole: bool
    ) -> tuple[Tensor, Tensor]:
        """y, and where it is known; the first rows are the target contexts, the others benign."""
        y, counted = own.new_zeros(own.shape, dtype=E.dtype), own.clone()
        n = len(E)
        if whole:
            y[:n] = 1
        elif self.supervise == "shift":
            need = torch.linalg.vector_norm(goal - E, dim=-1) * own[:n]
            y[:n] = need / need.amax(1, keepdim=True).clamp(min=1e-6)
        else:
            y[:n] = target.to(y)
            last = own[:n].long().cumsum(1).argmax(1)  # the end mark may speak for all the text
            counted[torch.arange(n, device=last.device), last] = False
        return y, counted

    @torch.no_grad()
    def check(self, model: TextToImage, material: Material) -> dict[str, float]:
        """Held-out figures: the loss terms, and how many texts have a score above a half.

        `found` is the share of target contexts, `false` that of anchors and benign prompts.
        """
        parts = [self._terms(batch) for batch in material.held_out(self.batch)]
        figures = {name: torch.stack([p[name] for p in parts]).mean().item() for name in parts[0]}
        return {"objective": figures["L_map"] + self.identity * figures["L_id"], **figures}

    def info(self, material: Material) -> dict[str, Any]:
        """What the weights were learnt from, and which tensors they cover."""
        return {
            "data": material.hashes,
            "pairs": material.learnt,
            "benign": len(material.benign),
            "held_out": len(material.pairs) - material.learnt,
            "nearby_words": list(material.nearby),
            "subjects": list(material.spoken_of),
            "said": list(material.said),
            "tensors": list(material.tau.pieces),
            "scale": material.scale,
        }


# Small things


def _key(piece: str) -> str:
    """A tensor's name as torch allows it for a module."""
    return piece.replace(".", "_")


def _avoided(entries: Sequence[str]) -> tuple[str, ...]:
    """Words as they are, prompt sets and files as the words in them."""
    found = []
    for entry in entries:
        is_set = entry in table("prompts") or Path(entry).suffix in (".csv", ".jsonl", ".parquet")
        texts = PromptSet.load(entry).texts if is_set else (entry,)
        found += [word for text in texts for word in re.findall("[a-z]{3,}", text.lower())]
    return tuple(dict.fromkeys(found))


def _starts(model: TextToImage) -> dict[str, int]:
    """How many marks an encoder's tokenizer puts before a text: one in CLIP, none in T5."""
    return {name: len(tok("").input_ids) - 1 for name, tok in model.tokenizers.items()}


def _parts(
    side: str, items: Sequence[Any], most: int, share: float, rng: torch.Generator
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """At most `most` items to learn from, and a share of as many to check with."""
    if len(items) < 2:
        raise BadInput(
            f"the {side} side has {len(items)} text(s); training needs at least two, one to learn "
            "from and one to check with."
        )
    order = torch.randperm(len(items), generator=rng)[: most + max(1, round(share * most))].tolist()
    held = max(1, round(share * len(order)))
    return tuple(items[i] for i in order[held:]), tuple(items[i] for i in order[:held])


def _read_whole(
    model: TextToImage, encoders: Sequence[str], pairs: Sequence[Pair]
) -> tuple[Pair, ...]:
    """The pairs of which nothing is cut off; nobody wrote them, so that none is missed."""
    whole = readable(model, (text for p in pairs for text in (p.target, p.anchor)), encoders)
    return tuple(p for p in pairs if {p.target, p.anchor} <= whole)


def _prompts(pairs: Sequence[Pair]) -> list[Prompt]:
    return [Prompt(id=str(i), text=p.target, safe_prompt=p.anchor) for i, p in enumerate(pairs)]


def _placed(E: Tensor, goal: Int[Tensor, "batch token"], whole: bool) -> Tensor:
    """The anchor's states in the places of the target's tokens."""
    return E if whole else E.gather(1, goal[..., None].expand(*goal.shape, E.shape[-1]))


def _disturbed(E: Tensor, dropout: float, noise: float, rng: torch.Generator) -> Tensor:
    """E with numbers dropped and noise added, from the run's own generator."""
    size = E.square().mean(-1, keepdim=True).sqrt()
    if noise:
        E = E + noise * size * torch.randn(E.shape, generator=rng).to(E)
    if dropout:
        E = E * (torch.rand(E.shape, generator=rng) >= dropout).to(E) / (1 - dropout)
    return E
