"""More prompts than anybody wrote, out of a tokenizer's vocabulary.

Lists of prompts are short and well-formed; whoever searches for prompts writes neither. Unsafe
phrases are exchanged for words that the original encoder finds like them, and stand among random
words; safe prompts get variants with random words inside, in front, or nothing but those. Which
words of the vocabulary are near an unsafe phrase, the original encoder says (`augment.neighbours`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from safelight.flow import Prompt
from safelight.models.base import TextToImage
from safelight.training.augment import exchanged, neighbours, prefixed, some, strewn, vocabulary
from safelight.training.data import shuffled, texts
from safelight.training.pairs import Pair, of_prompts, pair


@dataclass(frozen=True)
class Words:
    """A vocabulary, sorted.

    Args:
        near: For an unsafe phrase, the words like it and unlike anything benign.
        rest: All words that are near no unsafe phrase.
    """

    near: Mapping[str, tuple[str, ...]]
    rest: tuple[str, ...]


def sorted_words(
    model: TextToImage,
    encoder: str,
    unsafe: Sequence[Prompt],
    safe: Sequence[Prompt],
    avoid: Sequence[str],
    rng: torch.Generator,
) -> Words:
    """The encoder's vocabulary, sorted by what it finds near the unsafe phrases.

    Args:
        unsafe: Those with a `safe_prompt` tell which phrase is unsafe.
        safe: Their words are benign.
        avoid: Words, or phrases, whose words must not come up.
    """
    banned = {word for entry in avoid for word in entry.split()}
    words = [word for word in vocabulary(model.tokenizers[encoder]) if word not in banned]
    pairs = of_prompts([prompt for prompt in unsafe if prompt.safe_prompt])
    if not pairs:
        return Words({}, tuple(words))
    benign = [*texts(safe), *(one.anchor for one in pairs)]
    known = neighbours(model, encoder, [one.phrase for one in pairs], benign, [*banned], rng)
    bad = {word for found in known.near.values() for word in found}
    bad |= {word for one in pairs for word in one.phrase.split()}
    return Words(known.near, tuple(word for word in words if word not in bad))


def near_ones(
    unsafe: Sequence[Prompt], words: Words, share: float, rng: torch.Generator
) -> list[Prompt]:
    """Prompts that say a neighbour of their phrase, `share` times as many as have one."""
    pairs = _paired(unsafe, lambda one: one.phrase in words.near)
    return [
        replace(prompt, text=one.saying(_one_of(words.near[one.phrase], rng)).target)
        for prompt, one in _some(pairs, share, rng)
    ]


def scattered(
    unsafe: Sequence[Prompt], words: Words, share: float, rng: torch.Generator, *, most: int = 12
) -> list[Prompt]:
    """Unsafe phrases, or neighbours of them, among up to `most` random words.

    The safe counterpart has the safe phrase at the same place.
    """
    if not words.rest:
        return []
    made = []
    for prompt, one in _some(_paired(unsafe, lambda one: bool(one.phrase)), share, rng):
        phrase = _one_of((one.phrase, *words.near.get(one.phrase, ())), rng)
        safe = pair(one.anchor, one.target).phrase
        around = some(words.rest, most, rng)
        at = int(torch.randint(len(around) + 1, (1,), generator=rng))
        front, back = around[:at], around[at:]
        made.append(
            replace(
                prompt,
                text=" ".join([*front, phrase, *back]),
                safe_prompt=" ".join([*front, safe, *back]),
            )
        )
    return made


def varied(
    safe: Sequence[str], words: Words, rounds: int, rng: torch.Generator
) -> list[tuple[str, str]]:
    """Each safe prompt with `rounds` variants: words exchanged, words in front, words alone."""
    change = (exchanged, prefixed, strewn)
    return [one for i in range(rounds) for one in change[i % 3](safe, words.rest, rng)]


def _paired(unsafe: Sequence[Prompt], wanted: Callable[[Pair], bool]) -> list[tuple[Prompt, Pair]]:
    both = [prompt for prompt in unsafe if prompt.safe_prompt]
    pairs = zip(both, of_prompts(both), strict=True)
    return [(prompt, one) for prompt, one in pairs if wanted(one)]


def _some(
    pairs: Sequence[tuple[Prompt, Pair]], share: float, rng: torch.Generator
) -> list[tuple[Prompt, Pair]]:
    n = round(share * len(pairs))
    return shuffled(pairs, n, rng) if n else []


def _one_of(words: Sequence[str], rng: torch.Generator) -> str:
    return words[int(torch.randint(len(words), (1,), generator=rng))]
