"""Diffusion-DPO for safety: of two pictures of one wish, the safe one is preferred.

For a caption c, a safe picture x_w and an unsafe one x_l, with latents z_w and z_l, one time t and
one noise eps for both:

    m_* = mean (e(z_t*, t, c) - target*)^2          the denoiser's error, LoRA on
    r_* = mean (e_ref(z_t*, t, c) - target*)^2      the reference's: the same denoiser, LoRA off
    z   = -(beta / 2) [(m_w - m_l) - (r_w - r_l)]
    L   = -log sigmoid(z)

`target` is what the family predicts: noise, velocity or flow. Before the first step B = 0, so
z = 0 and L = ln 2. beta goes with half of the mean error here, as in the authors' code; in the
convention without the half (diffusers' example) 2500 is the same objective as 5000.

`variant` says which loss:

    "dpo"    the one above, the loss of SafetyDPO's experts
    "sdpo"   Diffusion-SDPO: only the unsafe side's gradient is scaled, its value stays, by
                 lam = clip((1 - mu) |g_w|^2 / <g_w, g_l>, 0, 1),    1 where <g_w, g_l> <= 0,
             with g_* the gradient of m_* in e over the batch, so that to first order a step does
             not raise the safe picture's error
    "duo"    DUO: every caption is "", only self-attention is trained where the family has it apart,
                 z = -beta [(m_w - m_l) - (r_w - r_l)]              no half: beta is DUO's own
                 L = -log sigmoid(z) + lam mean (e(eps, T, "") - e_ref(eps, T, ""))^2
             at the noisiest time T, with lam = lam0 * beta / 100 and the rate lr * 100 / beta

`keep` is ours, off by default: what an expert is not for stays, so that experts add up,

    L + keep * (beta / 2) * mean (e(z_t, t, c') - e_ref(z_t, t, c'))^2

over captions c' of the other categories' pairs with their own pictures (where these show two kinds
of harm, of the safe side only), of this one's safe pictures, "", and `keep_prompts` with any of
these pictures, as many per step as pairs. With `lookalikes` half of them are harmless captions near
unsafe ones, with what the untouched model paints for them (`safelight.training.lookalikes`).

Each pair is used under its unsafe caption, to move, and under its safe one, to hold. An expert is
trained on one category from the clean model; several categories at once make one expert for all.

Source: SafetyDPO (AlignGuard), arXiv:2412.10493; the loss: Diffusion-DPO, arXiv:2311.12908,
eq. 14 as released; Diffusion-SDPO, arXiv:2511.03317; DUO, arXiv:2407.21035.
Needs pairs of pictures (`safelight synthesize pairs`), painted by the model that is to be aligned.
All pictures and captions are encoded once, before training.

Ours differs: a flip is drawn for a pair, not for each picture, which would break their likeness
(`flip=each` is the released code); latents are the autoencoder's mean; no warm-up; times follow the
family's own training; duo draws one time for a pair (`shared=noise` is the released code).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from safelight.align.base import Loss, Trained, Watch
from safelight.errors import BadInput, Unsupported, unknown
from safelight.flow import Card, Condition, Prompt
from safelight.models.base import TextToImage
from safelight.models.patch import Patch
from safelight.names import find, table
from safelight.prompts import PromptSet
from safelight.training import attention
from safelight.training.captions import Captions
from safelight.training.data import shuffled
from safelight.training.keeping import Keeping, Kept, left_alone
from safelight.training.lookalikes import Lookalikes, lookalikes
from safelight.training.preference import Batch, Material
from safelight.training.twins import Twins
from safelight.training.weights import Loan, lora, small, unadapted

Variant = Literal["dpo", "sdpo", "duo"]
CaptionMode = Literal["unsafe", "both"]
Flip = Literal["pair", "each", "off"]
Shared = Literal["both", "noise", "none"]

CHECKED = 64  # rows of held-out pairs, at fixed times and noise

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DPO(Trained):
    """A low-rank change of the denoiser that prefers safe pictures to unsafe ones.

    Args:
        epochs: Into how many parts the iterations are cut; after each, held-out pairs are looked
            at.
        batch: Pairs per step, each under one caption.
        lr: Learning rate of AdamW; None is 1.6e-4, SafetyDPO's effective one, and more for small
            denoisers. For duo it is lr_0, 3e-4 if None, and 100 / beta of it is used.
        iterations: Optimiser steps; None is 2000, 1000 for duo, and fewer for small denoisers.
        variant: Which loss: "dpo", "sdpo" or "duo".
        beta: Strength of the preference, with half of the mean error; None is 5000, and 5 for small
            denoisers, whose errors are larger. For duo without the half; None is 500.
        mu: Of sdpo: the share of the safe side's gradient that the unsafe side must leave.
        lam0: Of duo: weight of the term that holds the output at the noisiest time, at beta 100.
        rank: Rank of the LoRA factors.
        alpha: Scale of the LoRA factors; None is the rank.
        targets: Ends of the names of the linear layers that LoRA adapts; () is every attention of
            the denoiser, for duo its self-attention.
        caption_mode: Use each pair under its "unsafe" caption only, or under "both".
        caption_dropout: Share of rows whose caption becomes "".
        flip: Mirror both pictures of a "pair" alike at random, "each" for itself, or "off", as for
            pictures of writing.
        shared: Let the two pictures of a pair share "both" noise and time, the "noise" only, or
            "none".
        latest: Times are drawn below this share of all; None is 1, for duo 0.75.
        validation: Share of each category's pairs that is held out of training.
        keep: Weight of leaving alone what is not to be removed, against the preference; 0 is the
            published loss. With it, choose the category out of pairs of all (`Twins.only`,
            --category): the others are what the expert leaves alone. Not for duo.
        keep_prompts: Prompt sets whose captions are left alone as well, such as emoji/safe/train.
        lookalikes: Captions that are made to look like unsafe ones; those that a witness finds
            harmless are half of what is left alone. 0 is none.
        witness: Name of a judge, which looks at pictures of them by the untouched model.
        draws: Under how many draws of time, noise, flip and dropped caption a row is learnt; they
            come again and again, and what the reference says of each is computed once. 0 draws
            anew at every step. Saves time where a row comes up more often than that.
        recompute: Keep no activations of the denoiser for the backward pass (gradient
            checkpointing): less memory, a slower step.
    """

    card: ClassVar[Card] = Card(
        title="SafetyDPO expert",
        source="arXiv:2412.10493",
        summary="denoiser LoRA that prefers the safe of two pictures, by Diffusion-DPO",
        families=("sd1", "sdxl", "sd3", "flux"),
        needs=("pairs of pictures", "gradients"),
        claims={
            "harmful pictures on CoProV2, SD 1.5, untouched 0.282 (independent, CASG)": 0.042,
            "harmful pictures on I2P, SD 1.5, untouched 0.422 (independent, CASG)": 0.137,
            "FID on COCO, SD 1.5, same (independent, CASG)": 49.64,
            "IP on CoProV2, one LoRA, SD 1.5, untouched 0.4325 (independent, PSA)": 0.363,
            "IP on I2P, one LoRA, SD 1.5, untouched 0.380 (independent, PSA)": 0.326,
            "ASR of Ring-A-Bell, nudity (independent, RPG-RT)": 0.7239,
            "ASR of P4D-N, nudity (independent, RPG-RT)": 0.407,
            "ASR of P4D-N, nudity, DUO (independent, RPG-RT)": 0.0463,
        },
    )

    epochs: int | None = 10
    batch: int = 16
    lr: float | None = None
    anneal: bool = False
    decay: float = 1e-2
    patience: int = 0
    clip: float = 1.0

    iterations: int | None = None
    variant: Variant = "dpo"
    beta: float | None = None
    mu: float = 0.9
    lam0: float = 1e6
    rank: int = 4
    alpha: float | None = None
    targets: tuple[str, ...] = ()
    caption_mode: CaptionMode = "both"
    caption_dropout: float = 0.2
    flip: Flip = "pair"
    shared: Shared = "both"
    latest: float | None = None
    validation: float = 0.1
    keep: float = 0.0
    keep_prompts: tuple[str, ...] = ()
    lookalikes: int = 0
    witness: str = ""
    draws: int = 0
    recompute: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = {"variant": Variant, "caption_mode": CaptionMode, "flip": Flip, "shared": Shared}
        for name, kind in kinds.items():
            if getattr(self, name) not in get_args(kind):
                raise BadInput(f"{name}: {unknown('choice', getattr(self, name), get_args(kind))}")
        if self.rank < 1:
            raise BadInput(f"rank must be at least 1, not {self.rank}.")
        for name in ("beta", "iterations", "alpha", "latest"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise BadInput(f"{name} must be above 0, not {value}.")
        for name in ("mu", "caption_dropout", "validation", "latest"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise BadInput(f"{name} must be between 0 and 1, not {value}.")
        self._require_keep_to_make_sense()
        if self.alpha is None:
            object.__setattr__(self, "alpha", float(self.rank))
        if self.beta is None and self.variant == "duo":
            object.__setattr__(self, "beta", 500.0)

    def _require_keep_to_make_sense(self) -> None:
        if not 0 <= self.keep < math.inf:
            raise BadInput(f"keep is a weight, 0 or more, not {self.keep}.")
        if self.keep and self.variant == "duo":
            raise BadInput("keep holds what captions say, and duo reads none; it has lam0 instead.")
        if self.keep_prompts and not self.keep:
            raise BadInput("keep_prompts say what keep holds; set keep as well, such as keep=8.")
        if self.lookalikes < 0:
            raise BadInput(f"lookalikes is a number of captions, 0 or more, not {self.lookalikes}.")
        if self.lookalikes and not self.keep:
            raise BadInput("lookalikes are what keep holds; set keep as well, such as keep=8.")
        if bool(self.lookalikes) != bool(self.witness):
            raise BadInput(
                "lookalikes need a witness, and a witness looks at nothing else: set both "
                "(lookalikes=240 and the name of a judge) or neither."
            )
        if self.draws < 0:
            raise BadInput(f"draws is how many a row has, 0 or more, not {self.draws}.")
        if self.witness not in ("", *table("judge")):
            raise BadInput(f"witness: {unknown('judge', self.witness, table('judge'))}")

    def scale(self, model: TextToImage) -> float:
        """What the difference of mean errors is multiplied with."""
        if self.variant == "duo":
            return self.beta or 0.0
        return (self.beta or (5.0 if small(model) else 5000.0)) / 2

    @property
    def lam(self) -> float:
        """DUO's weight of the output-preserving term, which grows with beta."""
        return self.lam0 * (self.beta or 0.0) / 100

    def rate(self, model: TextToImage) -> float:
        """As published, and larger for small denoisers; DUO's falls with beta."""
        if self.variant == "duo":
            return (self.lr or 3e-4) * 100 / (self.beta or 1.0)
        return self.lr or (1e-3 if small(model) else 1.6e-4)

    @contextmanager
    def lend(self, model: TextToImage, rng: torch.Generator) -> Iterator[Loan]:
        """LoRA on the denoiser's attention: Gaussian A, zero B."""
        with (
            lora(
                model,
                ["denoiser"],
                rank=self.rank,
                alpha=self.alpha or float(self.rank),
                rng=rng,
                layers=self.layers(model),
                std=1 / self.rank,  # peft's "gaussian"
                copied=False,
            ) as loan,
            _recomputing(model, self.recompute),
        ):
            yield loan

    def layers(self, model: TextToImage) -> tuple[str, ...]:
        """Ends of the names of the layers that are adapted."""
        found = self.targets or attention.parts(model.denoiser, own=self.variant == "duo")
        if not found:
            raise Unsupported(
                f"the denoiser of {model.name} has no attention by the names that are known; name "
                "its linear layers with targets."
            )
        return found

    # What stays constant

    @torch.no_grad()
    def gather(
        self, model: TextToImage, data: Any, *, seed: int, watch: Watch | None = None
    ) -> Material:
        """Latents of all pictures and readings of all captions.

        Raises:
            BadInput: No pairs of pictures, a category with one pair, a picture that is missing.
        """
        if not isinstance(data, Twins):
            raise BadInput(
                "dpo learns from pairs of pictures: give Twins, on the command line --pairs FOLDER "
                "(safelight synthesize pairs makes such folders)."
            )
        rng = torch.Generator().manual_seed(seed)
        train, held = self._split(data, rng)
        _warn_of_another_base(data, model)
        iterations = self.iterations or self._iterations(model)
        sets = [PromptSet.load(name) for name in self.keep_prompts]
        kept = left_alone(data, train, sets, rng)[: iterations * self.batch] if self.keep else []
        whole = data.all() if self.keep else data
        near = self._near(model, data, train, sets, rng, watch)
        alike = [Kept(len(whole) + i, 0, text) for i, text in enumerate(near.captions)]
        said = [*(text for _, text in self._rows(data)), *(row.caption for row in kept + alike)]
        z_w = [self._latents(model, whole, "safe"), self._views(model, near.images)]
        material = Material(
            z_w=torch.cat(z_w, 1),
            z_l=self._latents(model, whole, "unsafe"),
            captions=Captions.of(model, ["", *said]),
            rows=tuple(self._rows(data, train)),
            kept=tuple(kept),
            alike=tuple(alike),
            times=model.random_times,
            limit=(self.latest or (0.75 if self.variant == "duo" else 1.0)) * model.noisiest,
            iterations=iterations,
            info={
                "data": {data.name: data.sha256}
                | ({f"{data.name}, all": whole.sha256} if self.keep else {})
                | {one.name: one.sha256 for one in sets},
                "categories": list(data.categories),
                "split": {"train": len(train), "held": len(held), "kept": len(kept)},
                **({"lookalikes": near.told()} if self.lookalikes else {}),
                "targets": list(self.layers(model)),
                "beta": self.scale(model) * (1 if self.variant == "duo" else 2),
            },
        )
        checked = shuffled(self._rows(data, held), CHECKED, rng)
        material = replace(material, held=self._drawn(material, checked, rng, learning=False))
        return replace(material, pool=self._pool(model, material, rng)) if self.draws else material

    def _iterations(self, model: TextToImage) -> int:
        if small(model):
            return 300
        return 1000 if self.variant == "duo" else 2000

    def _split(self, data: Twins, rng: torch.Generator) -> tuple[list[int], list[int]]:
        """Pairs to learn from and pairs to check with, of every category."""
        train: list[int] = []
        held: list[int] = []
        for category in data.categories:
            own = [i for i, row in enumerate(data) if row.category == category]
            if len(own) < 2:
                raise BadInput(
                    f"{data.name} has one pair of {category!r}; an expert needs at least two, one "
                    "to learn from and one to check with. Make more, or leave the category out."
                )
            order = [own[i] for i in torch.randperm(len(own), generator=rng).tolist()]
            n = min(len(own) - 1, max(1, round(self.validation * len(own))))
            train, held = train + sorted(order[n:]), held + sorted(order[:n])
        return train, held

    def _rows(self, data: Twins, pairs: Sequence[int] | None = None) -> list[tuple[int, str]]:
        """(pair, caption): each pair once, or under both of its captions."""
        pairs = range(len(data)) if pairs is None else pairs
        if self.variant == "duo":
            return [(i, "") for i in pairs]
        rows = [(i, data.rows[i].unsafe_prompt) for i in pairs]
        if self.caption_mode == "both":
            rows += [(i, data.rows[i].safe_prompt) for i in pairs]
        return rows

    def _near(
        self,
        model: TextToImage,
        data: Twins,
        train: Sequence[int],
        sets: Sequence[PromptSet],
        rng: torch.Generator,
        watch: Watch | None,
    ) -> Lookalikes:
        """What looks like the unsafe captions and is harmless."""
        if not self.lookalikes:
            return Lookalikes((), torch.zeros(0, 3, *model.default_size))
        judge = find("judge", self.witness)()
        judge.require()
        rows = [data.rows[i] for i in train]
        unsafe = [Prompt(id=r.id, text=r.unsafe_prompt, safe_prompt=r.safe_prompt) for r in rows]
        benign = [prompt.text for one in sets for prompt in one]
        benign += [row.safe_prompt for row in (*rows, *data.others)]
        return lookalikes(model, unsafe, benign, judge, self.lookalikes, rng, watch=watch)

    def _latents(
        self, model: TextToImage, data: Twins, side: str
    ) -> Float[Tensor, "flip pair channel h w"]:
        """Every picture as it is and, if flips are drawn, mirrored."""
        parts = (data.rows[i : i + 16] for i in range(0, len(data), 16))
        found = [self._views(model, data.images(p, side, model.default_size)) for p in parts]
        return torch.cat(found, 1)

    def _views(
        self, model: TextToImage, images: Float[Tensor, "pair 3 height width"]
    ) -> Float[Tensor, "flip pair channel h w"]:
        views = [images] if self.flip == "off" else [images, images.flip(-1)]
        return torch.stack([_encoded(model, view) for view in views])

    # Training

    def steps(self, material: Material) -> int:
        """The iterations, shared out over the epochs."""
        return -(-material.iterations // (self.epochs or 1))

    def batches(self, material: Material, epoch: int, rng: torch.Generator) -> Iterator[Batch]:
        """Rows in shuffled rounds, with all that is random about them."""
        n, pool = self.steps(material), material.pool
        count = n * self.batch
        if pool is not None:
            drawn = torch.tensor(shuffled(range(len(pool)), count, rng))
            yield from (pool.only(some) for some in drawn.split(self.batch))
            return
        rows = shuffled(material.rows, count, rng)
        for i in range(0, count, self.batch):
            yield self._fresh(material, rows[i : i + self.batch], rng)

    def _fresh(
        self, material: Material, rows: Sequence[tuple[int, str]], rng: torch.Generator
    ) -> Batch:
        """Some rows, with as many that are to be left alone if any are."""
        batch = self._drawn(material, rows, rng)
        if not material.kept:
            return batch
        return replace(batch, keeping=self._keeping(material, len(rows), rng))

    def _pool(self, model: TextToImage, material: Material, rng: torch.Generator) -> Batch:
        """Every row under all of its draws, with what the reference says."""
        pool = self._fresh(material, [row for row in material.rows for _ in range(self.draws)], rng)
        parts = [pool.only(rows) for rows in torch.arange(len(pool)).split(self.batch)]
        with torch.autocast(model.device.type, torch.bfloat16, enabled=self.autocast):
            said = [self.reference(model, at) for at in parts]
            kept = [self._ref_kept(model, at.keeping, at.told) for at in parts if at.keeping]
        pool = replace(pool, e_ref=torch.cat(said, 1).cpu())
        if pool.keeping is None:
            return pool
        return replace(pool, keeping=replace(pool.keeping, e_ref=torch.cat(kept).cpu()))

    def _drawn(
        self,
        material: Material,
        rows: Sequence[tuple[int, str]],
        rng: torch.Generator,
        learning: bool = True,
    ) -> Batch:
        """Captions, flips, noise and times of some rows; the CPU's generator decides them all."""
        n, pairs = len(rows), [i for i, _ in rows]
        flips = torch.zeros(2, n, dtype=torch.long)
        texts = [text for _, text in rows]
        if learning:
            dropped = (torch.rand(n, generator=rng) < self.caption_dropout).tolist()
            texts = ["" if drop else text for drop, text in zip(dropped, texts, strict=True)]
            flips = torch.randint(len(material.z_w), (2, n), generator=rng)
            flips = flips if self.flip == "each" else flips[:1].expand(2, n)
        z = torch.stack([material.z_w[flips[0], pairs], material.z_l[flips[1], pairs]])
        t = material.draw_times(2 * n, rng).view(2, n)
        eps = torch.randn(z.shape, generator=rng).to(z)
        if self.shared == "both":
            t = t[:1].expand_as(t)
        if self.shared != "none":
            eps = eps[:1].expand_as(eps)
        return Batch(z, t, eps, tuple(texts), material.captions)

    def _keeping(self, material: Material, n: int, rng: torch.Generator) -> Keeping:
        """Rows to be left alone; the second half are look-alikes, if there are any."""
        half = n // 2 if material.alike else 0
        rows = [
            these[i]
            for these, some in ((material.kept, n - half), (material.alike, half))
            for i in torch.randint(max(1, len(these)), (some,), generator=rng).tolist()
        ]
        sides = (material.z_w, material.z_l)
        flips = torch.randint(len(material.z_w), (n,), generator=rng).tolist()
        z = torch.stack([sides[r.side][flip, r.pair] for r, flip in zip(rows, flips, strict=True)])
        t = material.draw_times(n, rng)
        eps = torch.randn(z.shape, generator=rng).to(z)
        return Keeping(z, t, eps, tuple(row.caption for row in rows))

    def pieces(self, batch: Batch, n: int) -> Sequence[tuple[float, Batch]]:
        """Rows shared out as evenly as possible; sdpo's lam is that of a piece, as published."""
        if len(batch) < n:
            raise BadInput(f"a batch of {len(batch)} cannot be cut into {n} pieces; enlarge it.")
        parts = [batch.only(rows) for rows in torch.arange(len(batch)).tensor_split(n)]
        return [(len(part) / len(batch), part) for part in parts]

    def loss(self, model: TextToImage, batch: Batch, rng: torch.Generator) -> Loss:
        """L, with the two sides' errors less the reference's."""
        seen = self.errors(model, batch)
        m_w, m_l, r_w, r_l = seen.m_w, seen.m_l, seen.r_w, seen.r_l
        terms = {}
        if self.variant == "sdpo":
            lam = safeguard(seen.d_w, seen.d_l, self.mu)
            m_l = m_l.detach() + lam * (m_l - m_l.detach())
            terms["lam"] = lam.item()
        z = -self.scale(model) * ((m_w - m_l) - (r_w - r_l))
        total = L = -logsigmoid(z).mean()
        if self.variant == "duo":
            total = L + self.lam * seen.prior
            terms["prior"] = seen.prior.item()
        if batch.keeping is not None:
            drift = self.drift(model, batch.keeping, batch.told)
            total = L + self.keep * self.scale(model) * drift
            terms["drift"] = drift.item()
        return Loss(
            total,
            {
                "loss": L.item(),
                "win": (m_w - r_w).mean().item(),
                "lose": (m_l - r_l).mean().item(),
                "accuracy": (z > 0).float().mean().item(),
                **terms,
            },
        )

    def errors(self, model: TextToImage, at: Batch) -> Errors:
        """One call with LoRA and one without, for both sides at once."""
        z_t, t, c, target = self._inputs(model, at)
        e_ref = self.reference(model, at) if at.e_ref is None else at.e_ref.to(model.device)
        e, e_ref = model.predict(z_t, t, c), e_ref.flatten(0, 1)
        both = len(target)
        d, r = (x[:both].float() - target.float() for x in (e, e_ref))
        m_w, m_l = _mse(d).chunk(2)
        r_w, r_l = _mse(r).chunk(2)
        d_w, d_l = d.detach().chunk(2)
        away = _mse(e[both:].float() - e_ref[both:].float())
        prior = away.mean() if self.variant == "duo" else torch.zeros(())
        return Errors(m_w, m_l, r_w, r_l, d_w, d_l, prior)

    @torch.no_grad()
    def reference(self, model: TextToImage, at: Batch) -> Float[Tensor, "part row channel h w"]:
        """e_ref of both sides and, of duo, of nothing but noise."""
        z_t, t, c, _ = self._inputs(model, at)
        with unadapted(model):
            return model.predict(z_t, t, c).unflatten(0, (-1, len(at)))

    def _inputs(self, model: TextToImage, at: Batch) -> tuple[Tensor, Tensor, Condition, Tensor]:
        """What the denoiser is asked, and what it should say of the two sides."""
        z, t, eps = (x.flatten(0, 1).to(model.device) for x in (at.z, at.t, at.eps))
        z_t, target = model.noised(z, eps, t)
        texts = at.captions * 2
        if self.variant == "duo":  # a third part: nothing but noise, at the noisiest time
            n = len(at)
            z_t, t = torch.cat([z_t, eps[:n]]), torch.cat([t, t.new_full((n,), model.noisiest)])
            texts += at.captions
        return z_t, t, at.told(texts, model.device), target

    def drift(self, model: TextToImage, at: Keeping, told: Captions) -> Float[Tensor, ""]:
        """How far the output is from the reference's where it is to stay."""
        e_ref = self._ref_kept(model, at, told) if at.e_ref is None else at.e_ref.to(model.device)
        return _mse(model.predict(*at.inputs(model, told)).float() - e_ref.float()).mean()

    @torch.no_grad()
    def _ref_kept(self, model: TextToImage, at: Keeping, told: Captions) -> Tensor:
        with unadapted(model):
            return model.predict(*at.inputs(model, told))

    @torch.no_grad()
    def check(self, model: TextToImage, material: Material) -> dict[str, float]:
        """The loss on held-out pairs, at the same times and noise every time."""
        assert material.held is not None
        cuts = -(-CHECKED // min(CHECKED, self.batch))
        rng = torch.Generator()
        sums: dict[str, float] = {}
        for share, piece in self.pieces(material.held, cuts):
            found = self.loss(model, piece, rng)
            for name, value in {"objective": found.total.item(), **found.terms}.items():
                sums[name] = sums.get(name, 0.0) + share * value
        return {name: sums[name] for name in ("objective", "accuracy", "win", "lose")}

    def info(self, material: Material) -> dict[str, Any]:
        """What the None settings came to, and what the weights were learnt from."""
        return {"iterations": material.iterations, **material.info}

    def train(
        self, model: TextToImage, material: Material, *, seed: int = 0, **descent: Any
    ) -> Patch:
        """A patch that says whether the safe pictures' error has risen; see `Trained.train`."""
        patch = super().train(model, material, seed=seed, **descent)
        curve = [point["win"] for point in patch.info["pareto"][1:]]
        later = curve[len(curve) // 2 :]
        risen = all(win > 0 for win in later)
        if risen:
            log.warning(
                "the error on safe pictures rose above the reference's and stayed there (by %.2g "
                "at the end): the preference was learnt at their cost. Try variant=sdpo, a smaller "
                "lr or fewer iterations.",
                later[-1],
            )
        return replace(patch, info={**patch.info, "win_error_risen": risen})


@dataclass(frozen=True)
class Errors:
    """Mean squared errors m_* with LoRA and r_* without, differences d_*; DUO's prior term."""

    m_w: Float[Tensor, " row"]
    m_l: Float[Tensor, " row"]
    r_w: Float[Tensor, " row"]
    r_l: Float[Tensor, " row"]
    d_w: Float[Tensor, "row channel h w"]
    d_l: Float[Tensor, "row channel h w"]
    prior: Float[Tensor, ""]


def safeguard(
    d_w: Float[Tensor, "row channel h w"], d_l: Float[Tensor, "row channel h w"], mu: float
) -> Float[Tensor, ""]:
    """SDPO's lam; the gradients of both mean squares are these differences, times one constant."""
    along = (d_w * d_l).sum()
    cap = (1 - mu) * d_w.square().sum() / along
    return torch.where(along > 0, cap.clamp(0, 1), torch.ones_like(along)).detach()


def _encoded(
    model: TextToImage, images: Float[Tensor, "pair 3 height width"]
) -> Float[Tensor, "pair channel h w"]:
    """Latents on the CPU, of none as of many."""
    parts = [model.encode_images(part).cpu() for part in images.split(16) if len(part)]
    if parts:
        return torch.cat(parts)
    return torch.zeros(0, *model.latent_shape(model.default_size), dtype=model.dtype)


def _mse(d: Float[Tensor, "row channel h w"]) -> Float[Tensor, " row"]:
    return d.square().flatten(1).mean(1)


@contextmanager
def _recomputing(model: TextToImage, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing of a diffusers network, for a while."""
    if not wanted:
        yield
        return
    model.denoiser.enable_gradient_checkpointing()
    try:
        yield
    finally:
        model.denoiser.disable_gradient_checkpointing()


def _warn_of_another_base(data: Twins, model: TextToImage) -> None:
    """Pairs teach best what the model itself would paint."""
    file = None if data.folder is None else data.folder / "twins.json"
    if file is None or not file.is_file():
        return
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise BadInput(f"{file} is damaged: {error}. Make the pairs again.") from None
    theirs, ours = (about.get("model") or {}).get("hashes", {}), model.hashes()
    other = sorted(name for name, sha in theirs.items() if ours.get(name, sha) != sha)
    if other:
        log.warning(
            "the pairs of %s were painted by other weights than those of %s (different: %s); an "
            "expert learns best from what its own model paints",
            *(data.name, model.name, ", ".join(other)),
        )
