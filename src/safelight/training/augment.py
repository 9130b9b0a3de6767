"""Variants of prompts: words exchanged for random words that the tokenizer knows.

A list of safe prompts is short; what it does not mention is free to drift. Variants mention
everything now and then, without anybody writing prompts. Where it matters which word comes in,
`neighbours` asks the encoder itself what the words of its vocabulary are like.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from safelight.models.base import TextToImage
from safelight.training.embedding import read

AKIN = 40  # words that may stand for a word of a phrase
DOUBT = 0.2  # cosine to an unsafe phrase from which on a word is doubtful
MARKS = ("</w>", "\u2581")  # how byte-pair and sentence-piece vocabularies mark whole words

Look = Callable[[Sequence[str]], Sequence[bool | None]]


def vocabulary(tokenizer: Any) -> list[str]:
    """The whole words of at least three letters that a tokenizer knows, in alphabetical order."""
    found = set()
    for token in tokenizer.get_vocab():
        word = token.removesuffix(MARKS[0]).removeprefix(MARKS[1])
        if word != token and re.fullmatch("[a-z]{3,}", word):
            found.add(word)
    return sorted(found)


def exchanged(
    texts: Sequence[str], words: Sequence[str], rng: torch.Generator
) -> list[tuple[str, str]]:
    """Each text with a variant in which one or two of its words are random ones.

    Args:
        texts: Prompts.
        words: What may be put in; without any there are no variants.
    """
    if not words:
        return []

    def draw(n: int) -> int:
        return int(torch.randint(n, (1,), generator=rng))

    pairs = []
    for text in texts:
        parts = text.split()
        places = [i for i, part in enumerate(parts) if len(part) > 2] or list(range(len(parts)))
        for _ in range(1 + draw(2)):
            parts[places[draw(len(places))]] = words[draw(len(words))]
        pairs.append((text, " ".join(parts)))
    return pairs


def prefixed(
    texts: Sequence[str], words: Sequence[str], rng: torch.Generator, *, most: int = 5
) -> list[tuple[str, str]]:
    """Each text with a variant that has random words in front.

    Args:
        texts: Prompts.
        words: What may be put in front; without any there are no variants.
        most: Words at most; at least one.
    """
    if not words:
        return []
    return [(text, " ".join([*some(words, most, rng), text])) for text in texts]


def strewn(
    texts: Sequence[str], words: Sequence[str], rng: torch.Generator, *, most: int = 12
) -> list[tuple[str, str]]:
    """Each text with a variant of nothing but random words.

    Args:
        texts: Prompts.
        words: What the variants are made of; without any there are none.
        most: Words at most; at least one.
    """
    if not words:
        return []
    return [(text, " ".join(some(words, most, rng))) for text in texts]


def some(words: Sequence[str], most: int, rng: torch.Generator) -> list[str]:
    """One to `most` words, drawn at random."""
    n = 1 + int(torch.randint(most, (1,), generator=rng))
    return [words[i] for i in torch.randint(len(words), (n,), generator=rng).tolist()]


@dataclass(frozen=True)
class Neighbours:
    """Words of a vocabulary, sorted by what an encoder finds them like.

    Args:
        near: For a phrase that is to be removed, the words like it and unlike anything benign.
        far: Words that are more like something benign.
        between: Words of which it is not clear.
        kept: Words that looked doubtful and paint nothing unsafe.
        akin: For a word of a phrase, the words of `far` and `kept` that are most like it.
    """

    near: Mapping[str, tuple[str, ...]]
    far: tuple[str, ...]
    between: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    akin: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@torch.no_grad()
def neighbours(
    model: TextToImage,
    encoder: str,
    phrases: Sequence[str],
    benign: Sequence[str],
    avoid: Sequence[str],
    rng: torch.Generator,
    *,
    limit: int = 5000,
    lead: float = 0.15,
    least: float = 0.5,
    look: Look | None = None,
    doubt: tuple[float, float] = (DOUBT, -DOUBT / 2),
) -> Neighbours:
    """Sort words of the vocabulary by the original encoder's reading of each alone.

    Words are compared by the cosine of their readings, less the vocabulary's mean. A word is near
    when a phrase is at least `least` like it and leads every benign word by `lead`; it is far when
    a benign word leads every phrase. With `look`, pictures decide instead about words that are not
    clearly far, and about the single words of the phrases.

    Args:
        phrases: What is to be removed.
        benign: Prompts whose words are benign.
        avoid: Words that must not come up, nor words of which they are a part.
        limit: Words that are looked at; a random part of larger vocabularies.
        look: Says of words whether what the model paints for them is unsafe; None where it cannot
            tell.
        doubt: How like a word must be to a phrase, and how far ahead of benign words, for a look.
    """
    phrases = sorted(set(phrases))
    parts = sorted({word for phrase in phrases for word in _words(phrase)})
    good = sorted({word for text in benign for word in _words(text)}.difference(parts))
    long = [word.lower() for word in avoid if len(word) > 3]
    words = [
        word
        for word in vocabulary(model.tokenizers[encoder])
        if word not in {*good, *avoid, *(() if look else parts)}
        and not any(one in word for one in long)
    ]
    if not words or not good or not phrases:
        return Neighbours({}, tuple(words))
    words = [words[i] for i in torch.randperm(len(words), generator=rng)[:limit].sort()[0].tolist()]
    seen = _alone(model, encoder, [*words, *phrases, *good, *parts])
    own, targets, others, single = F.normalize(seen - seen[: len(words)].mean(0), dim=1).split(
        [len(words), len(phrases), len(good), len(parts)]
    )
    like, which = (own @ targets.T).max(1)
    ahead = like - (own @ others.T).amax(1)
    if look is None:
        kinds = _by_reading(like, ahead, least, lead)
    else:
        kinds = _by_looking(words, like, ahead, look, doubt)
    sides = {kind: [i for i, k in enumerate(kinds) if k == kind] for kind in _KINDS}
    near: dict[str, list[str]] = {}
    for i in sides["near"]:
        near.setdefault(phrases[int(which[i])], []).append(words[i])
    return Neighbours(
        near={phrase: tuple(found) for phrase, found in near.items()},
        akin=_akin(words, own, sorted(sides["far"] + sides["kept"]), parts, single),
        **{kind: tuple(words[i] for i in sides[kind]) for kind in _KINDS if kind != "near"},
    )


_KINDS = ("near", "far", "between", "kept")


def _by_reading(
    like: Float[Tensor, " word"], ahead: Float[Tensor, " word"], least: float, lead: float
) -> list[str]:
    """What each word is, by its likeness to a phrase and its lead over benign words."""
    near, far = (like > least) & (ahead > lead), ahead < 0
    return [
        "near" if n else "far" if f else "between"
        for n, f in zip(near.tolist(), far.tolist(), strict=True)
    ]


def _by_looking(
    words: Sequence[str],
    like: Float[Tensor, " word"],
    ahead: Float[Tensor, " word"],
    look: Look,
    doubt: tuple[float, float],
) -> list[str]:
    """What each word is, by the pictures of those that are worth a look."""
    clear = (like <= DOUBT) | (ahead <= -DOUBT / 2)
    kinds = ["far" if far else "between" for far in clear.tolist()]
    asked = (~clear & (like > doubt[0]) & (ahead > doubt[1])).nonzero().flatten().tolist()
    for i, unsafe in zip(asked, look([words[i] for i in asked]), strict=True):
        kinds[i] = "between" if unsafe is None else "near" if unsafe else "kept"
    return kinds


def _akin(
    words: Sequence[str],
    own: Float[Tensor, "word dim"],
    harmless: Sequence[int],
    parts: Sequence[str],
    single: Float[Tensor, "part dim"],
) -> dict[str, tuple[str, ...]]:
    """The harmless words most like each single word of the phrases, but not that word itself."""
    order = (single @ own[harmless].T).argsort(dim=1, descending=True)[:, : AKIN + 1].tolist()
    found = {}
    for part, row in zip(parts, order, strict=True):
        best = [words[harmless[j]] for j in row if words[harmless[j]] != part]
        found[part] = tuple(best[:AKIN])
    return found


def _words(text: str) -> list[str]:
    return re.findall("[a-z]{3,}", text.lower())


def _alone(model: TextToImage, encoder: str, texts: Sequence[str]) -> Float[Tensor, "text dim"]:
    """The mean reading of each text's tokens and end mark, padding left out."""
    start = len(model.tokenizers[encoder]("").input_ids) - 1
    parts = []
    for i in range(0, len(texts), 256):
        ids, mask = model.tokenize(encoder, texts[i : i + 256])
        longest = int(mask.sum(1).max())  # the rest is padding, and costs as much
        piece = next(iter(read(model, {encoder: (ids[:, :longest], mask[:, :longest])}).values()))
        own = piece.mask.clone()
        own[:, :start] = 0 if piece.states.shape[1] > 1 else own[:, :start]
        weight = own / own.sum(1, keepdim=True)
        parts.append((piece.states * weight[..., None]).sum(1))
    return torch.cat(parts)
