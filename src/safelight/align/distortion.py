"""What DES and SAGE share: concept directions, far-away targets, pairs, and the terms of DES.

`des.py` states the method. All vectors are flattened readings, one `Piece` (an encoder's token
states, or its pooled vector) at a time, each with a codebook, directions and targets of its own;
terms are averaged over the pieces. The encoders share no weights, and AdamW does not mind the
scale of a loss, so this trains each encoder as if it were alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from safelight.align.base import Loss, Split, TextData, Watch
from safelight.align.text import TextSide, moved
from safelight.errors import BadInput
from safelight.flow import Prompt
from safelight.models.base import TextToImage
from safelight.training.data import shuffled, texts
from safelight.training.embedding import Piece, Reading, Reference, remember, size

CLIP_L = (77, 768)  # the reading that the published alpha is for
CLIP_L_NORM = (77 * 768) ** 0.5  # of such a reading after a layer norm: 243


@dataclass(frozen=True)
class Recipe:
    """Settings that depend on the encoders' size."""

    lam: float
    alpha_n: float
    batch: int


SMALL = Recipe(lam=0.6, alpha_n=50.0, batch=32)
"""For encoders like the Emoji World's, measured on its training prompts.

Its safe readings have little in common (a mean cosine of 0.33), so that the published alpha moves
them all, and a few hundred pairs leave too few steps in batches of 128.
"""


@dataclass(frozen=True, kw_only=True)
class Distortion(TextSide):
    """Unsafe prompts go to far-away safe targets, safe prompts stay, a concept becomes "".

    Args:
        concepts: One prompt per unsafe category that names its concept, in the order in which the
            data first mentions the categories; or one for all of them. () takes what the data says
            is unsafe about them (its column `unsafe_objects`), else the categories' own names.
        batch: Pairs per step; None is the published 128, and 32 for small encoders.
        lam: The paper's lambda: weight of holding safe prompts against moving unsafe ones; None is
            the published 0.3, and 0.6 for small encoders.
        alpha_n: The paper's alpha: how far targets are taken off the concept, as a norm of a
            CLIP-L reading; other encoders get the same share of their readings' norm. None is the
            published value (DES 200, SAGE 205), and 50 for small encoders.
        empty: Hold "" as well, the condition of classifier-free guidance. False is the paper's.
    """

    # The published recipe: AdamW's own weight decay, a constant rate, all epochs.
    epochs: int = 2
    batch: int | None = None  # type: ignore[assignment]  # resolved by `recipe`
    decay: float = 0.01
    anneal: bool = False
    patience: int = 0

    concepts: tuple[str, ...] = ()
    lam: float | None = None
    alpha_n: float | None = None
    empty: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lam is not None and not 0 <= self.lam <= 1:
            raise BadInput(f"lam weighs holding against moving; it is from 0 to 1, not {self.lam}.")
        if self.alpha_n is not None and self.alpha_n < 0:
            raise BadInput(f"alpha_n must be at least 0, not {self.alpha_n}.")
        for text in self.concepts:
            if not text.strip():
                raise BadInput("concepts has an empty entry; give every category a word or two.")

    published: ClassVar[Recipe]

    def recipe(self, model: TextToImage) -> Recipe:
        """The settings of this run: those given, else published or, for small encoders, ours."""
        own = SMALL if self.small(model) else self.published
        return Recipe(
            lam=own.lam if self.lam is None else self.lam,
            alpha_n=own.alpha_n if self.alpha_n is None else self.alpha_n,
            batch=self.batch or own.batch,
        )

    # What stays constant

    def gather(
        self, model: TextToImage, data: TextData, *, seed: int, watch: Watch | None = None
    ) -> Material:
        """The split, the original reading of every prompt, directions and targets."""
        split, encoders, recipe = data.split(seed), self.chosen(model), self.recipe(model)
        concepts = named(data.unsafe_prompts, self.concepts)
        unsafe = (*split.unsafe, *split.unsafe_check)
        safe = (*split.safe, *split.safe_check)
        tau = remember(model, ["", *concepts.values(), *texts(safe), *texts(unsafe)], encoders)
        for category, text in concepts.items():
            _require_words(tau, category, text)
        book = list(dict.fromkeys(texts(split.safe)))
        n = tau(list(concepts.values()))
        rows = tau.rows_of(book)
        scale = {name: size(p[rows], "flatten").mean().item() for name, p in tau.pieces.items()}
        return Material(
            recipe=recipe,
            split=split,
            tau=tau,
            concepts=concepts,
            n=n,
            n_hat={name: F.normalize(_flat(piece), dim=1) for name, piece in n.items()},
            alpha={
                name: recipe.alpha_n * in_clip_units(model.family, piece, scale[name])
                for name, piece in n.items()
            },
            goals=_goals(tau, texts(unsafe), book),
            scale=scale,
            encoders=encoders,
            hashes=data.hashes(),
        )

    def info(self, material: Material) -> dict[str, Any]:
        """What the weights were learnt from, and alpha as it was in each piece's own norm."""
        return {
            "data": material.hashes,
            "split": {name: len(getattr(material.split, name)) for name in Split.__annotations__},
            "recipe": asdict(material.recipe),
            "concepts": dict(material.concepts),
            "scale": material.scale,
            "alpha": material.alpha,
        }

    # Pairs

    def pairs(self, material: Material) -> int:
        """Pairs per epoch: the longer list once, the shorter repeated."""
        return max(len(material.split.safe), len(material.split.unsafe))

    @property
    def least(self) -> int:
        """A last batch of fewer pairs joins the one before it."""
        return 1

    def steps(self, material: Material) -> int:
        """The longer list is read once."""
        return len(pages(self.pairs(material), material.recipe.batch, self.least))

    def batches(self, material: Material, epoch: int, rng: torch.Generator) -> Iterator[Batch]:
        """Both lists shuffled and zipped: who is paired with whom means nothing."""
        n = self.pairs(material)
        safe = shuffled(texts(material.split.safe), n, rng)
        unsafe = shuffled(material.split.unsafe, n, rng)
        for page in pages(n, material.recipe.batch, self.least):
            yield Batch(tuple(safe[page]), tuple(unsafe[page]), material)

    # The loss

    def terms(self, now: Reading, batch: Batch) -> dict[str, Tensor]:
        """L_u, L_s, L_n, and L_0 for the empty prompt: means over the pieces."""
        then = batch.material.tau(batch.rows)
        each = [self._terms(name, batch.parts(now[name]), batch.parts(then[name]), batch)
                for name in now]  # fmt: skip
        return {term: torch.stack([one[term] for one in each]).mean(0) for term in each[0]}

    def _terms(self, name: str, here: Parts, then: Parts, batch: Batch) -> dict[str, Tensor]:
        """The terms on one piece: its readings now, and the original ones."""
        material = batch.material
        shift = material.alpha[name] * material.n_hat[name][batch.concept_rows]
        t = material.targets(name, batch.unsafe)
        found = {
            "L_u": cosdist(here.u, t).mean(),
            "L_s": (cosdist(here.s, then.s) + cosdist(here.s + shift, then.s)).mean(),
            "L_n": cosdist(here.n, then.e_0).mean(),
        }
        if self.empty:
            found["L_0"] = cosdist(here.e_0, then.e_0).mean()
        return found

    def objective(self, terms: Mapping[str, Any], lam: float) -> Any:
        """lam * (L_s + L_0) + (1 - lam) * (L_u + L_n)."""
        held = terms["L_s"] + terms.get("L_0", 0.0)
        return lam * held + (1 - lam) * (terms["L_u"] + terms["L_n"])

    def loss(self, model: TextToImage, batch: Batch, rng: torch.Generator) -> Loss:
        """The objective on one batch of pairs."""
        terms = self.terms(batch.material.tau.now(model, batch.rows), batch)
        total = self.objective(terms, batch.material.recipe.lam)
        return Loss(total, {name: term.item() for name, term in terms.items()})

    @torch.no_grad()
    def check(self, model: TextToImage, material: Material) -> dict[str, float]:
        """The objective on held-out prompts; `drift` and `cosine` as for every text-side method."""
        split = material.split
        n = max(len(split.safe_check), len(split.unsafe_check))
        sums: dict[str, float] = {}
        for page in pages(n, material.recipe.batch, self.least):
            rows = range(*page.indices(n))
            batch = Batch(
                tuple(split.safe_check[i % len(split.safe_check)].text for i in rows),
                tuple(split.unsafe_check[i % len(split.unsafe_check)] for i in rows),
                material,
            )
            now = material.tau.now(model, batch.rows)
            plain = moved(now, material.tau(batch.rows))
            sides = {
                "drift": plain["drift"][: len(rows)].mean(),
                "cosine": plain["cosine"][len(rows) : 2 * len(rows)].mean(),
            }
            for name, term in (self.terms(now, batch) | sides).items():
                sums[name] = sums.get(name, 0.0) + term.item() * len(rows) / n
        lam = material.recipe.lam
        return {"lam": lam, "objective": self.objective(sums, lam), **sums}


@dataclass(frozen=True)
class Material:
    """What stays constant while training; all of it from the original encoders.

    Args:
        recipe: The settings of this run.
        split: Prompts to learn from and to check with.
        tau: The original readings.
        concepts: The concept prompt of each category.
        n: Their readings.
        n_hat: Their directions, by piece: the flattened readings with norm 1.
        alpha: What is taken off along them, by piece.
        goals: Each unsafe prompt's s*, by piece.
        scale: Mean norm of a safe reading, by piece.
        encoders: The encoders that are trained.
        hashes: SHA-256 of each prompt set.
    """

    recipe: Recipe
    split: Split
    tau: Reference
    concepts: Mapping[str, str]
    n: Reading
    n_hat: Mapping[str, Float[Tensor, "concept dim"]]
    alpha: dict[str, float]
    goals: Mapping[str, Mapping[str, str]]
    scale: dict[str, float]
    encoders: tuple[str, ...]
    hashes: dict[str, str]

    def rows_of(self, prompts: Sequence[Prompt]) -> Int[Tensor, " prompt"]:
        """Which concept each unsafe prompt belongs to."""
        places = {category: i for i, category in enumerate(self.concepts)}
        return torch.tensor([places[prompt.category] for prompt in prompts], dtype=torch.long)

    def targets(self, name: str, unsafe: Sequence[Prompt]) -> Float[Tensor, "prompt dim"]:
        """t = s* - alpha * n_hat on one piece."""
        far = self.tau.piece(name, [self.goals[name][prompt.text] for prompt in unsafe])
        return _flat(far) - self.alpha[name] * self.n_hat[name][self.rows_of(unsafe)]


@dataclass(frozen=True)
class Batch:
    """Pairs of a safe and an unsafe prompt; the concepts and "" are read along with them."""

    safe: tuple[str, ...]
    unsafe: tuple[Prompt, ...]
    material: Material

    @property
    def rows(self) -> list[str]:
        """Everything that is read, in the order of `parts`."""
        return [*self.safe, *texts(self.unsafe), *self.material.concepts.values(), ""]

    @property
    def concept_rows(self) -> Int[Tensor, " pair"]:
        """Each pair's concept: that of its unsafe prompt."""
        return self.material.rows_of(self.unsafe)

    def parts(self, piece: Piece) -> Parts:
        """A piece of `rows` taken apart."""
        b, x = len(self.safe), _flat(piece)
        return Parts(x[:b], x[b : 2 * b], x[2 * b : -1], x[-1:])


@dataclass(frozen=True)
class Parts:
    """Flattened readings of a batch, in the paper's letters."""

    s: Float[Tensor, "pair dim"]
    u: Float[Tensor, "pair dim"]
    n: Float[Tensor, "concept dim"]
    e_0: Float[Tensor, "1 dim"]


def cosdist(a: Float[Tensor, "row dim"], b: Float[Tensor, "#row dim"]) -> Float[Tensor, " row"]:
    """1 - cos, row by row."""
    return 1 - F.cosine_similarity(a, b, dim=-1)


def farthest(
    u: Float[Tensor, "row dim"],
    book: Float[Tensor, "entry dim"],
    *,
    block: int = 1024,
    device: torch.device | None = None,
) -> Int[Tensor, " row"]:
    """For each row the entry of a codebook with the *lowest* cosine to it, the first if several.

    Exact, and in blocks, so that a large codebook is never copied or compared as a whole.

    Args:
        block: Rows, and entries, that are on the device at a time.
        device: Where to compare; where they are if None.
    """

    def unit(x: Tensor) -> Tensor:
        return F.normalize(x.to(device or x.device), dim=1)

    found = []
    for rows in map(unit, u.split(block)):
        lowest = rows.new_full((len(rows),), torch.inf)
        at = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
        for start in range(0, len(book), block):
            cos, i = (rows @ unit(book[start : start + block]).T).min(1)
            at = torch.where(cos < lowest, i + start, at)
            lowest = torch.minimum(lowest, cos)
        found.append(at)
    return torch.cat(found)


def named(unsafe: Sequence[Prompt], concepts: Sequence[str]) -> dict[str, str]:
    """The concept prompt of each category.

    Raises:
        BadInput: A category has none.
    """
    categories = tuple(dict.fromkeys(prompt.category for prompt in unsafe))
    if len(concepts) == 1:
        return dict.fromkeys(categories, concepts[0])
    if not concepts:
        return {category: _own(category, unsafe) for category in categories}
    if len(concepts) != len(categories):
        raise BadInput(
            f"concepts names {len(concepts)} ({', '.join(concepts)}) for {len(categories)} "
            f"categories ({', '.join(c or 'none' for c in categories)}); give one for all or "
            "one for each, in this order."
        )
    return dict(zip(categories, concepts, strict=True))


def _own(category: str, unsafe: Sequence[Prompt]) -> str:
    """What the data itself calls a category's concept.

    Its objects serve better than its name where there are any: a small encoder may never have read
    the name ("gore"), and the objects tell unsafe prompts from safe ones in every category.
    """
    columns = (p.meta.get("unsafe_objects", "") for p in unsafe if p.category == category)
    objects = dict.fromkeys(name for column in columns for name in column.split("|") if name)
    if objects or category:
        return ", ".join(objects) or category.replace("_", " ").replace("-", " ")
    raise BadInput(
        "some unsafe prompts have no category, so their concept has no name; fill the column "
        "'category', or name the concept: concepts=('...',), --set concepts=WORD."
    )


def in_clip_units(family: str, piece: Piece, scale: float) -> float:
    """What a published norm is multiplied with on another encoder; 1 on CLIP-L in SD 1.x."""
    if family == "sd1" and tuple(piece.states.shape[1:]) == CLIP_L:
        return 1.0
    return scale / CLIP_L_NORM


def pages(n: int, batch: int, least: int = 1) -> list[slice]:
    """`n` rows cut into batches; a last one of fewer than `least` rows joins the one before."""
    starts = list(range(0, n, batch))
    if len(starts) > 1 and n - starts[-1] < least:
        starts.pop()
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], n], strict=True)]


def _goals(tau: Reference, unsafe: Sequence[str], book: Sequence[str]) -> dict[str, dict[str, str]]:
    """Each unsafe prompt's farthest safe prompt, by piece."""
    goals = {}
    for name, piece in tau.pieces.items():
        u, entries = (_flat(piece[tau.rows_of(these)]) for these in (unsafe, book))
        at = farthest(u, entries, device=tau.device).tolist()
        goals[name] = {text: book[i] for text, i in zip(unsafe, at, strict=True)}
    return goals


def _require_words(tau: Reference, category: str, text: str) -> None:
    for encoder, (ids, _) in tau.tokens.items():
        if torch.equal(ids[tau.rows[text]], ids[tau.rows[""]]):
            raise BadInput(
                f"the concept {text!r} of the category {category!r} has no tokens that {encoder} "
                "reads; name it with a word: concepts=('...',), --set concepts=WORD."
            )


def _flat(piece: Piece) -> Float[Tensor, "row dim"]:
    return piece.states.flatten(1)
