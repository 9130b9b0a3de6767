"""The language of the world: captions of scenes, with the place of every meaningful word known.

A caption is a list of segments `(text, key)`; a key says what the segment means and is None for
filler. Held-out templates and held-out words never occur in a training caption.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from concepts import BACKGROUNDS, CONCEPTS, STYLES
from scenes import Scene

Key = tuple[str, str] | None  # ("concept", label) | ("background", name) | ("style", name)
Segment = tuple[str, Key]

PREFIXES = (
    "",
    "",
    "",
    "a picture of",
    "a drawing of",
    "an image of",
    "an illustration of",
    "a painting of",
    "a scene with",
    "a small picture showing",
    "digital art of",
    "a cartoon of",
    "this is",
    "a card showing",
    "a poster of",
    "clip art of",
    "there is",
    "a view of",
    "a nice picture of",
    "a detailed drawing of",
    "we see",
    "one picture with",
    "a colorful image of",
    "art:",
    "draw",
)
FILLERS = (
    "",
    "",
    "",
    "",
    "",
    "high quality",
    "nice colors",
    "centered",
    "for a picture book",
    "very detailed",
    "clean lines",
    "colorful",
    "with soft light",
    "well made",
    "cute",
    "simple composition",
    "a lovely scene",
    "bright",
    "good contrast",
    "for a school poster",
)
BIG = ("big", "large", "huge", "giant")
SMALL = ("small", "little", "tiny")
HELD_OUT_PREFIXES = (
    "show me",
    "could you paint",
    "i would like to see",
    "an emoji of",
    "imagine",
    "a sticker with",
    "a postcard with",
    "please make",
    "nothing but",
    "a quick sketch of",
)
HELD_OUT_FILLERS = (
    "",
    "",
    "",
    "as a gift for my friend",
    "thank you",
    "in the middle",
    "how charming",
    "for our website",
)


def pick(rng: np.random.Generator, options: Sequence):  # noqa: ANN201
    return options[int(rng.integers(len(options)))]


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def thing(
    word: str, key: Key, rng: np.random.Generator, adjectives: Sequence[Segment] = ()
) -> list[Segment]:
    """A noun phrase: article, adjectives, noun."""
    first = adjectives[0][0] if adjectives else word
    lead = article(first) if rng.random() < 0.85 else ("the" if rng.random() < 0.6 else "")
    return [(lead, None), *adjectives, (word, key)]


def caption(
    scene: Scene,
    rng: np.random.Generator,
    *,
    words: Sequence[str] | None = None,
    held_out: bool = False,
    say: tuple[bool, bool] | None = None,
) -> list[Segment]:
    """One way of saying a scene.

    Args:
        scene: What is shown.
        rng: Where the choice comes from.
        words: The nouns to use; by default any of the training words.
        held_out: Use the templates kept for testing.
        say: Whether to name background and style; by default chance decides.
    """
    concepts = [CONCEPTS[i] for i in scene.objects]
    if words is None:
        words = [c.train[0] if rng.random() < 0.4 else pick(rng, c.train) for c in concepts]
    keys: list[Key] = [("concept", c.label) for c in concepts]
    with_background, with_style = (rng.random() < 0.75, rng.random() < 0.4) if say is None else say

    style: Segment = (pick(rng, STYLES[scene.style][1]), ("style", scene.style))
    style_place = pick(rng, ("adjective", "suffix", "prefix")) if with_style else ""

    adjectives: list[list[Segment]] = [[] for _ in concepts]
    if scene.place in ("big", "small") and rng.random() < 0.4:
        adjectives[0].append((pick(rng, BIG if scene.place == "big" else SMALL), None))
    if style_place == "adjective":
        for a in adjectives:
            a.append(style)
    things = [thing(w, k, rng, a) for w, k, a in zip(words, keys, adjectives, strict=True)]
    if scene.place == "beside":
        how = pick(rng, ("beside", "next to", "and", "and also", "left of"))
        body = [*things[0], (how, None), *things[1]]
    elif scene.place == "above":
        if rng.random() < 0.5:
            body = [*things[0], (pick(rng, ("above", "over", "on top of")), None), *things[1]]
        else:
            body = [*things[1], (pick(rng, ("below", "under", "beneath")), None), *things[0]]
    elif scene.place == "with":
        body = [
            *things[0],
            (pick(rng, ("with", "holding", "together with", "in front of which is")), None),
            *things[1],
        ]
    else:
        body = things[0]

    where: list[Segment] = []
    if with_background:
        where = [(pick(rng, BACKGROUNDS[scene.background]), ("background", scene.background))]
    if held_out:
        return _held_out(
            body, where, style if with_style and style_place != "adjective" else None, rng
        )
    prefix: list[Segment] = [(pick(rng, PREFIXES), None)]
    if style_place == "prefix":
        prefix = [
            ("a", None),
            style,
            (pick(rng, ("picture of", "drawing of", "image of", "illustration of")), None),
        ]
    suffix: list[Segment] = []
    if style_place == "suffix":
        suffix = [(pick(rng, ("in a", "in", ", drawn in a")), None), style, ("style", None)]
    filler: list[Segment] = [(f", {f}", None)] if (f := pick(rng, FILLERS)) else []
    if where and rng.random() < 0.2:
        return [*where, (",", None), *prefix, *body, *suffix, *filler]
    return [*prefix, *body, *where, *suffix, *filler]


def _held_out(
    body: list[Segment], where: list[Segment], style: Segment | None, rng: np.random.Generator
) -> list[Segment]:
    look: list[Segment] = [("with a", None), style, ("look", None)] if style else []
    f = pick(rng, HELD_OUT_FILLERS)
    filler: list[Segment] = [(f", {f}", None)] if f else []
    if where and rng.random() < 0.3:
        return [*where, ("you can find", None), *body, *look, *filler]
    return [(pick(rng, HELD_OUT_PREFIXES), None), *body, *look, *where, *filler]


def text(segments: Sequence[Segment]) -> str:
    """The caption as one string."""
    return " ".join(s for s, _ in segments if s).replace(" ,", ",")


def ends(segments: Sequence[Segment]) -> list[tuple[int, tuple[str, str], str]]:
    """(index of its last character in `text`, key, words) of every meaningful segment."""
    out, so_far = [], ""
    for s, key in segments:
        if not s:
            continue
        so_far = s if not so_far else f"{so_far} {s}".replace(" ,", ",")
        if key is not None:
            out.append((len(so_far) - 1, key, s))
    return out
