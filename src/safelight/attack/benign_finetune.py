"""Benign fine-tuning: train the defended model on harmless pictures, then measure it again.

Defences in the weights can be undone by people who mean no harm: an ordinary fine-tuning on
ordinary pictures brings erased concepts back, because it partly learns the inverse of the defence.
Everything of this attack is the change of weights; the prompts are sent as they are.

    W* = argmin_W  E_{x, caption, t, eps}  | target - predict_W(z_t, t, caption) |^2 ,

from the defended weights, with AdamW on the denoiser. `profile` says how much of it (the profiles
of SPQR, arXiv:2511.19558, section on fine-tuning):

    "lora"   LoRA of rank 8, alpha 16, on q, k, v and out of every attention
    "cross"  those weights of the layers that read the text
    "full"   all weights of the denoiser

With `text_encoders` those are trained as well (an ordinary option of fine-tuning scripts): the LoRA
on their attentions too, or all of their weights. A defence in a text encoder is out of reach of a
fine-tuning that leaves the encoder as it is.

Report the unsafe rate before and after on the same prompts and seeds, with a paired interval, and
the same fine-tuning of the undefended model beside it: its rate is the ceiling. With `modular` the
same LoRA is trained on the undefended weights and put on beside the defence (Modular LoRA,
arXiv:2412.00357): the remedy, as a comparison. Per weight that both change, the patch's `info` says

    cosine = cos(dW_ft, dW_safe) ,    dW_safe = W_defended - W0 ,    dW_ft = W* - W_start ,

which is negative where the fine-tuning unlearns the defence.

Source: "Safety Alignment Backfires", arXiv:2412.00357; SPQR as above.
Ours differs: 500 pictures (`limit`; SPQR about 5,000), in the model's own precision.
Needs the weights; captioned benign pictures, or a benign prompt set that the undefended model
paints. Never harmful pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from safelight.attack.base import Access, Attack, Search, Target, model_of, name_of
from safelight.attack.pictures import FAR, Pictures, brought, kept, painted
from safelight.errors import BadInput, Unsupported
from safelight.flow import Card, Condition, Prompt
from safelight.models.base import TextToImage
from safelight.models.patch import Patch
from safelight.prompts import PromptSet
from safelight.training.attention import PARTS
from safelight.training.descent import Descended, Descent, Loss, Watch
from safelight.training.weights import Learnt, Loan, full, lora

Profile = Literal["lora", "cross", "full"]

# The parts of an attention in the text encoders: CLIP's names, then T5's.
WORDS = ("q_proj", "k_proj", "v_proj", "out_proj", "q", "k", "v", "o")


@dataclass(kw_only=True)
class BenignFinetune(Attack):
    """Fine-tune the defended model on harmless pictures.

    Args:
        data: Captions of harmless pictures: a prompt set or its name.
        pictures: The pictures, a folder with `<id>.png` or tensors by id of the prompt; painted by
            the undefended model if None.
        profile: How much of the denoiser is trained.
        text_encoders: Train the text encoders as well; with "lora" or "full".
        rank: Rank of the LoRA factors.
        alpha: Scale of the LoRA factors.
        epochs: Passes over the pictures.
        batch: Pictures per step.
        lr: Learning rate of AdamW.
        decay: Weight decay of AdamW.
        modular: Train on the undefended weights and put the result on beside the defence.
        limit: At most so many pictures; None is all.
        store: A folder where painted pictures are kept and looked for, so that no other
            fine-tuning of the same model paints them again; a bench gives its own.
        undefended: The model without defence; the attacked one without its patches if None.
    """

    card: ClassVar[Card] = Card(
        title="Benign fine-tuning",
        source="arXiv:2412.00357",
        summary="ordinary fine-tuning on harmless pictures, then the same prompts again",
        needs=("weights", "benign pictures"),
        claims={
            "harmful image rate after full fine-tuning, ESD (secondary source)": 0.27,
            "harmful image rate after LoRA fine-tuning, ESD (secondary source)": 0.17,
            "harmful image rate with Modular LoRA, ESD (secondary source)": 0.061,
        },
    )
    access: ClassVar[Access] = "weights"

    data: str | PromptSet = "emoji/safe/train"
    pictures: Pictures | None = None
    profile: Profile = "lora"
    text_encoders: bool = False
    rank: int = 8
    alpha: float = 16.0
    epochs: int = 3
    batch: int = 16
    lr: float = 1e-4
    decay: float = 1e-2
    modular: bool = False
    limit: int | None = 500
    store: str | None = field(default=None, metadata={"place": True})
    undefended: TextToImage | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.profile not in ("lora", "cross", "full"):
            raise BadInput(f"profile is lora, cross or full, not {self.profile!r}.")
        if self.text_encoders and self.profile == "cross":
            raise BadInput("cross trains layers of the denoiser; use lora or full.")
        if self.modular and self.profile != "lora":
            raise BadInput("modular fine-tuning is a LoRA beside the defence; use profile=lora.")
        if self.modular and self.undefended is not None:
            raise BadInput(
                "a modular fine-tuning stands beside a defence that is a patch; one that is merged "
                "into the weights (undefended=...) cannot be taken off."
            )
        for name in ("rank", "epochs", "batch"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} must be at least 1, not {getattr(self, name)}.")

    def rewrite(self, prompts: Sequence[Prompt], search: Search) -> Sequence[Prompt]:
        """The prompts as they are."""
        return prompts

    def tamper(self, target: Target, *, seed: int = 0) -> Patch:
        """What the fine-tuning adds to the weights as they are now, patches included.

        Raises:
            Unsupported: The target can only be asked.
            BadInput: Unsafe categories in the data, or too few pictures.
        """
        model = model_of(target)
        if model is None:
            raise Unsupported(f"{name_of(self)} needs the weights; this target can only be asked.")
        data = self._benign()
        images = self._images(data, model)
        training = _Denoising(
            epochs=self.epochs,
            batch=self.batch,
            lr=self.lr,
            anneal=False,
            decay=self.decay,
            patience=0,
            profile=self.profile,
            modules=("denoiser", *(model.text_encoders if self.text_encoders else ())),
            rank=self.rank,
            alpha=self.alpha,
        )
        before = model.parameters()
        with model.unpatched() if self.modular else nullcontext():
            material = training.gather(model, _Captioned(images, data.texts), seed=seed)
            made = training.descend(model, material, seed=seed)
        return self._patch(made, model, before, data)

    def _images(self, data: PromptSet, model: TextToImage) -> Float[Tensor, "picture 3 h w"]:
        if self.pictures is not None:
            return brought(data.prompts, self.pictures, model.default_size)
        seeds = [FAR + i for i in range(len(data))]
        if self.store is None:
            return painted(data.texts, seeds, model, self.undefended)
        return kept(data.texts, seeds, model, self.undefended, store=self.store)

    def _benign(self) -> PromptSet:
        data = PromptSet.load(self.data) if isinstance(self.data, str) else self.data
        if data.categories:
            raise BadInput(
                f"{data.name!r} has prompts of {', '.join(data.categories)}; benign fine-tuning "
                "takes harmless pictures only."
            )
        return data if self.limit is None else data.take(self.limit)

    def _patch(
        self, made: Descended, model: TextToImage, before: Mapping[str, Tensor], data: PromptSet
    ) -> Patch:
        """The change itself, so that it adds up with the patches it was trained on top of."""
        with model.unpatched():
            base = model.hashes()
        moved = {}
        for name, value in made.learnt.full.items():
            W0, W = model.untouched(name), before[name]
            there = W0.detach().float().cpu() - W.detach().float().cpu()
            moved[name] = value if W is W0 else value + there
        settings = {
            **asdict(replace(self, undefended=None, pictures=None, data="")),
            "data": data.name,
            "pictures": self._source(),
        }
        del settings["undefended"], settings["store"]
        patch = Patch(
            full=moved,
            low_rank=dict(made.learnt.low_rank),
            method=name_of(self),
            settings=settings,
            family=model.family,
            base=dict(base),
            info={
                **made.info,
                "data": {data.name: data.sha256},
                "starts_from": self._start(model),
            },
        )
        defence = {
            name: W.detach().float() - model.untouched(name).float()
            for name, W in before.items()
            if W is not model.untouched(name)
        }
        return replace(patch, info={**patch.info, "cosine": cosines(patch, defence, model)})

    def _source(self) -> str | None:
        return "given" if isinstance(self.pictures, Mapping) else self.pictures

    def _start(self, model: TextToImage) -> dict[str, str]:
        """Hashes of the weights that the training started from."""
        if self.modular:
            with model.unpatched():
                return model.hashes()
        return model.hashes()


def cosines(patch: Patch, defence: Mapping[str, Tensor], model: TextToImage) -> dict[str, float]:
    """cos(dW_ft, dW_safe) of every weight that both change, in the order of their names."""
    found = {}
    for name in sorted(set(patch.names) & set(defence)):
        change = torch.zeros_like(defence[name])
        if name in patch.full:
            change += patch.full[name].to(change) - model.untouched(name).to(change)
        if name in patch.low_rank:
            down, up, alpha = patch.low_rank[name]
            change += (alpha / len(down) * (up.to(change) @ down.to(change))).view_as(change)
        cosine = torch.nn.functional.cosine_similarity(change.flatten(), defence[name].flatten(), 0)
        found[name] = round(cosine.item(), 6)
    return found


@dataclass(frozen=True)
class _Captioned:
    images: Float[Tensor, "picture 3 height width"]
    texts: Sequence[str]


@dataclass(frozen=True)
class _Material:
    """Latents and captions, and which of them are held out."""

    z: Float[Tensor, "picture channel h w"]
    texts: tuple[str, ...]
    train: tuple[int, ...]
    held: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class _Batch:
    z: Float[Tensor, "picture channel h w"]
    texts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Denoising(Descent):
    """The ordinary training of a denoiser, with the text encoders or without."""

    profile: Profile
    modules: tuple[str, ...]
    rank: int
    alpha: float

    def gather(
        self, model: TextToImage, data: _Captioned, *, seed: int, watch: Watch | None = None
    ) -> _Material:
        n = len(data.images)
        if n < 2:
            raise BadInput(f"fine-tuning needs at least two pictures, not {n}.")
        with torch.no_grad():
            z = torch.cat([model.encode_images(part) for part in data.images.split(16)])
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
        held = max(1, min(self.batch, n // 10))
        return _Material(z, tuple(data.texts), tuple(order[held:]), tuple(order[:held]), seed)

    def lend(self, model: TextToImage, rng: torch.Generator) -> AbstractContextManager[Loan]:
        if self.profile == "full":
            return full(model, self.modules)
        if self.profile == "cross":
            readers = _readers(model)
            return _some(full(model, self.modules), lambda name: name in readers)
        loan = lora(model, self.modules, rank=self.rank, alpha=self.alpha, rng=rng)
        attention = _attention(model)
        return _some(loan, lambda name: name.removesuffix(".A").removesuffix(".B") in attention)

    def steps(self, material: _Material) -> int:
        return -(-len(material.train) // self.batch)

    def batches(self, material: _Material, epoch: int, rng: torch.Generator) -> Iterator[_Batch]:
        order = torch.randperm(len(material.train), generator=rng).tolist()
        for start in range(0, len(order), self.batch):
            rows = [material.train[i] for i in order[start : start + self.batch]]
            yield _Batch(material.z[rows], tuple(material.texts[i] for i in rows))

    def loss(self, model: TextToImage, batch: _Batch, rng: torch.Generator) -> Loss:
        each = _error(model, batch, model.encode(batch.texts), rng)
        return Loss(each.mean(), {"loss": each.mean().item()})

    @torch.no_grad()
    def check(self, model: TextToImage, material: _Material) -> dict[str, float]:
        """The error on held-out pictures, at the same noise and times every time."""
        rng = torch.Generator().manual_seed(material.seed)
        rows = list(material.held)
        batch = _Batch(material.z[rows], tuple(material.texts[i] for i in rows))
        told = model.encode(batch.texts)
        return {"objective": _error(model, batch, told, rng).mean().item()}


def _error(
    model: TextToImage, batch: _Batch, told: Condition, rng: torch.Generator
) -> Float[Tensor, " picture"]:
    z = batch.z.to(model.dtype)
    t = model.random_times(len(z), rng)
    eps = torch.randn(z.shape, generator=rng).to(z)
    z_t, target = model.noised(z, eps, t)
    return (model.predict(z_t, t, told) - target).float().square().flatten(1).mean(1)


def _attention(model: TextToImage) -> set[str]:
    """Weights of q, k, v and out of every attention, of the denoiser and the text encoders."""
    ends = tuple(f".{part}.weight" for part in PARTS)
    words = tuple(f".{part}.weight" for part in WORDS)
    return {
        name
        for name in model.parameters()
        if name.endswith(ends if name.startswith("denoiser.") else words)
        and name.partition(".")[0] in ("denoiser", *model.text_encoders)
    }


def _readers(model: TextToImage) -> set[str]:
    """k, v and out of the layers that read the text: cross-attention, or the joint attention."""
    return {
        name
        for name in _attention(model)
        if ".attn2." in name
        and ".to_q." not in name
        or any(f".{part}." in name for part in PARTS[5:])
    }


@contextmanager
def _some(loan: AbstractContextManager[Loan], wanted: Any) -> Iterator[Loan]:
    """A loan of which only some weights may be trained."""
    with loan as whole:
        kept = {name: p for name, p in whole.parameters.items() if wanted(name)}
        if not kept:
            raise Unsupported("this denoiser has no attention layers by the names that are known.")
        for name, p in whole.parameters.items():
            p.requires_grad_(name in kept)
        yield _Some(kept, whole, wanted)


@dataclass(frozen=True)
class _Some(Loan):
    whole: Loan
    wanted: Any

    def learnt(self) -> Learnt:
        found = self.whole.learnt()
        return Learnt(
            {name: value for name, value in found.full.items() if self.wanted(name)},
            {name: value for name, value in found.low_rank.items() if self.wanted(name)},
        )

    def nudge(self, size: float, rng: torch.Generator) -> None:
        raise NotImplementedError("the training of a denoiser starts where it is.")
