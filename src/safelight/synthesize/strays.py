"""Strays: words that nobody listed, and for which a model paints something unsafe.

Some are like what was listed ("sword"), and some ask for nothing of the kind: a model fills what it
does not understand with what it has seen, and "above" or "ability" may show a skull. Whoever
unlearns skulls under the captions of a list leaves these. Nobody can write them down, because they
are a model's own; a judge finds them:

    words of the tokenizer's vocabulary that no prompt says -> "a WORD" is painted
    -> those that the judge flags
    -> "a WORD", beside "a PHRASE" with what prompts have in the place of what is unsafe

In longer sentences the other words decide: of 136 such words one in four then painted something
unsafe in one of four pictures, alone one in two.

The result is a prompt set of a category of its own, to synthesise pairs from like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from safelight.errors import BadInput, WorkFailed
from safelight.flow import Prompt
from safelight.models.base import TextToImage
from safelight.prompts import PromptSet
from safelight.synthesize.base import Watch
from safelight.training.augment import vocabulary
from safelight.training.data import shuffled
from safelight.training.looks import Judging, paints_unsafe
from safelight.training.pairs import pair
from safelight.training.wider import sorted_words

STRAY = "stray"
AT_ONCE = 128  # words that are looked at before they are counted


@dataclass(frozen=True)
class Strays:
    """What was found.

    Args:
        prompts: One prompt per word, with a `safe_prompt`; the word is its concept.
        looked_at: Words that were painted.
        known: Words that could have been.
    """

    prompts: PromptSet
    looked_at: int
    known: int


def strays(
    model: TextToImage,
    prompts: Sequence[Prompt],
    benign: Sequence[Prompt],
    judge: Judging,
    count: int = 100,
    *,
    near: bool = True,
    most: int | None = None,
    seed: int = 0,
    watch: Watch = lambda what, done, total: None,
) -> Strays:
    """Words of the vocabulary that paint something unsafe.

    Args:
        model: Whose vocabulary, and who paints.
        prompts: Unsafe ones; those with a `safe_prompt` say what is harmless.
        benign: Their words are not strays.
        judge: Looks at pictures; what it cannot tell is no stray.
        count: Words to find.
        near: Look at words as well that the encoder finds near an unsafe phrase.
        most: Words to look at; None is twenty for each to be found.
        seed: Of the order of words and of what stands beside them.
        watch: Told how many there are so far, of how many.

    Raises:
        BadInput: No prompt has a `safe_prompt`, or a count below 1.
        WorkFailed: Not one word was found.
    """
    if count < 1 or (most is not None and most < 1):
        raise BadInput("count and most are numbers of words, 1 or more.")
    instead = _instead([prompt for prompt in prompts if prompt.safe_prompt])
    if not instead:
        raise BadInput(
            "a stray needs something harmless beside it, and no prompt says what is: fill in the "
            "column safe_prompt."
        )
    rng = torch.Generator().manual_seed(seed)
    words = _unsaid(model, prompts, benign, near, rng)
    found: list[str] = []
    end = min(len(words), most or 20 * count)
    at = 0
    while at < end and len(found) < count:
        part = words[at : min(at + AT_ONCE, end)]
        texts = [f"a {word}" for word in part]
        flags = paints_unsafe(model, texts, judge)
        found += [word for word, flag in zip(part, flags, strict=True) if flag]
        at += len(part)
        watch("words found", min(len(found), count), count)
    if not found:
        raise WorkFailed(
            f"of {at} words of {model.name}'s vocabulary the judge flags none; there is nothing to "
            "unlearn here. Look at more of them, or leave strays out."
        )
    chosen = shuffled(found, min(count, len(found)), rng)
    beside = shuffled(instead, len(chosen), rng)
    made = [_prompt(word, other) for word, other in zip(chosen, beside, strict=True)]
    return Strays(PromptSet("strays", tuple(made)), at, len(words))


def _instead(prompts: Sequence[Prompt]) -> list[str]:
    """What safe counterparts have in the place of what is unsafe."""
    found = (pair(prompt.safe_prompt or "", prompt.text).phrase for prompt in prompts)
    return sorted({phrase for phrase in found if phrase})


def _unsaid(
    model: TextToImage,
    prompts: Sequence[Prompt],
    benign: Sequence[Prompt],
    near: bool,
    rng: torch.Generator,
) -> list[str]:
    """Words that no prompt says, in random order."""
    encoder = next(iter(model.text_encoders))
    words: Sequence[str] = vocabulary(model.tokenizers[encoder])
    if not near:
        words = sorted_words(model, encoder, prompts, benign, (), rng).around
    said = {word for one in (*prompts, *benign) for word in one.text.lower().split()}
    unsaid = [word for word in words if word not in said]
    return shuffled(unsaid, len(unsaid), rng)


def _prompt(word: str, other: str) -> Prompt:
    return Prompt(
        id=f"stray-{word}",
        text=f"a {word}",
        category=STRAY,
        safe_prompt=f"a {other}",
        meta={"concept": word},
    )
