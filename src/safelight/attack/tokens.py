"""Searching for words: what attacks on discrete tokens share.

A search moves embeddings or distributions over words; a model reads tokens. In between lie the
vocabulary (which tokens may be used), a frame (a prompt with free places among its tokens), the
ways back to words (nearest neighbours, a projection to the simplex, one-hot samples), and `told`,
which lets the model read embeddings so that gradients reach them.

Only whole words are searched, i.e. tokens that a text holds by themselves: a prompt made of pieces
of words has another tokenisation than the one that was searched. Words that name minors are out.
Families with several encoders are searched in the vocabulary of the first that tells the denoiser
about tokens, for all encoders that share it (both CLIPs of SDXL and SD3, T5 of FLUX); the others
read the words that were found so far, without gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from safelight.attack.base import survives
from safelight.errors import BadInput
from safelight.flow import Condition, Prompt
from safelight.models.base import TextToImage
from safelight.models.soft import PLACEHOLDER
from safelight.prompts.minors import names_a_minor_in_harm


@dataclass(frozen=True)
class Vocabulary:
    """The words that a search may use.

    Args:
        encoders: Those that are searched; they share one tokenizer's vocabulary.
        others: Those that read the found words.
        tokenizer: Of the searched encoders.
        words: The words, in the order of their ids.
        ids: The token of each word.
        window: Tokens that the searched encoders read besides their start and end marks.
    """

    encoders: tuple[str, ...]
    others: tuple[str, ...]
    tokenizer: Any
    words: tuple[str, ...]
    ids: Int[Tensor, " word"]
    window: int

    def __len__(self) -> int:
        return len(self.words)

    def table(self, model: TextToImage) -> Float[Tensor, "word dim"]:
        """The words' input embeddings, those of all searched encoders side by side."""
        return self.embeddings(model, self.ids)

    def embeddings(
        self, model: TextToImage, ids: Int[Tensor, " token"]
    ) -> Float[Tensor, "token dim"]:
        """Input embeddings of any tokens, those of all searched encoders side by side."""
        tables = [_table(model, name) for name in self.encoders]
        return torch.cat([table[ids.to(table.device)].float() for table in tables], 1)

    def tokens(self, text: str) -> list[int]:
        """A text's tokens without marks."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def vocabulary(model: TextToImage) -> Vocabulary:
    """The words that a text can hold, by themselves, for every encoder of a model."""
    lead = next(name for name, span in model.layout.items() if span.tokens.stop)
    tokenizer = model.tokenizers[lead]
    known = tokenizer.get_vocab()
    encoders = tuple(name for name, other in model.tokenizers.items() if other.get_vocab() == known)
    others = tuple(name for name in model.text_encoders if name not in encoders)
    ids = sorted(set(known.values()) - set(tokenizer.all_special_ids))
    words = [word.strip() for word in _decoded(tokenizer, [[i] for i in ids])]
    good = [bool(word) and _plain(word) and not _age(word) for word in words]
    for word, found, i in zip(words, _encoded(tokenizer, words), range(len(words)), strict=True):
        good[i] = good[i] and found == [ids[i]] and PLACEHOLDER not in word
    for other in (model.tokenizers[name] for name in others):
        there = _encoded(other, words)
        again = _encoded(other, _decoded(other, there))
        good = [g and a == b for g, a, b in zip(good, there, again, strict=True)]
    kept = [i for i, g in enumerate(good) if g]
    marks = len(tokenizer("").input_ids)
    return Vocabulary(
        encoders=encoders,
        others=others,
        tokenizer=tokenizer,
        words=tuple(words[i] for i in kept),
        ids=torch.tensor([ids[i] for i in kept], device=model.device),
        window=min(model.tokens[name] for name in encoders) - marks,
    )


@dataclass(frozen=True)
class Frame:
    """A prompt with free places among its words.

    Args:
        words: The prompt's own words.
        tokens: The tokens of each.
        slots: For each free place the word it stands before, ascending; `len(words)` is the end.
    """

    words: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    slots: tuple[int, ...]

    @property
    def order(self) -> list[int]:
        """The tokens in their order, -1 for a free place."""
        found: list[int] = []
        for i in range(len(self.words) + 1):
            found += [-1] * self.slots.count(i)
            found += self.tokens[i] if i < len(self.words) else ()
        return found

    def text(self, free: Sequence[str]) -> str:
        """The prompt with words in its free places."""
        rest, found = list(free), []
        for i in range(len(self.words) + 1):
            n = self.slots.count(i)
            found += rest[:n]
            rest = rest[n:]
            found += self.words[i : i + 1]
        return " ".join(found)

    def rows(
        self, model: TextToImage, words: Vocabulary, free: Float[Tensor, "slot dim"]
    ) -> Float[Tensor, "token dim"]:
        """Every token's embedding, with given ones in the free places; differentiable in them."""
        order = torch.tensor(self.order, device=free.device)
        own = words.embeddings(model, order.clamp(min=0)).to(free)
        return own.index_put(((order < 0).nonzero().flatten(),), free)


def frame(words: Vocabulary, text: str, before: Sequence[int]) -> Frame:
    """A prompt with a free place before some of its tokens.

    A place inside a word moves to the next word's start, so that the text can be written.

    Args:
        words: The vocabulary.
        text: The prompt.
        before: For each place the index of the token it stands before, ascending.

    Raises:
        BadInput: The prompt and its free places are longer than the encoder reads.
    """
    own = tuple(text.split())
    tokens = tuple(tuple(words.tokens(word)) for word in own)
    whole = tuple(words.tokens(text))
    if sum(tokens, ()) != whole:  # a tokenizer that does not keep to spaces
        own, tokens = ((text,), (whole,)) if whole else ((), ())
    if len(whole) + len(before) > words.window:
        raise BadInput(
            f"{len(before)} free tokens do not fit: the prompt has {len(whole)} tokens and "
            f"{words.encoders[0]} reads {words.window}: {text[:60]!r}."
        )
    starts = [sum(map(len, tokens[:i])) for i in range(len(own) + 1)]
    slots = [next(i for i, start in enumerate(starts) if start >= place) for place in before]
    return Frame(own, tokens, tuple(slots))


def told(
    model: TextToImage,
    words: Vocabulary,
    rows: Sequence[Float[Tensor, "_ dim"]],
    texts: Sequence[str],
) -> Condition:
    """What the denoiser reads of prompts given by their tokens' embeddings; differentiable in them.

    Args:
        model: The model.
        words: The vocabulary.
        rows: Per prompt the embeddings of all its tokens.
        texts: The same prompts in words, for encoders that are not searched.
    """
    widths = [_table(model, name).shape[1] for name in words.encoders]
    soft = [dict(zip(words.encoders, row.split(widths, 1), strict=True)) for row in rows]
    for name in words.others:
        for one, text in zip(soft, texts, strict=True):
            one[name] = _said(model, name, text)
    seen = model.encode([PLACEHOLDER] * len(rows), soft=soft)
    return replace(seen, prompts=tuple(texts))


def may_send(model: TextToImage, prompt: Prompt, text: str) -> bool:
    """Whether a found text may be painted: it arrives as it is, and concerns no minors."""
    return not names_a_minor_in_harm(text, prompt.category) and survives(model, text)


def nearest(
    points: Float[Tensor, "*some dim"], table: Float[Tensor, "word dim"]
) -> Int[Tensor, "*some"]:
    """The row of the table with the largest cosine to each point."""
    return (F.normalize(points, dim=-1) @ F.normalize(table, dim=-1).T).argmax(-1)


def simplex(x: Float[Tensor, "*some word"]) -> Float[Tensor, "*some word"]:
    """The nearest distribution to each row: `p = max(x - s, 0)` with `s` such that p sums to 1.

    With u the sorted x, s = (u_1 + .. + u_r - 1) / r for the largest r where u_r > s. The authors
    bisect on s; sorting is exact, and ten times as fast on a vocabulary of CLIP's size.
    """
    x = x.double()
    u = x.sort(-1, descending=True).values
    s = (u.cumsum(-1) - 1) / torch.arange(1, u.shape[-1] + 1, device=u.device)
    r = (u > s).sum(-1, keepdim=True)
    return (x - s.gather(-1, r - 1)).clamp(min=0).float()


class _Sampled(torch.autograd.Function):
    """One word drawn from each distribution; the gradient passes, clamped to [-1, 1]."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, rng: torch.Generator) -> Tensor:  # type: ignore[override]
        flat = p.detach().flatten(0, -2).cpu()
        drawn = torch.multinomial(flat, 1, generator=rng).view(p.shape[:-1]).to(p.device)
        return F.one_hot(drawn, p.shape[-1]).to(p)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient.clamp(-1, 1), None


def sampled(p: Float[Tensor, "*some word"], rng: torch.Generator) -> Float[Tensor, "*some word"]:
    """One-hot words drawn from distributions, with the straight-through gradient in [-1, 1]."""
    return _Sampled.apply(p, rng)  # type: ignore[no-untyped-call]


def spelled(words: Vocabulary, picks: Int[Tensor, " slot"]) -> list[str]:
    """Words by their places in the vocabulary."""
    return [words.words[i] for i in picks.tolist()]


def _said(model: TextToImage, encoder: str, text: str) -> Float[Tensor, "token dim"]:
    """The input embeddings of a text's tokens without marks, as many as the encoder reads."""
    tokenizer = model.tokenizers[encoder]
    room = model.tokens[encoder] - len(tokenizer("").input_ids)
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:room]
    table = _table(model, encoder)
    return table[torch.tensor(ids, device=table.device)]


def _table(model: TextToImage, encoder: str) -> Tensor:
    return model.text_encoders[encoder].get_input_embeddings().weight


def _plain(word: str) -> bool:
    """Whether a word can be seen and holds no space."""
    return word.isprintable() and not any(map(str.isspace, word))


def _age(word: str) -> bool:
    """Whether a word would name a minor in a harmful prompt."""
    return names_a_minor_in_harm(word, "violence")


def _decoded(tokenizer: Any, ids: Sequence[Sequence[int]]) -> list[str]:
    return tokenizer.batch_decode(
        [list(one) for one in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def _encoded(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    found: Mapping[str, Any] = tokenizer(list(texts), add_special_tokens=False, verbose=False)
    return [list(ids) for ids in found["input_ids"]]
