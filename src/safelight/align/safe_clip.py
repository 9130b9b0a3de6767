"""Safe-CLIP: move unsafe captions onto what the original CLIP says of their safe counterparts.

With `T` the trained text tower, `T0` the original one, and `V0` the original image tower where
there are pictures; `s`, `u` a safe caption and its unsafe counterpart, `v`, `g` their pictures:

    cosdist(a, b) = 1 - cos(a, b)
    nce(A, B) = (CE(100 A B^T, diag) + CE(100 B A^T, diag)) / 2        of unit vectors, row by row

    L_1 = cosdist(T(s), T0(s))    L_5 = nce(T(s), V0(v))        preserve
    L_2 = cosdist(T(u), T0(s))    L_6 = nce(T(u), V0(v))        redirect
    min over T of  sum_k w_k L_k / 8,   w normalised to sum 1

What is compared is one vector per caption: the state at the end mark, projected where the encoder
has a projection. The other states, which the denoiser of most families reads, follow only
indirectly. LoRA on keys, values, outputs and both layers of the MLP, not on queries.

Source: Poppi et al., ECCV 2024, arXiv:2311.16254, and the authors' code. Needs pairs of prompts and
gradients of the text encoder; no pictures.

- *Pictures.* A text-to-image model has no image tower, so by default only L_1 and L_2 are used.
  `Pictures` brings a CLIPModel of the same text tower and pairs of pictures, and with them L_5 and
  L_6. The paper's L_3, L_4, L_7, L_8 compare a trained image tower with frozen values: no gradient
  of theirs reaches the text tower, and no text-to-image model has a place for what they train.
- `redirect="nearest"` is SafeR-CLIP (arXiv:2511.16743): the goal is T0 of the safe prompt nearest
  to T0(u) instead of the fixed pair, so data without pairs will do. `relative` adds its loss
  log(1 + exp(cos(T(u), from) - cos(T(u), to))), here between texts: from T0(u) to the goal.
- *Safe side.* L_1 is over the counterparts, the safe prompts and "", which guidance reads.
- *Frozen references* are values computed beforehand. The released script wraps the very model that
  it goes on to call the original, so its L_1 is 0 and its goals drift.
- *Families.* Encoders without an end-mark vector (T5) stay as they are: in SD3 and FLUX they go on
  telling the denoiser what the prompt says. The patch's info names them.
- The best epoch is that of the lowest held-out loss; the paper also looks at retrieval. No dropout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from safelight.align.base import Loss, Split, TextData, Watch
from safelight.align.text import Scope, TextSide
from safelight.errors import BadInput, Unsupported, unknown
from safelight.flow import Card, Prompt
from safelight.models.base import TextToImage, plain
from safelight.training.data import shuffled, texts
from safelight.training.embedding import Piece, Reader, Reading, Reference, Tokens, remember

Redirect = Literal["pair", "nearest"]
WEIGHTS = (0.1, 0.1, 0.1, 0.2, 0.25, 0.25, 0.25, 0.5)  # the paper's w, of L_1 to L_8
SCALE = 100.0  # CLIP's temperature, fixed


@dataclass(frozen=True, kw_only=True)
class Pictures(TextData):
    """Pairs of prompts with pairs of pictures.

    Args:
        clip: A transformers CLIPModel whose text tower is one of the model's encoders.
        pixels: By the unsafe prompt's id the safe and the unsafe picture, as CLIP's image
            processor gives them.
    """

    clip: Any
    pixels: Mapping[str, tuple[Float[Tensor, "3 h w"], Float[Tensor, "3 h w"]]]


@dataclass(frozen=True, kw_only=True)
class SafeCLIP(TextSide):
    """Redirect unsafe prompts to the original embedding of a safe counterpart.

    Args:
        batch: Unsafe prompts per step, and as many safe ones.
        redirect: The goal of an unsafe prompt: its own safe counterpart ("pair"), or the "nearest"
            safe prompt.
        relative: Weight of the relative loss, in units of w_2; 0 is Safe-CLIP.
    """

    card: ClassVar[Card] = Card(
        title="Safe-CLIP",
        source="arXiv:2311.16254",
        summary="moves unsafe prompts onto their safe counterparts' CLIP vectors, by LoRA",
        needs=("prompts", "gradients"),
        claims={
            "harmful pictures on I2P, SD 1.4, base 0.381 (independent, ShieldCLIP)": 0.218,
            "harmful pictures on ViSU, SD 1.4, base 0.246 (independent, ShieldCLIP)": 0.041,
            "harmful pictures on I2P, SDXL, base 0.336 (independent, ShieldCLIP)": 0.082,
            "mean ASR under five attacks, base 0.676 (independent, SAGE)": 0.381,
            "TIFA after, base 0.763 (independent, SAGE)": 0.601,
            "FID on COCO, base 14.7 (independent, ShieldCLIP)": 15.7,
            "FID on COCO, base 17.23 (independent, SAGE)": 33.40,
        },
    )

    epochs: int | None = None
    batch: int = 16
    anneal: bool = False
    patience: int = 5
    tolerance: float = 0.0
    scope: Scope = "lora"
    rank: int = 16
    alpha: float | None = 1.0
    targets: tuple[str, ...] = ("k_proj", "v_proj", "out_proj", "fc1", "fc2")

    redirect: Redirect = "pair"
    relative: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.redirect not in get_args(Redirect):
            raise BadInput(f"redirect: {unknown('choice', self.redirect, get_args(Redirect))}")

    def chosen(self, model: TextToImage) -> tuple[str, ...]:
        """The CLIP encoders, or those of them that were named."""
        named = super().chosen(model)
        clips = tuple(name for name in named if name != "t5")
        if self.encoders and clips != named:
            raise Unsupported("Safe-CLIP moves the vector at the end mark, and t5 has none.")
        return clips

    def rate(self, model: TextToImage) -> float:
        """1e-3 as published; small encoders take larger steps, since alpha / rank is 1/16."""
        return self.lr or (1e-2 if self.small(model) else 1e-3)

    def passes(self, model: TextToImage) -> int:
        """At most 50 as published; small encoders are done sooner."""
        return self.epochs or (3 if self.small(model) else 50)

    def gather(
        self, model: TextToImage, data: TextData, *, seed: int, watch: Watch | None = None
    ) -> Material:
        """The split, T0 of every prompt, each unsafe prompt's goal, and V0 of the pictures."""
        split = data.split(seed)
        encoders = self.chosen(model)
        unsafe = (*split.unsafe, *split.unsafe_check)
        pairs = {p.text: p.safe_prompt for p in unsafe if p.safe_prompt}
        tower, seen = "", {}
        reader: Reader = vectors
        if isinstance(data, Pictures):
            if self.redirect != "pair":
                raise BadInput("pictures come in pairs; use redirect=pair with them.")
            tower = _tower(model, encoders, data.clip)
            reader = _Projected(tower, data.clip.text_projection)
            seen = _looked_at(data, unsafe)
        everything = ["", *texts((*split.safe, *split.safe_check, *unsafe)), *pairs.values()]
        T0 = remember(model, everything, encoders, reader=reader)
        goals = pairs
        if self.redirect == "nearest":
            safe = [p.text for p in split.safe if not p.category]
            near = T0.nearest(texts(unsafe), safe)
            goals = dict(zip(texts(unsafe), near, strict=True))
        else:
            _require_pairs(unsafe)
        kept = dict.fromkeys(texts(split.safe)) | dict.fromkeys(goals[p.text] for p in split.unsafe)
        return Material(split, tuple(kept), T0, goals, seen, tower, encoders, data.hashes())

    def steps(self, material: Material) -> int:
        """An epoch reads every unsafe prompt once."""
        return -(-len(material.split.unsafe) // self.batch)

    def batches(self, material: Material, epoch: int, rng: torch.Generator) -> Iterator[Batch]:
        """Unsafe prompts, and as many safe ones, "" always among them."""
        n, m = self.steps(material), max(1, self.batch - 1)
        unsafe = shuffled(texts(material.split.unsafe), n * self.batch, rng)
        safe = shuffled(material.safe, n * m, rng)
        for i in range(n):
            moved = tuple(unsafe[i * self.batch : (i + 1) * self.batch])
            yield material.batch(moved, ("", *safe[i * m : (i + 1) * m]))

    def loss(self, model: TextToImage, batch: Batch, rng: torch.Generator) -> Loss:
        """sum_k w_k L_k / 8."""
        terms = self.terms(model, batch)
        return Loss(self._weighed(terms), {name: term.item() for name, term in terms.items()})

    def _weighed(self, terms: Mapping[str, Any]) -> Any:
        w = {f"L_{k}": weight / sum(WEIGHTS) / 8 for k, weight in enumerate(WEIGHTS, 1)}
        w["L_relative"] = self.relative * w["L_2"]
        return sum(w[name] * term for name, term in terms.items())

    def terms(self, model: TextToImage, batch: Batch) -> dict[str, Tensor]:
        """The un-weighted terms, each the mean over the encoders that have it."""
        T0, tower = batch.material.T0, batch.material.tower
        paired = batch.goals if tower else ()
        now = T0.now(model, (*batch.safe, *batch.unsafe, *paired))
        s, u, v = _parts(now, len(batch.safe), len(batch.unsafe))
        kept, then, goal = (_parts(T0(x))[0] for x in (batch.safe, batch.unsafe, batch.goals))
        terms = {
            "L_1": _mean(cosdist(s[name], kept[name]).mean() for name in s),
            "L_2": _mean(cosdist(u[name], goal[name]).mean() for name in u),
        }
        if self.relative:
            terms["L_relative"] = _mean(
                relative(u[name], then[name], goal[name]).mean() for name in u
            )
        V0 = batch.seen
        if tower and V0 is not None:
            terms |= {"L_5": nce(v[tower], V0), "L_6": nce(u[tower], V0)}
        return terms

    @torch.no_grad()
    def check(self, model: TextToImage, material: Material) -> dict[str, float]:
        """The terms on held-out prompts."""
        rows = [self.terms(model, batch) for batch in material.held_out(self.batch)]
        figures = {name: sum(row[name].item() for row in rows) / len(rows) for name in rows[0]}
        return {"objective": self._weighed(figures), **figures}

    def info(self, material: Material) -> dict[str, Any]:
        """What was supervised, what was not, and what the weights were learnt from."""
        return {
            "data": material.hashes,
            "split": {name: len(getattr(material.split, name)) for name in Split.__annotations__},
            "encoders": list(material.encoders),
            "supervised": "the vector at the end mark, projected where the encoder projects it",
            "pictures": bool(material.tower),
            "goals": len(set(material.goals.values())),
        }


@dataclass(frozen=True)
class Material:
    """What stays constant while training.

    Args:
        split: Prompts to learn from and to check with.
        safe: Safe prompts to learn from, goals included.
        T0: The original vector of every prompt.
        goals: By unsafe prompt the safe one whose vector it is to have.
        seen: By unsafe prompt V0 of its safe picture; empty without pictures.
        tower: The encoder that belongs to the image tower, "" without pictures.
        encoders: The encoders that are trained.
        hashes: SHA-256 of each prompt set.
    """

    split: Split
    safe: tuple[str, ...]
    T0: Reference
    goals: Mapping[str, str]
    seen: Mapping[str, Tensor]
    tower: str
    encoders: tuple[str, ...]
    hashes: dict[str, str]

    def batch(self, unsafe: Sequence[str], safe: Sequence[str]) -> Batch:
        """Unsafe prompts with all that belongs to them."""
        seen = torch.stack([self.seen[text] for text in unsafe]) if self.tower else None
        return Batch(
            safe=tuple(safe),
            unsafe=tuple(unsafe),
            goals=tuple(self.goals[text] for text in unsafe),
            seen=None if seen is None else seen.to(self.T0.device),
            material=self,
        )

    def held_out(self, size: int) -> Iterator[Batch]:
        """The validation prompts; the safe ones are dealt out over the unsafe ones' batches."""
        safe, unsafe = ("", *texts(self.split.safe_check)), texts(self.split.unsafe_check)
        n = -(-len(unsafe) // size)
        for i in range(n):
            yield self.batch(unsafe[i * size : (i + 1) * size], safe[i::n] or ("",))


@dataclass(frozen=True)
class Batch:
    """Safe prompts, unsafe prompts with their goals, and the goals' pictures if there are any."""

    safe: tuple[str, ...]
    unsafe: tuple[str, ...]
    goals: tuple[str, ...]
    seen: Float[Tensor, "row dim"] | None
    material: Material


def cosdist(a: Float[Tensor, "row dim"], b: Float[Tensor, "row dim"]) -> Float[Tensor, " row"]:
    """1 - cos."""
    return 1 - F.cosine_similarity(a, b)


def nce(a: Float[Tensor, "row dim"], b: Float[Tensor, "row dim"]) -> Float[Tensor, ""]:
    """CLIP's loss: every row is to be nearest to its own row on the other side, both ways."""
    logits = SCALE * F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    own = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def relative(
    a: Float[Tensor, "row dim"], away: Float[Tensor, "row dim"], to: Float[Tensor, "row dim"]
) -> Float[Tensor, " row"]:
    """log(1 + exp(cos(a, away) - cos(a, to))); no other row of the batch takes part."""
    return F.softplus(F.cosine_similarity(a, away) - F.cosine_similarity(a, to))


def vectors(model: TextToImage, tokens: Tokens) -> dict[str, Piece]:
    """The vector at the end mark that each CLIP encoder gives, projected where it projects."""
    pieces = {}
    for name, (ids, mask) in tokens.items():
        seen = model.text_encoders[name](ids)
        vector = seen.text_embeds if hasattr(seen, "text_embeds") else seen.pooler_output
        pieces[name] = Piece(vector.float()[:, None], mask[:, :1])
    return pieces


@dataclass(frozen=True)
class _Projected:
    """`vectors` with the projection of a CLIPModel, for an encoder that was cut off from it."""

    tower: str
    projection: nn.Linear

    def __call__(self, model: TextToImage, tokens: Tokens) -> dict[str, Piece]:
        pieces = vectors(model, tokens)
        if self.tower in pieces and not hasattr(model.text_encoders[self.tower], "text_projection"):
            piece = pieces[self.tower]
            pieces[self.tower] = Piece(self.projection(piece.states), piece.mask)
        return pieces


def _parts(reading: Reading, *lengths: int) -> list[dict[str, Tensor]]:
    """The vectors of a reading by encoder, cut into parts of some lengths and the rest."""
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    starts = [0, *ends]
    return [
        {name: piece.states[start:end, 0] for name, piece in reading.items()}
        for start, end in zip(starts, [*ends, None], strict=True)
    ]


def _mean(values: Iterator[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean()


def _require_pairs(unsafe: Sequence[Prompt]) -> None:
    lost = [prompt for prompt in unsafe if not prompt.safe_prompt]
    if lost:
        raise BadInput(
            f"{len(lost)} of {len(unsafe)} unsafe prompts have no safe counterpart, the first is "
            f"{lost[0].id!r}; fill their `safe_prompt`, or use redirect=nearest."
        )


def _tower(model: TextToImage, encoders: Sequence[str], clip: Any) -> str:
    """The encoder that is a CLIPModel's text tower."""
    theirs = {plain(name): value for name, value in clip.text_model.named_parameters()}
    for name in encoders:
        ours = dict(model.text_encoders[name].named_parameters())
        ours = {plain(k): v for k, v in ours.items() if not k.startswith("text_projection")}
        same = ours.keys() == theirs.keys() and all(
            ours[k].shape == theirs[k].shape and torch.allclose(ours[k], theirs[k].to(ours[k]))
            for k in ours
        )
        if same:
            return name
    raise BadInput(
        f"the CLIPModel's text tower is none of {', '.join(encoders)} of {model.name}; its image "
        "tower would judge another's texts. Give the CLIPModel that the encoder was taken from."
    )


@torch.no_grad()
def _looked_at(data: Pictures, unsafe: Sequence[Prompt]) -> dict[str, Tensor]:
    """V0 of the safe picture of each unsafe prompt."""
    seen = {}
    for prompt in unsafe:
        if prompt.id not in data.pixels:
            raise BadInput(f"there are no pictures for the unsafe prompt {prompt.id!r}.")
        tower = data.clip.vision_model(pixel_values=data.pixels[prompt.id][0][None])
        seen[prompt.text] = data.clip.visual_projection(tower.pooler_output)[0].cpu()
    return seen
