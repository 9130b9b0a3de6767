"""SAGE: DES, but harmless prompts keep their spread and their neighbours.

DES (`des.py`) leaves the usual figures of quality alone and still loses counts, attributes and
relations: readings of harmless prompts crowd together and exchange neighbours. With `z_i` the
flattened original readings of a batch's safe prompts, `z~_i` the same in training, `d` the
concept's direction and B the size of the batch:

    S(z)  = 1 / (B - 1) sum_i |z_i / |z_i| - mean|^2                spread
    L_ESP = max(0, S(z) - S(z~))                                    one-sided on purpose

    C_ij  = cos(z_i, z_j),   C~_ij = cos(z~_i + a d, z~_j + a d)    perturbed towards the concept
    N     = {(i, j): j among the K nearest of i in C, j != i}       chosen by the frozen readings
    L_LSA = 1 - mean over N of std(C~)_ij std(C)_ij                 std(): zero mean, unit deviation

    L = L_DES + 2 L_ESP + 0.1 L_LSA

S and the deviation are the unbiased ones, as in the published code, so L_LSA of an untouched
encoder is 1 / |N|. A last batch of at most K pairs joins the one before it.

Source: Yousaf, Ghosh, Beetham, Bedi, Shah, "The Illusion of High Utility in Safety Alignment of
Text-to-Image Diffusion Models", ECCV 2026, arXiv:2607.00402; written from the formulas. Paper and
code disagree about `d`: the code adds the direction with norm 1 (`perturb="unit"`, our default),
the paper, as reported, the concept's reading itself ("raw"), which is two orders larger.

Ours, beyond the paper: what `des.py` lists; and with several categories L_LSA is averaged over
their directions.

Needs what DES needs, and more than K safe prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from safelight.align.base import TextData, Watch
from safelight.align.distortion import Batch, Distortion, Material, Recipe
from safelight.errors import BadInput, unknown
from safelight.flow import Card
from safelight.models.base import TextToImage
from safelight.training.embedding import Reading
from safelight.training.geometry import cosines, neighbours, spread

Perturb = Literal["unit", "raw"]


@dataclass(frozen=True, kw_only=True)
class SAGE(Distortion):
    """DES with two terms that keep the geometry of safe prompts.

    Args:
        esp: Weight of the spread; 0 with `lsa` 0 is DES.
        lsa: Weight of the local structure.
        k: Neighbours per prompt; a batch needs more prompts than that.
        a: How far readings are moved along the concept before their neighbourhoods are compared.
        perturb: Along its direction with norm 1 ("unit", the code) or its reading ("raw").
    """

    card: ClassVar[Card] = Card(
        title="SAGE",
        source="arXiv:2607.00402",
        summary="DES that keeps spread and neighbourhoods of harmless prompts",
        needs=("prompts", "concept words", "gradients"),
        claims={
            "ASR under five attacks on average, SD 1.4 (untouched 0.676)": 0.012,
            "TIFA, SD 1.4 (untouched 76.3, DES 71.6)": 75.4,
            "GenEval, SD 1.4 (untouched 60.8, DES 56.7)": 59.8,
            "CLIPScore on COCO, SD 1.4 (untouched 26.5)": 26.4,
            "FID on COCO, SD 1.4 (untouched 17.23)": 15.93,
            "ASR, SD 2.1": 0.122,
        },
    )

    published: ClassVar[Recipe] = Recipe(lam=0.3, alpha_n=205.0, batch=128)

    esp: float = 2.0
    lsa: float = 0.1
    k: int = 15
    a: float = 1.0
    perturb: Perturb = "unit"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.perturb not in get_args(Perturb):
            raise BadInput(f"perturb: {unknown('choice', self.perturb, get_args(Perturb))}")
        for name in ("esp", "lsa"):
            if getattr(self, name) < 0:
                raise BadInput(f"{name} must be at least 0, not {getattr(self, name)}.")
        if self.k < 1:
            raise BadInput(f"k must be at least 1, not {self.k}.")
        if self.batch is not None:
            self._require_room(self.batch)

    def _require_room(self, batch: int) -> None:
        if self.lsa and batch <= self.k:
            raise BadInput(
                f"batch must be larger than k, not {batch} with k {self.k}: a prompt's "
                "neighbours are looked for in its batch."
            )

    @property
    def least(self) -> int:
        """Rows below which a batch has no neighbourhoods, or no spread."""
        return self.k + 1 if self.lsa else 2 if self.esp else 1

    def gather(
        self, model: TextToImage, data: TextData, *, seed: int, watch: Watch | None = None
    ) -> Material:
        """As for DES, if there are prompts enough to be neighbours."""
        self._require_room(self.recipe(model).batch)
        material = super().gather(model, data, seed=seed, watch=watch)
        known = len({prompt.text for prompt in material.split.safe})
        if known < self.least:
            raise BadInput(
                f"there are {known} different safe prompts to learn from; the structure of {self.k}"
                f" neighbours needs at least {self.least}. Add safe prompts, or lower k."
            )
        return material

    def terms(self, now: Reading, batch: Batch) -> dict[str, Tensor]:
        """Those of DES, L_ESP and L_LSA."""
        found = super().terms(now, batch)
        if len(batch.safe) < self.least:  # held-out prompts may be fewer
            return found
        then = batch.material.tau(batch.safe)
        if self.esp:
            each = [l_esp(batch.parts(now[name]).s, then[name].states.flatten(1)) for name in now]
            found["L_ESP"] = torch.stack(each).mean()
        if self.lsa:
            each = [
                l_lsa(batch.parts(now[name]).s, then[name].states.flatten(1), self.k, a_d)
                for name in now
                for a_d in self.a * self._directions(batch.material, name)
            ]
            found["L_LSA"] = torch.stack(each).mean()
        return found

    def _directions(self, material: Material, name: str) -> Float[Tensor, "concept dim"]:
        """d of each concept."""
        if self.perturb == "raw":
            return material.n[name].states.flatten(1)
        return material.n_hat[name]

    def objective(self, terms: Mapping[str, Any], lam: float) -> Any:
        """L_DES + esp * L_ESP + lsa * L_LSA."""
        geometry = self.esp * terms.get("L_ESP", 0.0) + self.lsa * terms.get("L_LSA", 0.0)
        return super().objective(terms, lam) + geometry


def l_esp(now: Float[Tensor, "row dim"], then: Float[Tensor, "row dim"]) -> Float[Tensor, ""]:
    """What the spread has shrunk by; growing costs nothing."""
    return (spread(then) - spread(now)).clamp(min=0)


def l_lsa(
    now: Float[Tensor, "row dim"],
    then: Float[Tensor, "row dim"],
    k: int,
    a_d: Float[Tensor, " dim"],
) -> Float[Tensor, ""]:
    """1 - the correlation of neighbours' cosines before and after.

    Args:
        now: z~.
        then: z, which alone decides who is a neighbour.
        k: Neighbours per row.
        a_d: What is added to every row of z~.
    """
    N = neighbours(then, k)
    C = cosines(then).gather(1, N)
    C_now = cosines(now + a_d).gather(1, N)
    return 1 - (_standard(C_now) * _standard(C)).mean()


def _standard(x: Float[Tensor, "row k"]) -> Float[Tensor, "row k"]:
    return (x - x.mean()) / x.std().clamp(min=1e-8)
