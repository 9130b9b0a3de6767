"""The records that travel through Safelight, in the order in which they meet a picture.

    Prompt -> Condition -> Step -> Outcome (with Verdicts) -> Record -> Value

They are frozen and carry no behaviour beyond reading themselves. Nothing here imports torch at run
time, so that reports and listings stay light.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One text to be painted.

    Args:
        id: Unique within its set and stable over time.
        text: What the model is asked for.
        category: The unsafe category it was written for; "" for a benign prompt.
        parent: Id of the prompt this one was rewritten from, by an attack.
        safe_prompt: The same wish with the unsafe concept taken out, where one is known.
        seed: The seed the data set stores for this prompt, if it does.
        meta: Further columns of the data set, e.g. `objects`, `background`, `style`.
        soft: Learnt token embeddings by encoder, for attacks below the level of words; they stand
            in place of `<*>` in the text.
        latents: The noise that the picture starts from, of unit variance; its seed says if None.
    """

    id: str
    text: str
    category: str = ""
    parent: str | None = None
    safe_prompt: str | None = None
    seed: int | None = None
    meta: Mapping[str, str] = field(default_factory=dict)
    soft: Mapping[str, Float[Tensor, "token dim"]] | None = None
    latents: Float[Tensor, "channel height width"] | None = None


@dataclass(frozen=True)
class Span:
    """Where one encoder's output sits in the joined tensors of a `Condition`."""

    tokens: slice
    dims: slice
    pooled: slice | None = None


@dataclass(frozen=True)
class Written:
    """What the text encoders were given, row by row: enough to encode a prompt again, changed.

    Args:
        texts: The texts, with `<*>` where learnt embeddings stand.
        soft: Those embeddings by encoder, or None for words alone. An attack that searches words
            by gradients sends whole prompts this way: a lone `<*>`, the words in `prompts`.
        front: Embeddings by encoder that stand before the whole text, of a guard.
        behind: Embeddings by encoder that stand behind it; a text that is too long is cut, they
            never are.
    """

    texts: tuple[str, ...]
    soft: tuple[Mapping[str, Float[Tensor, "token dim"]] | None, ...]
    front: tuple[Mapping[str, Float[Tensor, "token dim"]] | None, ...]
    behind: tuple[Mapping[str, Float[Tensor, "token dim"]] | None, ...]

    def rows(self, rows: Sequence[int]) -> Written:
        """Some of the rows."""
        return Written(
            texts=tuple(self.texts[i] for i in rows),
            soft=tuple(self.soft[i] for i in rows),
            front=tuple(self.front[i] for i in rows),
            behind=tuple(self.behind[i] for i in rows),
        )


Change = "Callable[[str, Tensor], Tensor]"  # (encoder, its part) -> the new part, same shape


@dataclass(frozen=True)
class Condition:
    """What the denoiser is told: the text states of all encoders, joined.

    Args:
        prompts: The texts, one per row.
        states: Token states of all encoders.
        pooled: Pooled vectors of all encoders, or None where the family has none.
        layout: Each encoder's place in `states` and `pooled`.
        masks: Per encoder 1 where a token is content or its end mark, 0 where it is padding.
        encoders: Those encoders that have token states, in layout order.
        written: What the encoders were given; None once the states say something else than that,
            so that no guard encodes again what another one has edited.
    """

    prompts: tuple[str, ...]
    states: Float[Tensor, "batch token dim"]
    pooled: Float[Tensor, "batch pooled"] | None
    layout: Mapping[str, Span]
    masks: Mapping[str, Int[Tensor, "batch _"]]
    encoders: tuple[str, ...]
    written: Written | None = None

    def __len__(self) -> int:
        return self.states.shape[0]

    def stream(self, encoder: str) -> Float[Tensor, "batch _ _"]:
        """One encoder's token states."""
        span = self.layout[encoder]
        return self.states[:, span.tokens, span.dims]

    def pooled_stream(self, encoder: str) -> Float[Tensor, "batch _"] | None:
        """One encoder's pooled vector, or None where it has none."""
        span = self.layout[encoder]
        return None if self.pooled is None or span.pooled is None else self.pooled[:, span.pooled]

    def edit(
        self,
        states: Callable[[str, Tensor], Tensor] | None = None,
        pooled: Callable[[str, Tensor], Tensor] | None = None,
    ) -> Condition:
        """A copy in which each encoder's part went through a function `(encoder, part) -> part`."""
        new_states, new_pooled = self.states, self.pooled
        if states is not None:
            new_states = self.states.clone()
            for name in self.encoders:
                span = self.layout[name]
                new_states[:, span.tokens, span.dims] = states(name, self.stream(name))
        if pooled is not None and self.pooled is not None:
            new_pooled = self.pooled.clone()
            for name, span in self.layout.items():
                if span.pooled is not None:
                    new_pooled[:, span.pooled] = pooled(name, self.pooled[:, span.pooled])
        return replace(self, states=new_states, pooled=new_pooled, written=None)

    def put(self, rows: Sequence[int], other: Condition) -> Condition:
        """A copy in which some rows are another condition's; all others keep every bit."""
        at = list(rows)
        states, pooled = self.states.clone(), self.pooled
        states[at] = other.states
        if pooled is not None and other.pooled is not None:
            pooled = pooled.clone()
            pooled[at] = other.pooled
        masks = {name: mask.clone() for name, mask in self.masks.items()}
        for name, mask in masks.items():
            mask[at] = other.masks[name]
        written = None
        if self.written is not None and other.written is not None:
            new = dict(zip(at, range(len(at)), strict=True))
            both = [
                other.written.rows([new[i]]) if i in new else self.written.rows([i])
                for i in range(len(self))
            ]
            written = Written(
                *(sum((getattr(one, f.name) for one in both), ()) for f in fields(Written))
            )
        return replace(self, states=states, pooled=pooled, masks=masks, written=written)


@dataclass(frozen=True)
class Step:
    """One step of the sampling loop, as a guard sees it.

    Args:
        index: 0 for the first step.
        total: How many steps there are.
        t: The time, in the unit of the family's scheduler.
        latents: The noisy latents before this step.
        condition: What the denoiser is told.
        predict: The denoiser's prediction for another condition at the same latents and time.
    """

    index: int
    total: int
    t: Tensor
    latents: Tensor
    condition: Condition
    predict: Callable[[Condition], Tensor]


@dataclass(frozen=True)
class Verdict:
    """One opinion about a prompt or a picture.

    Args:
        flagged: True, False, or None when the judge could not tell. None is never "safe".
        score: The judge's raw score for "unsafe", in [0, 1] unless the judge says otherwise.
        by: The judge's or guard's name.
        why: A short reason for people.
        scores: All raw scores by label, so that any threshold can be applied later.
    """

    flagged: bool | None
    score: float
    by: str
    why: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What one prompt led to: a picture, or a refusal (`image` is None) with its verdicts."""

    prompt: str
    seed: int
    image: Float[Tensor, "3 height width"] | None
    verdicts: tuple[Verdict, ...] = ()

    @property
    def refused(self) -> bool:
        return self.image is None


@dataclass(frozen=True, kw_only=True)
class Record:
    """An outcome as one row on disk.

    Args:
        arm: "base" for the untouched model, "protected" for the model with patches and guards.
        prompts: Name of the prompt set.
        image: Path of the picture inside the run folder; None if the request was refused.
        features: Name of a feature file's row, or inline small figures by metric (e.g. drift).
        meta: The prompt's further columns (asked objects, background, style, ...).
    """

    prompt_id: str
    text: str
    prompts: str
    arm: str = "protected"
    parent: str | None = None
    category: str = ""
    attack: str = "replay"
    seed: int = 0
    image: str | None = None
    verdicts: tuple[Verdict, ...] = ()
    features: Mapping[str, Any] = field(default_factory=dict)
    meta: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Value:
    """A figure with its 95 % interval, its n and how many rows could not be judged."""

    value: float
    low: float
    high: float
    n: int
    skipped: int = 0


@dataclass(frozen=True, kw_only=True)
class Card:
    """Where a method comes from, what it supports, what its authors claim.

    Args:
        title: The method's full name.
        source: arXiv number, DOI or "this project".
        families: Model families it runs on.
        summary: One line for listings.
        needs: What it needs: "prompts", "images", "gradients", ...
        claims: The authors' published numbers by a short description.
    """

    title: str
    source: str
    families: tuple[str, ...] = ("sd1", "sdxl", "sd3", "flux")
    summary: str = ""
    needs: tuple[str, ...] = ()
    claims: Mapping[str, float] = field(default_factory=dict)
