"""Ring-A-Bell: words whose text states lie where the prompt's lie plus the concept.

With `f` the text encoder's token states (tokens x dims) and pairs of prompts that differ in the
concept only, the concept is

    c = mean_i [ f(with_i) - f(without_i) ]                                              (eq. 2)

and the goal for a prompt `p` is `t = f(p) + eta c`. A genetic search looks for `length` tokens `x`,
between the start mark and the end mark, with the least

    loss(x) = sum over tokens and dims of (f(x) - t)^2                                   (eq. 3)

In each generation the better half survives; a survivor mates with probability `crossover` and both
children of one random cut are added; then one token of each individual is drawn anew with
probability `mutation`.

Source: Tsai, Hsu et al., "Ring-A-Bell! How Reliable are Concept Removal Methods for Diffusion
Models?", arXiv:2310.10012. Needs the text encoder only: no gradients, no pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from safelight.attack.base import Attack, Search
from safelight.errors import BadInput
from safelight.flow import Card, Prompt
from safelight.models.base import TextToImage
from safelight.names import table
from safelight.prompts import PromptSet

CHUNK = 512  # texts per forward pass
Known = dict[tuple[int, ...], float]  # losses by individual


@dataclass(kw_only=True)
class RingABell(Attack):
    """Search for words that read, to the text encoder, like the prompt plus its concept.

    Args:
        pairs: A prompt set or file whose prompts have a `safe_prompt`; the train set of the
            prompt's own category if "".
        most: Pairs to read at most.
        eta: How much of the concept is added.
        length: Free tokens.
        population: Individuals at the start.
        generations: Rounds of the search.
        crossover: Probability that a survivor mates.
        mutation: Probability that an individual changes in one token.
        elitism: Keep the best individual as it is. The released code does not, and may lose it.
        by_text: Return, of the last generation, what is best after its tokens were written as text
            and read again, instead of what was best as tokens. Only text is sent to a target.
        goal: Whose encoder says what the prompt and the concept are: the public one, without the
            defence, or the one that is attacked. They differ where a defence changed the encoder.
        encoder: Which text encoder is searched; the first with token states if "".
    """

    card = Card(
        title="Ring-A-Bell",
        source="arXiv:2310.10012",
        summary="genetic search for words that read like the prompt plus the concept",
        needs=("prompt pairs", "text encoder"),
    )
    access = "text_encoder"

    pairs: str = ""
    most: int = 250
    eta: float = 3.0
    length: int = 16
    population: int = 200
    generations: int = 3000
    crossover: float = 0.5
    mutation: float = 0.25
    elitism: bool = True
    by_text: bool = True
    goal: Literal["public", "defended"] = "public"
    encoder: str = ""

    @torch.no_grad()
    def rewrite(self, prompts: Sequence[Prompt], search: Search) -> Sequence[Prompt]:
        model = search.model
        encoder = self._encoder(model)
        genes = Genes(model, encoder, self.length)
        concept = {}
        for category in dict.fromkeys(prompt.category for prompt in prompts):
            with self._seen(model):
                concept[category] = concept_vector(model, encoder, *self._pairs(category))
        with self._seen(model):
            own = states(model, encoder, *model.tokenize(encoder, [p.text for p in prompts]))
        goals = own + self.eta * torch.stack([concept[prompt.category] for prompt in prompts])

        herds = self.search(genes, goals, search)
        return [
            self._best(prompt, genes, herd, goal, model)
            for prompt, herd, goal in zip(prompts, herds, goals, strict=True)
        ]

    def search(
        self, genes: Genes, goals: Float[Tensor, "prompt token dim"], search: Search
    ) -> list[Int[Tensor, "individual length"]]:
        """The last generation for each goal, best first."""
        herds = [genes.random(self.population, search.rng) for _ in goals]
        known: list[Known] = [{} for _ in goals]
        for _ in range(self.generations):
            herds, losses = ranked(genes, herds, goals, known)
            search.record(loss=torch.stack([loss[0] for loss in losses]).mean().item())
            if search.over:
                return herds
            herds = [self._next(genes, herd, search.rng) for herd in herds]
            search.step()
        return ranked(genes, herds, goals, known)[0]

    def _next(
        self, genes: Genes, herd: Int[Tensor, "individual length"], rng: torch.Generator
    ) -> Int[Tensor, "_ length"]:
        """The generation after one that is sorted, best first."""
        survivors = herd[: max(2, len(herd) // 2)]
        young = torch.cat([survivors, mated(survivors, self.crossover, rng)])
        changed = genes.mutated(young, self.mutation, rng)
        if self.elitism:
            changed[0] = herd[0]
        return changed

    def _best(
        self,
        prompt: Prompt,
        genes: Genes,
        herd: Int[Tensor, "individual length"],
        goal: Float[Tensor, "token dim"],
        model: TextToImage,
    ) -> Prompt:
        texts: dict[str, int] = {}  # each once, with its first individual
        for i, text in enumerate(genes.texts(herd if self.by_text else herd[:1])):
            texts.setdefault(text, i)
        read = states(model, genes.encoder, *model.tokenize(genes.encoder, list(texts)))
        distance = (read - goal).square().flatten(1).sum(1)
        best = int(distance.argmin())
        text = list(texts)[best]
        back = model.tokenizers[genes.encoder](text, add_special_tokens=False).input_ids
        ids = herd[texts[text]].tolist()
        meta = {
            "loss": f"{distance[best]:.4f}",
            "token_ids": " ".join(map(str, ids)),
            "same_tokens": "yes" if back == ids else "no",
            "encoder": genes.encoder,
        }
        others = [name for name in model.text_encoders if name != genes.encoder]
        if others:
            meta["transfer_to_encoders"] = " ".join(others)
        return replace(prompt, text=text, meta={**prompt.meta, **meta})

    def _seen(self, model: TextToImage):  # type: ignore[no-untyped-def]
        """The encoder that says what is meant."""
        return model.unpatched() if self.goal == "public" else nullcontext()

    def _encoder(self, model: TextToImage) -> str:
        names = [name for name, span in model.layout.items() if span.tokens.stop]
        if self.encoder and self.encoder not in names:
            raise BadInput(
                f"ring_a_bell searches an encoder with token states; {model.name} has "
                f"{', '.join(names)}, not {self.encoder!r}."
            )
        return self.encoder or names[0]

    def _pairs(self, category: str) -> tuple[list[str], list[str]]:
        """Prompts with the concept, and the same without it."""
        name = self.pairs or f"emoji/{category}/train"
        if not self.pairs and name not in table("prompts"):
            raise BadInput(
                f"ring_a_bell knows no pairs for the category {category!r}; give pairs=FILE with "
                "the columns prompt and safe_prompt."
            )
        both = [(p.text, p.safe_prompt) for p in PromptSet.load(name) if p.safe_prompt]
        if not both:
            raise BadInput(f"no prompt of {name} has a safe_prompt; ring_a_bell needs pairs.")
        first, second = zip(*both[: self.most], strict=True)
        return list(first), list(second)


def concept_vector(
    model: TextToImage, encoder: str, present: Sequence[str], absent: Sequence[str]
) -> Float[Tensor, "token dim"]:
    """The mean difference of the token states of paired prompts."""
    if len(present) != len(absent) or not present:
        raise BadInput(f"{len(present)} prompts with the concept, {len(absent)} without: no pairs.")
    parts = []
    for at in range(0, len(present), CHUNK):
        first, second = (
            states(model, encoder, *model.tokenize(encoder, side[at : at + CHUNK])).double()
            for side in (present, absent)
        )
        parts.append((first - second).sum(0))
    return (torch.stack(parts).sum(0) / len(present)).float()


def states(
    model: TextToImage,
    encoder: str,
    ids: Int[Tensor, "batch token"],
    mask: Int[Tensor, "batch token"],
) -> Float[Tensor, "batch token dim"]:
    """What the denoiser reads of token ids, in float32."""
    read = [
        model.read(encoder, ids[at : at + CHUNK], mask[at : at + CHUNK]).states.float()  # type: ignore[union-attr]
        for at in range(0, len(ids), CHUNK)
    ]
    return torch.cat(read)


class Genes:
    """Free tokens between an encoder's start and end marks.

    Args:
        model: Whose encoder is searched.
        encoder: Its name.
        length: How many tokens are free.

    Raises:
        BadInput: The encoder reads fewer tokens.
    """

    def __init__(self, model: TextToImage, encoder: str, length: int) -> None:
        tokenizer = model.tokenizers[encoder]
        *start, end = tokenizer("").input_ids
        room = model.tokens[encoder] - len(start) - 1
        if not 1 <= length <= room:
            raise BadInput(f"length is {length}; {encoder} of {model.name} has 1 to {room} tokens.")
        self.model, self.encoder, self.length = model, encoder, length
        self.tokenizer = tokenizer
        self.at = slice(len(start), len(start) + length)
        special = set(tokenizer.all_special_ids)
        self.legal = torch.tensor([i for i in range(1, len(tokenizer)) if i not in special])
        padding = [tokenizer.pad_token_id] * (room - length)
        self._frame = torch.tensor([*start, *[0] * length, end, *padding])
        self._mask = torch.tensor([1] * (len(start) + length + 1) + [0] * len(padding))

    def random(self, n: int, rng: torch.Generator) -> Int[Tensor, "_ length"]:
        """`n` random individuals."""
        return self.legal[torch.randint(len(self.legal), (n, self.length), generator=rng)]

    def mutated(
        self, herd: Int[Tensor, "individual length"], rate: float, rng: torch.Generator
    ) -> Int[Tensor, "individual length"]:
        """A copy in which some individuals have one new token."""
        changes = torch.rand(len(herd), generator=rng) < rate
        at = torch.randint(self.length, (len(herd), 1), generator=rng)
        new = self.legal[torch.randint(len(self.legal), (len(herd), 1), generator=rng)]
        return torch.where(changes[:, None], herd.scatter(1, at, new), herd)

    def tokens(
        self, herd: Int[Tensor, "individual length"]
    ) -> tuple[Int[Tensor, "individual token"], Int[Tensor, "individual token"]]:
        """What the encoder is given: ids and mask."""
        ids = self._frame.repeat(len(herd), 1)
        ids[:, self.at] = herd
        mask = self._mask.repeat(len(herd), 1)
        return ids.to(self.model.device), mask.to(self.model.device)

    def texts(self, herd: Int[Tensor, "individual length"]) -> list[str]:
        """Individuals as text."""
        rows = self.tokenizer.batch_decode(herd.tolist(), clean_up_tokenization_spaces=False)
        return [" ".join(row.split()) for row in rows]


def ranked(
    genes: Genes,
    herds: Sequence[Int[Tensor, "_ length"]],
    goals: Float[Tensor, "prompt token dim"],
    known: list[Known] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Every herd sorted by its losses, and these; all herds are scored together.

    Args:
        genes: What individuals are.
        herds: One per goal.
        goals: What they should read like.
        known: Losses of each herd's last generation, which are not computed again; about half of
            a generation has survived. Those of this generation take their place.
    """
    known = [{} for _ in herds] if known is None else known
    rows = [[tuple(one) for one in herd.tolist()] for herd in herds]
    new = [
        [one for one in dict.fromkeys(own) if one not in before]
        for own, before in zip(rows, known, strict=True)
    ]
    whose = torch.tensor([i for i, own in enumerate(new) for _ in own], dtype=torch.long)
    asked = torch.tensor([one for own in new for one in own]).view(-1, genes.length)
    found = iter([loss for part in _losses(genes, asked, goals, whose) for loss in part.tolist()])
    orders = []
    for i, own in enumerate(rows):
        known[i] |= {one: next(found) for one in new[i]}
        known[i] = {one: known[i][one] for one in own}
        orders.append(torch.tensor([known[i][one] for one in own]).sort(stable=True))
    sorted_herds = [herd[order.indices] for herd, order in zip(herds, orders, strict=True)]
    return sorted_herds, [order.values for order in orders]


def _losses(
    genes: Genes, herd: Tensor, goals: Tensor, whose: Tensor
) -> Iterator[Float[Tensor, " _"]]:
    for at in range(0, len(herd), CHUNK):
        ids, mask = genes.tokens(herd[at : at + CHUNK])
        read = states(genes.model, genes.encoder, ids, mask)
        goal = goals[whose[at : at + CHUNK].to(goals.device)]
        yield (read - goal).square().flatten(1).sum(1).cpu()


def mated(
    survivors: Int[Tensor, "individual length"], rate: float, rng: torch.Generator
) -> Int[Tensor, "_ length"]:
    """Both children of every survivor that mates: one random mate, one random cut."""
    n, length = survivors.shape
    first = survivors[torch.rand(n, generator=rng) < rate]
    mate = survivors[torch.randint(n, (len(first),), generator=rng)]
    cut = torch.randint(1, max(length, 2), (len(first), 1), generator=rng)
    head = torch.arange(length) < cut
    return torch.cat([torch.where(head, first, mate), torch.where(head, mate, first)])
