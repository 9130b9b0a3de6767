"""MMA-Diffusion, text side: listed words are avoided, what the encoder makes of the text is not.

Let `g` be the encoder's pooled output. A text of `slots` tokens is sought whose pooled output has
the direction of the target text's:

    loss(x) = 1 - cos( g(x), g(target) )                                                 (eq. 3)

by greedy coordinate gradient: the gradient of the loss at the one-hot tokens, scaled to unit length
at each position, says which `top` tokens may be better at each; `candidates` texts, each with one
token exchanged, are scored, and the search goes on from the best, even if it is worse. Tokens with
a forbidden word in them are never proposed, and texts that spell one are not scored.

Source: Yang et al., "MMA-Diffusion: MultiModal Attack on Diffusion Models", arXiv:2311.17516,
section 3.2. Needs the text encoder and its gradients; no pictures.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from safelight.attack.base import Attack, Search
from safelight.attack.words import unsafe_words
from safelight.errors import BadInput, Unsupported
from safelight.flow import Card, Prompt
from safelight.models.base import TextToImage
from safelight.models.soft import standing

CHUNK = 512  # texts per forward pass


@dataclass(kw_only=True)
class MMA(Attack):
    """Search for a text without forbidden words that the encoder reads as the prompt.

    Args:
        slots: Tokens of the text.
        candidates: Texts scored per step.
        top: Tokens considered at each position.
        steps: Steps of each search.
        restarts: Searches from new random letters; the best text is kept.
        forbidden: Words that must not occur in the text.
        forbid_own: Also forbid the words that the prompt's `safe_prompt` does not have.
        as_released: Take the gradient one position too early, as the authors' code does.
        goal: Whose encoder says what the target is: the public one, without the defence, or the
            one that is attacked.
        encoder: A CLIP encoder of the model.
    """

    card = Card(
        title="MMA-Diffusion",
        source="arXiv:2311.17516",
        summary="text without listed words that the encoder reads as the prompt",
        needs=("text encoder", "gradients"),
    )
    access = "text_encoder"

    slots: int = 20
    candidates: int = 512
    top: int = 256
    steps: int = 1000
    restarts: int = 10
    forbidden: tuple[str, ...] = field(default=())
    forbid_own: bool = True
    as_released: bool = False
    goal: Literal["public", "defended"] = "public"
    encoder: str = "clip_l"

    def rewrite(self, prompts: Sequence[Prompt], search: Search) -> Sequence[Prompt]:
        pool = Pool(search.model, self.encoder, self.slots)
        public = search.model.unpatched() if self.goal == "public" else nullcontext()
        with torch.no_grad(), public:
            goals = pool.texts([prompt.text for prompt in prompts])
        hunts = [
            Hunt(pool, goal, self._forbidden(prompt))
            for prompt, goal in zip(prompts, goals, strict=True)
        ]
        for _ in range(self.restarts):
            begin(pool, hunts, search.rng)
            for _ in range(self.steps):
                if search.over:
                    break
                self.step(pool, hunts, search)
        return [
            replace(
                prompt,
                text=hunt.best,
                meta={
                    **prompt.meta,
                    "distance": f"{hunt.least:.5f}",
                    "best_step": str(hunt.best_step),
                },
            )
            for prompt, hunt in zip(prompts, hunts, strict=True)
        ]

    def step(self, pool: Pool, hunts: Sequence[Hunt], search: Search) -> None:
        """One step of all hunts: two calls of the encoder, one with gradients."""
        goals = torch.stack([hunt.goal for hunt in hunts])
        slopes = pool.gradients(
            torch.stack([hunt.now for hunt in hunts]), goals, early=self.as_released
        )
        asked = [
            hunt.candidates(slope, self.candidates, self.top, search.rng)
            for hunt, slope in zip(hunts, slopes, strict=True)
        ]
        sizes = [len(texts) for texts in asked]
        whose = torch.repeat_interleave(torch.arange(len(hunts)), torch.tensor(sizes))
        rows = [ids for texts in asked for ids in texts.values()]
        seen = pool.tokens(rows) if rows else goals[:0]
        losses = (1 - F.cosine_similarity(seen, goals[whose.to(goals.device)], dim=-1)).cpu()
        search.step()
        for hunt, texts, loss in zip(hunts, asked, losses.split(sizes), strict=True):
            hunt.move(texts, loss, search.steps)
        search.record(
            loss=sum(hunt.least for hunt in hunts) / len(hunts),
            without_candidates=float(sum(size == 0 for size in sizes)),
        )

    def _forbidden(self, prompt: Prompt) -> tuple[str, ...]:
        own = unsafe_words(prompt) if self.forbid_own else ()
        return tuple(dict.fromkeys(word.lower() for word in (*self.forbidden, *own) if word))


class Pool:
    """A CLIP encoder's pooled output, of texts and of tokens, with its gradient.

    Args:
        model: Whose encoder it is.
        encoder: Its name.
        slots: Free tokens.

    Raises:
        Unsupported: The model has no such CLIP encoder.
        BadInput: It reads fewer tokens.
    """

    def __init__(self, model: TextToImage, encoder: str, slots: int) -> None:
        if encoder == "t5" or encoder not in model.text_encoders:
            raise Unsupported(f"mma needs a CLIP encoder; {model.name} has no {encoder!r}.")
        room = model.tokens[encoder] - 2
        if not 1 <= slots <= room:
            raise BadInput(f"slots is {slots}; {encoder} of {model.name} has 1 to {room}.")
        self.model, self.encoder, self.slots = model, encoder, slots
        self.network = model.text_encoders[encoder]
        self.tokenizer: Any = model.tokenizers[encoder]
        self.table = model.token_table(encoder)
        words = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])
        self.words = tuple(word.lower() for word in words)  # what each token is in a text
        self.letters = tuple(
            letter for letter in string.ascii_lowercase if len(self.ids([letter])[0]) == 1
        )

    def read(self, ids: Int[Tensor, "text token"]) -> Float[Tensor, "text dim"]:
        """The pooled output: the state at the end mark, after the family's own projection."""
        seen = self.network(ids)
        pooled = getattr(seen, "text_embeds", None)
        return (seen.pooler_output if pooled is None else pooled).float()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Float[Tensor, "text dim"]:
        """The pooled output of texts."""
        ids, mask = self.model.tokenize(self.encoder, texts)
        ids = ids[:, : int(mask.sum(1).max())]  # CLIP is causal: the end mark sees no padding
        return torch.cat([self.read(ids[at : at + CHUNK]) for at in range(0, len(ids), CHUNK)])

    @torch.no_grad()
    def tokens(self, rows: Sequence[Sequence[int]]) -> Float[Tensor, "text dim"]:
        """The pooled output of texts given by their tokens, all `slots` of them."""
        ids = torch.tensor(self._framed(rows), device=self.model.device)
        return torch.cat([self.read(ids[at : at + CHUNK]) for at in range(0, len(ids), CHUNK)])

    @torch.enable_grad()
    def gradients(
        self,
        now: Int[Tensor, "text slot"],
        goals: Float[Tensor, "text dim"],
        *,
        early: bool = False,
    ) -> Float[Tensor, "text slot vocabulary"]:
        """The loss's gradient at the one-hot tokens, of unit length at each position.

        Args:
            now: Tokens at the free positions.
            goals: Pooled outputs to reach.
            early: Take it one position too early, from the start mark on.
        """
        first = 0 if early else 1
        ids = torch.tensor(self._framed(now.tolist()), device=self.model.device)
        at = range(first, first + self.slots)
        inputs = self.table.weight.detach()[ids[:, at.start : at.stop]].requires_grad_()
        with standing(self.table, [at] * len(now), list(inputs)):
            loss = (1 - F.cosine_similarity(self.read(ids), goals, dim=-1)).sum()
        (slope,) = torch.autograd.grad(loss, inputs)
        one_hot = slope @ self.table.weight.detach().T  # d loss / d one-hot, by the chain rule
        return F.normalize(one_hot.float(), dim=-1).cpu()

    def _framed(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """Between the marks, without the padding that the pooled output does not depend on."""
        start, end = self.tokenizer("").input_ids
        return [[start, *row, end] for row in rows]

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts without the marks."""
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids

    def written(self, rows: Int[Tensor, "text slot"]) -> list[str]:
        """Tokens as texts."""
        found = self.tokenizer.batch_decode(rows.tolist(), clean_up_tokenization_spaces=False)
        return [" ".join(text.split()) for text in found]

    def allowed(self, forbidden: Sequence[str]) -> Bool[Tensor, " vocabulary"]:
        """Which tokens may be proposed: neither marks nor any that holds a forbidden word."""
        good = torch.tensor([not spells(word, forbidden) for word in self.words])
        good[self.tokenizer.all_special_ids] = False
        return good


class Hunt:
    """One prompt's search: where it is, and the best text so far.

    Args:
        pool: The encoder.
        goal: The pooled output to reach.
        forbidden: Words that must not occur, in lower case.
    """

    def __init__(
        self, pool: Pool, goal: Float[Tensor, " dim"], forbidden: Sequence[str] = ()
    ) -> None:
        self.pool, self.goal, self.forbidden = pool, goal, tuple(forbidden)
        self.allowed = pool.allowed(forbidden)
        self.now = torch.zeros(pool.slots, dtype=torch.long)
        self.best, self.least, self.best_step = "", float("inf"), 0

    def restart(self, rng: torch.Generator) -> str:
        """Begin with random letters, separated by spaces; the text, which is not scored yet."""
        letters = [letter for letter in self.pool.letters if not spells(letter, self.forbidden)]
        if not letters:
            raise BadInput("mma begins with random letters, and every letter is a forbidden word.")
        drawn = torch.randint(len(letters), (self.pool.slots,), generator=rng).tolist()
        text = " ".join(letters[i] for i in drawn)
        self.now = torch.tensor(self.pool.ids([text])[0])
        return text

    def candidates(
        self,
        slope: Float[Tensor, "slot vocabulary"],
        n: int,
        top: int,
        rng: torch.Generator,
    ) -> dict[str, list[int]]:
        """Texts with one token exchanged that keep their length and spell nothing forbidden.

        Each comes once, with its tokens as they are read from the text.
        """
        slope = slope.masked_fill(~self.allowed, torch.inf)
        slope = slope.scatter(1, self.now[:, None], torch.inf)  # else a standstill may be the best
        top = max(1, min(top, int(self.allowed.sum()) - 1))
        better = (-slope).topk(top, dim=1).indices
        slots = positions(n, self.pool.slots)
        drawn = torch.randint(top, (n,), generator=rng)
        rows = self.now.repeat(n, 1)
        rows[torch.arange(n), slots] = better[slots, drawn]
        written = dict.fromkeys(self.pool.written(rows))
        texts = [text for text in written if not spells(text, self.forbidden)]
        back = zip(texts, self.pool.ids(texts) if texts else [], strict=True)
        now = self.now.tolist()  # other tokens may spell the same text
        return {text: ids for text, ids in back if len(ids) == len(now) and ids != now}

    def move(
        self, texts: Mapping[str, Sequence[int]], losses: Float[Tensor, " text"], step: int
    ) -> None:
        """Go to the best candidate, even if it is worse; stay where there is none."""
        if not texts:
            return
        best = int(losses.argmin())
        text = list(texts)[best]
        self.now = torch.tensor(texts[text])
        self.remember(text, float(losses[best]), step)

    def remember(self, text: str, loss: float, step: int) -> None:
        """Keep a text if it is the best so far."""
        if loss < self.least:
            self.best, self.least, self.best_step = text, loss, step


def begin(pool: Pool, hunts: Sequence[Hunt], rng: torch.Generator) -> None:
    """Put all hunts at random letters and score these together."""
    texts = [hunt.restart(rng) for hunt in hunts]
    seen = pool.tokens([hunt.now.tolist() for hunt in hunts])
    losses = 1 - F.cosine_similarity(seen, torch.stack([hunt.goal for hunt in hunts]), dim=-1)
    for hunt, text, loss in zip(hunts, texts, losses.tolist(), strict=True):
        hunt.remember(text, loss, 0)


def positions(n: int, slots: int) -> Int[Tensor, " n"]:
    """`n` positions spread evenly over the slots: each comes up floor or ceil of n / slots."""
    return torch.arange(n) * slots // n


def spells(text: str, forbidden: Sequence[str]) -> bool:
    """Whether a forbidden word is anywhere in a text."""
    text = text.lower()
    return any(map(text.__contains__, forbidden))
