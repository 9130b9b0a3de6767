"""SafeText: move unsafe prompts' embeddings away, hold safe ones, touch the text encoder only.

With `tau` the original text encoder, `tau_s` the trained copy, `D_u` unsafe and `D_s` safe prompts:

    L_e = mean over D_u of d_e(tau_s(p), tau(p))        effectiveness: to be made large
    L_u = mean over D_s of d_u(tau_s(p), tau(p))        utility: to be made small
    min over tau_s of  L_u - lambda * L_e

    d_u = Euclidean distance,   d_e = -|cos|  (the paper's "NegCosine"; -cos is a switch)

Source: Hu, Jiang, Gong, "SafeText", arXiv:2502.20623, eq. 3; metrics as quoted in its reviews. The
paper's lambda, learning rate, epochs and token positions are not public.

Ours, beyond the paper:
- *Stationary start.* At tau_s = tau both gradients vanish, so plain descent never leaves (and Adam
  leaves along rounding noise). A seeded relative perturbation of the weights decides instead, and
  for `lead` epochs the anchor below pulls, which leaves sooner and with half the drift.
- *Anchor.* Different is not safe. With `anchor` > 0 the term  anchor * L_a,  with L_a the mean over
  D_u of d_u(tau_s(p), tau(p'))  pulls an unsafe prompt towards a safe p': its `safe_prompt` where
  the data has one, else the safe training prompt nearest to it.
- *Variants.* A safe list is short, and words that it lacks drift with the unsafe ones. With
  `variants` > 0 safe prompts with words exchanged at random are held as well, but for the fifth
  of them that moved most towards unsafe prompts: those may be unsafe words the list lacks.
- *Units.* lambda weighs a cosine against a distance whose size depends on the encoder and on the
  reduction. With `relative` distances are divided by the mean norm of a safe embedding; the paper's
  lambda is then `lam` times that norm, and both are kept in the patch.
- *All encoders.* The loss is on the tensors that the denoiser really reads: each chosen encoder's
  token states, and its pooled vector where the family uses one; distances are averaged over them.

Needs two lists of prompts and gradients of the text encoder; no pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from safelight.align.base import Loss, Split, TextData, Watch
from safelight.align.text import TextSide, moved
from safelight.errors import BadInput, unknown
from safelight.flow import Card
from safelight.models.base import TextToImage
from safelight.training.augment import exchanged, vocabulary
from safelight.training.counterparts import destinations, harmless
from safelight.training.data import shuffled, texts
from safelight.training.embedding import (
    Distance,
    Reading,
    Reduction,
    Reference,
    distance,
    remember,
    size,
)
from safelight.training.weights import Loan


@dataclass(frozen=True, kw_only=True)
class SafeText(TextSide):
    """Align the text encoder with safe and unsafe prompts; leave the diffusion module alone.

    Args:
        d_u: Distance that holds safe prompts (and pulls unsafe ones to their anchor).
        d_e: Distance that drives unsafe prompts away.
        lam: The paper's lambda: weight of driving away against holding.
        reduction: Which token positions a distance sees.
        relative: Distances in units of a safe embedding's mean norm, so that `lam` carries over.
        anchor: Weight of the pull towards a safe counterpart; 0 is the paper's method.
        lead: Epochs at the start that pull to the anchor in any case, so that the stationary start
            is left in a direction that means something. 0 is the paper's method.
        variants: Copies of each safe prompt with one or two words exchanged for random words of the
            tokenizer's vocabulary; they join the safe side. 0 is the paper's method.
        margin: Stop pushing a prompt once its d_e exceeds this; None never stops.
        perturb: Relative size of the seeded perturbation that leaves the stationary start.
    """

    card: ClassVar[Card] = Card(
        title="SafeText",
        source="arXiv:2502.20623",
        summary="moves unsafe prompts' embeddings away and holds safe ones; text encoder only",
        needs=("prompts", "gradients"),
        claims={
            "NRR on each of four unsafe prompt sets, SD 1.4, above (secondary source)": 0.987,
            "NRR on adversarial prompts, SD 1.4, above (secondary source)": 0.984,
            "LPIPS on three safe prompt sets, SD 1.4, below (secondary source)": 0.218,
            "FID on three safe prompt sets, SD 1.4, below (secondary source)": 32.4,
        },
    )

    # Measured on the Emoji World's text encoder; the paper's own values are not public.
    epochs: int = 4
    batch: int = 64
    d_u: Distance = "euclidean"
    d_e: Distance = "neg_abs_cosine"
    lam: float = 0.3
    reduction: Reduction = "flatten"
    relative: bool = True
    anchor: float = 0.0
    lead: int = 1
    variants: int = 1
    margin: float | None = None
    perturb: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, kind in (("d_u", Distance), ("d_e", Distance), ("reduction", Reduction)):
            if getattr(self, name) not in get_args(kind):
                raise BadInput(f"{name}: {unknown('choice', getattr(self, name), get_args(kind))}")
        if self.batch < 4:
            raise BadInput(f"batch must be at least 4 (half safe, half unsafe), not {self.batch}.")

    def gather(
        self, model: TextToImage, data: TextData, *, seed: int, watch: Watch | None = None
    ) -> Material:
        """The split, tau's reading of every prompt, and each unsafe prompt's anchor."""
        split = data.split(seed)
        encoders = self.chosen(model)
        unsafe = (*split.unsafe, *split.unsafe_check)
        counterparts = [p.safe_prompt for p in unsafe if p.safe_prompt]
        words = vocabulary(model.tokenizers[encoders[0]])
        rng = torch.Generator().manual_seed(seed)
        pairs = exchanged(texts(split.safe) * self.variants, words, rng)
        everything = ["", *texts((*split.safe, *split.safe_check, *unsafe)), *counterparts]
        tau = remember(model, [*everything, *(new for _, new in pairs)], encoders)
        extra = harmless(tau, pairs, texts(split.unsafe))
        scale = {
            name: size(p, self.reduction).mean().item()
            for name, p in tau(["", *texts(split.safe)]).items()
        }
        anchors = destinations(tau, unsafe, texts(split.safe)) if self.anchor or self.lead else {}
        held = (*texts(split.safe), *extra)
        return Material(split, held, tau, anchors, scale, encoders, data.hashes())

    def start(self, loan: Loan, rng: torch.Generator) -> None:
        """Leave the stationary point, in a direction that the seed decides."""
        if self.perturb:
            loan.nudge(self.perturb, rng)

    def steps(self, material: Material) -> int:
        """An epoch reads every unsafe prompt once."""
        return -(-len(material.split.unsafe) // (self.batch // 2))

    def batches(self, material: Material, epoch: int, rng: torch.Generator) -> Iterator[Batch]:
        """Half unsafe and half safe prompts; "" is always among the safe ones.

        "" is the condition of classifier-free guidance: were it to move, every picture would.
        """
        half, steps = self.batch // 2, self.steps(material)
        unsafe = shuffled(texts(material.split.unsafe), half * steps, rng)
        safe = shuffled(material.held, (half - 1) * steps, rng)
        for i in range(steps):
            kept = safe[i * (half - 1) : (i + 1) * (half - 1)]
            moved = tuple(unsafe[i * half : (i + 1) * half])
            yield Batch(("", *kept), moved, material, self._pull(epoch))

    def _pull(self, epoch: int) -> float:
        return max(self.anchor, 1.0) if epoch <= self.lead else self.anchor

    def loss(self, model: TextToImage, batch: Batch, rng: torch.Generator) -> Loss:
        """L_u - lam * L_e + anchor * L_a."""
        terms = {name: d.mean() for name, d in self._terms(_read(model, batch), batch).items()}
        return Loss(
            self._objective(terms, batch.pull), {name: term.item() for name, term in terms.items()}
        )

    def _objective(self, terms: Mapping[str, Any], pull: float) -> Any:
        return terms["L_u"] - self.lam * terms["L_e"] + pull * terms.get("L_a", 0.0)

    def _terms(self, now: Reading, batch: Batch) -> dict[str, Tensor]:
        """d_u of every safe prompt, d_e (and d_u to its anchor) of every unsafe one."""
        n, tau = len(batch.safe), batch.material.tau
        kept = {name: piece[:n] for name, piece in now.items()}
        moved = {name: piece[n:] for name, piece in now.items()}
        scale = batch.material.scale
        terms = {
            "L_u": self._apart(kept, tau(batch.safe), self.d_u, scale),
            "L_e": self._apart(moved, tau(batch.unsafe), self.d_e, scale),
        }
        if self.margin is not None:
            terms["L_e"] = terms["L_e"].clamp(max=self.margin)
        if batch.pull:
            goals = [batch.material.anchors[text] for text in batch.unsafe]
            terms["L_a"] = self._apart(moved, tau(goals), self.d_u, scale)
        return terms

    def _apart(
        self, now: Reading, then: Reading, metric: Distance, scale: Mapping[str, float]
    ) -> Tensor:
        """The distance of each row, averaged over the pieces."""
        power = {"euclidean": 1, "squared_l2": 2}.get(metric, 0) if self.relative else 0
        each = [
            distance(now[name], then[name], metric, self.reduction) / scale[name] ** power
            for name in now
        ]
        return torch.stack(each).mean(0)

    @torch.no_grad()
    def check(self, model: TextToImage, material: Material) -> dict[str, float]:
        """The objective on held-out prompts, and two figures that compare across settings.

        `drift` is the mean relative Euclidean shift of a safe reading, `cosine` the mean |cos| of
        an unsafe reading to where it was; both over all token positions.
        """
        rows: dict[str, list[Tensor]] = {}
        for batch in material.held_out(self.anchor):
            now = _read(model, batch)
            for name, part in (self._terms(now, batch) | _plain(now, batch)).items():
                rows.setdefault(name, []).append(part)
        figures = {name: torch.cat(parts).mean().item() for name, parts in rows.items()}
        return {"lam": self.lam, "objective": self._objective(figures, self.anchor), **figures}

    def info(self, material: Material) -> dict[str, Any]:
        """What makes lambda comparable, and what the weights were learnt from."""
        return {
            "data": material.hashes,
            "held": len(material.held),
            "split": {name: len(getattr(material.split, name)) for name in Split.__annotations__},
            "scale": material.scale,
        }


@dataclass(frozen=True)
class Material:
    """What stays constant while training.

    Args:
        split: Prompts to learn from and to check with.
        held: Safe prompts to learn from, variants included.
        tau: The original encoders' readings.
        anchors: The safe counterpart of each unsafe prompt.
        scale: Mean norm of a safe reading, by piece.
        encoders: The encoders that are trained.
        hashes: SHA-256 of each prompt set.
    """

    split: Split
    held: tuple[str, ...]
    tau: Reference
    anchors: Mapping[str, str]
    scale: dict[str, float]
    encoders: tuple[str, ...]
    hashes: dict[str, str]

    def held_out(self, pull: float, size: int = 64) -> Iterator[Batch]:
        """The validation prompts in batches; one side may run out before the other."""
        safe, unsafe = ("", *texts(self.split.safe_check)), texts(self.split.unsafe_check)
        for i in range(0, max(len(safe), len(unsafe)), size):
            yield Batch(tuple(safe[i : i + size]), tuple(unsafe[i : i + size]), self, pull)


@dataclass(frozen=True)
class Batch:
    """Safe and unsafe prompts of one step, and how strongly the latter are pulled to anchors."""

    safe: tuple[str, ...]
    unsafe: tuple[str, ...]
    material: Material
    pull: float


def _read(model: TextToImage, batch: Batch) -> Reading:
    return batch.material.tau.now(model, (*batch.safe, *batch.unsafe))


def _plain(now: Reading, batch: Batch) -> dict[str, Tensor]:
    """`drift` of each safe row and `cosine` of each unsafe row, whatever the settings."""
    n = len(batch.safe)
    plain = moved(now, batch.material.tau([*batch.safe, *batch.unsafe]))
    return {"drift": plain["drift"][:n], "cosine": plain["cosine"][n:]}
