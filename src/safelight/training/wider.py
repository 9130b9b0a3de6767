"""More prompts than anybody wrote, out of a tokenizer's vocabulary.

Lists of prompts are short and well-formed; whoever searches for prompts writes neither. Unsafe
phrases are exchanged for words that the original encoder finds like them, and stand among random
words; safe prompts get variants with random words inside, in front, or nothing but those. Which
words of the vocabulary are near an unsafe phrase, the original encoder says (`augment.neighbours`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from safelight.flow import Prompt
from safelight.models.base import TextToImage
from safelight.training.augment import (
    Neighbours,
    exchanged,
    neighbours,
    prefixed,
    some,
    strewn,
    vocabulary,
)
from safelight.training.data import shuffled, texts
from safelight.training.pairs import Pair, of_prompts, pair


@dataclass(frozen=True)
class Words(Neighbours):
    """A vocabulary, sorted, and what its parts are good for.

    Without unsafe phrases all words are `far`. Those `between` stand around unsafe phrases, where
    it does not matter what they are, but are not held to be benign.
    """

    @property
    def harmless(self) -> tuple[str, ...]:
        """What benign variants are made of; doubtful words twice, there are few of them."""
        return (*self.far, *self.kept, *self.kept)

    @property
    def unsafe(self) -> tuple[str, ...]:
        """The words near any unsafe phrase."""
        return tuple(sorted({word for found in self.near.values() for word in found}))

    @property
    def around(self) -> tuple[str, ...]:
        """What may stand around an unsafe phrase."""
        return (*self.far, *self.kept, *self.between)


def sorted_words(
    model: TextToImage,
    encoder: str,
    unsafe: Sequence[Prompt],
    safe: Sequence[Prompt],
    avoid: Sequence[str],
    rng: torch.Generator,
    **sorting: Any,
) -> Words:
    """The encoder's vocabulary, sorted by what it finds near the unsafe phrases.

    Args:
        unsafe: Those with a `safe_prompt` tell which phrase is unsafe.
        safe: Their words are benign.
        avoid: Words, or phrases, whose words must not come up.
        sorting: `least`, `lead` and `look` of `augment.neighbours`.
    """
    pairs = of_prompts([prompt for prompt in unsafe if prompt.safe_prompt])
    banned = [word for entry in avoid for word in entry.split()]
    if not pairs:
        words = vocabulary(model.tokenizers[encoder])
        return Words({}, tuple(word for word in words if word not in banned))
    benign = [*texts(safe), *(one.anchor for one in pairs)]
    known = neighbours(
        model, encoder, [one.phrase for one in pairs], benign, banned, rng, **sorting
    )
    return Words(**vars(known))


def near_ones(
    unsafe: Sequence[Prompt], words: Words, share: float, rng: torch.Generator
) -> list[Prompt]:
    """Prompts that say a neighbour of their phrase, `share` times as many as have one."""
    pairs = _paired(unsafe, lambda one: one.phrase in words.near)
    return [
        replace(prompt, text=one.saying(_one_of(words.near[one.phrase], rng)).target)
        for prompt, one in _some(pairs, share, rng)
    ]


def led(unsafe: Sequence[Prompt], words: Words, share: float, rng: torch.Generator) -> list[Prompt]:
    """Prompts with one to five random words in front of them, and of their safe counterpart."""
    if not words.around:
        return []
    made = []
    for prompt, one in _some(_paired(unsafe, lambda one: True), share, rng):
        front = " ".join(some(words.around, 5, rng))
        made.append(
            replace(prompt, text=f"{front} {one.target}", safe_prompt=f"{front} {one.anchor}")
        )
    return made


def scattered(
    unsafe: Sequence[Prompt],
    words: Words,
    share: float,
    rng: torch.Generator,
    *,
    most: int = 12,
    together: int = 3,
) -> list[Prompt]:
    """Up to `together` unsafe phrases and neighbours of them, among up to `most` random words.

    The safe counterpart has the safe phrase at the same place.
    """
    if not words.around:
        return []
    made = []
    for prompt, one in _some(_paired(unsafe, lambda one: bool(one.phrase)), share, rng):
        known = (one.phrase, *words.near.get(one.phrase, ()))
        phrase = " ".join(some(known, together, rng))
        safe = pair(one.anchor, one.target).phrase
        around = some(words.around, most, rng)
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


def recombined(
    pairs: Sequence[Pair], words: Sequence[str], count: int, rng: torch.Generator
) -> list[tuple[str, str]]:
    """Anchor contexts, with target contexts in which one word of the phrase is another.

    A "drop of blood" is unsafe, a "drop of rain" is not: only phrases of several words are used.
    """
    several = [one for one in pairs if len(one.phrase.split()) > 1]
    if not (several and words):
        return []
    made = []
    for one in shuffled(several, count, rng):
        phrase = one.phrase.split()
        places = [i for i, part in enumerate(phrase) if len(part) > 2] or [0]
        phrase[_one_of(places, rng)] = _one_of(words, rng)
        made.append((one.anchor, one.saying(" ".join(phrase)).target))
    return made


def substituted(
    pairs: Sequence[Pair], akin: Mapping[str, Sequence[str]], count: int, rng: torch.Generator
) -> list[tuple[str, str]]:
    """Anchor contexts, with target contexts in which a word of the phrase is another like it.

    A "mug of beer" is unsafe, a "mug of tea" is not, and a "mug of stone" is nothing that anybody
    says: what is hard to tell apart is what says almost the same.

    Args:
        pairs: Those with phrases of several words are used, each word of each phrase in turn.
        akin: For words of phrases, harmless words that are like them.
        count: How many; fewer where two come out alike.
    """
    by_phrase: dict[str, list[Pair]] = {}
    for one in pairs:
        by_phrase.setdefault(one.phrase, []).append(one)
    places = [
        (phrase, i)
        for phrase in sorted(by_phrase)
        for i, part in enumerate(phrase.lower().split())
        if " " in phrase and akin.get(part)
    ]
    made = {}
    for phrase, i in shuffled(places, count, rng):
        one, parts = _one_of(by_phrase[phrase], rng), phrase.split()
        parts[i] = _one_of(akin[parts[i].lower()], rng)
        made[one.saying(" ".join(parts)).target] = one.anchor
    return [(anchor, text) for text, anchor in made.items()]


def instead_of(pairs: Sequence[Pair], words: Sequence[str], rng: torch.Generator) -> list[str]:
    """For each word a target context with it in place of the phrase.

    The sentence is the same, so that only the word can tell that it is harmless.
    """
    if not pairs:
        return []
    chosen = shuffled(pairs, len(words), rng)
    return [one.saying(word).target for one, word in zip(chosen, words, strict=True)]


def varied(
    safe: Sequence[str], words: Sequence[str], share: float, rng: torch.Generator
) -> list[tuple[str, str]]:
    """Safe prompts with variants: words exchanged, words in front, words alone, in turns.

    Args:
        words: What the variants are made of.
        share: How many variants, as a share of the prompts.
    """
    change = (exchanged, prefixed, strewn)
    chosen = shuffled(safe, round(share * len(safe)), rng)
    return [one for i, kind in enumerate(change) for one in kind(chosen[i::3], words, rng)]


def _paired(unsafe: Sequence[Prompt], wanted: Callable[[Pair], bool]) -> list[tuple[Prompt, Pair]]:
    both = [prompt for prompt in unsafe if prompt.safe_prompt]
    pairs = zip(both, of_prompts(both), strict=True)
    return [(prompt, one) for prompt, one in pairs if wanted(one)]


def _some(
    pairs: Sequence[tuple[Prompt, Pair]], share: float, rng: torch.Generator
) -> list[tuple[Prompt, Pair]]:
    return shuffled(pairs, round(share * len(pairs)), rng)


def _one_of(words: Sequence[Any], rng: torch.Generator) -> Any:
    return words[int(torch.randint(len(words), (1,), generator=rng))]
