"""ESD: fine-tune the denoiser until it says of a concept the opposite of what it said.

For a concept c, with e the denoiser in training, e* the untouched one, and z_t a state of a
painting of c at time t,

    e_p = e*(z_t, t, c),   e_0 = e*(z_t, t, "")
    L   = mean (e(z_t, t, c) - [e_0 - eta (e_p - e_0)])^2

and nothing but e(z_t, t, c) has a gradient. Before the first step e = e*, so that
L = (1 + eta)^2 mean (e_p - e_0)^2. The prediction may be noise or velocity: at one (z_t, t) they
are affine in each other and the target's weights (1 + eta) - eta sum to 1.

`part` says what is trained, whole weights of

    "x"        cross-attention: for what a prompt names, such as styles
    "strict"   its keys and values
    "u"        all but cross-attention, the time embedding and the last layers: for what is seen
    "self"     self-attention
    "all"      everything

Several concepts share the steps: one is drawn for every row of a batch.

Source: Gandikota et al., "Erasing Concepts from Diffusion Models", arXiv:2303.07345, eq. 7, and the
authors' code. `eta` counts as in the paper; the later of the authors' scripts has the target
e_p - eta' (e_p - e_0), which is the same with eta' = eta + 1.
Needs names of concepts and gradients of the denoiser; no pictures.

Ours differs: a time is the sampler's own at the state's step (the authors' later script; the first
draws it within the step's fiftieth); with `painter="frozen"` one painting leaves several states;
small denoisers take fewer and larger steps where a setting is None.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from safelight.align.base import Loss, TextData, Trained, Watch
from safelight.errors import BadInput, Unsupported, unknown
from safelight.flow import Card, Prompt
from safelight.models.base import TextToImage
from safelight.training.data import shuffled
from safelight.training.pairs import pair
from safelight.training.rollout import States, rollouts
from safelight.training.weights import Loan, full, small

Part = Literal["x", "strict", "u", "self", "all"]
Painter = Literal["edited", "frozen"]

CROSS, OWN = "attn2", "attn1"  # by the names that diffusers gives them
NOT_U = (CROSS, "time_embedding", "conv_norm_out", "conv_out")
KEPT = 16  # states of each painting by the frozen model
CHECKED = 16  # states that are looked at after every epoch


@dataclass(frozen=True, kw_only=True)
class ESD(Trained):
    """Drive the denoiser away from concepts, by the opposite of their guidance.

    Args:
        epochs: Into how many parts the iterations are cut.
        batch: States per step, each of one concept.
        lr: Learning rate of Adam; None is 1e-5, and more for small denoisers.
        concepts: Names of what is to be removed; () is what the unsafe prompts have and their safe
            counterparts have not, or whole prompts that have no counterpart.
        part: What is trained: "x", "strict", "u", "self" or "all".
        eta: How far beyond the neutral prediction a concept is driven, as the paper counts.
        iterations: Steps over all epochs; None is 1000, and fewer for small denoisers.
        painter: Whose paintings the states are of: the "edited" model's as it is at that step, as
            in the paper, or the "frozen" one's, painted once.
        guidance: Scale with which they are painted.
        paintings: By the frozen model; 256, or 64 for small denoisers, if None.
        paint_steps: Sampler steps of a painting; 50, or 20 for small denoisers, if None.
    """

    card: ClassVar[Card] = Card(
        title="Erased Stable Diffusion (ESD)",
        source="arXiv:2303.07345",
        summary="fine-tunes the denoiser against its own guidance towards a concept",
        families=("sd1", "sdxl"),
        needs=("names of concepts", "gradients"),
        claims={
            "pictures with exposed parts, I2P, SD 1.4 796, u, eta 1": 134,
            "accuracy on erased Imagenette class, u, before 0.782": 0.126,
            "accuracy on other Imagenette classes, u, before 0.782": 0.632,
            "FID on COCO-30k, u, eta 1, untouched 14.50": 13.68,
            "post-ASR under UnlearnDiffAtk, nudity (independent)": 0.7605,
            "ASR of MMA, nudity (independent, Concept Steerers)": 0.127,
            "ASR of Ring-A-Bell, nudity (independent, Concept Steerers)": 0.2842,
        },
    )

    batch: int = 1
    lr: float | None = None
    anneal: bool = False
    patience: int = 0

    concepts: tuple[str, ...] = ()
    part: Part = "u"
    eta: float = 1.0
    iterations: int | None = None
    painter: Painter = "edited"
    guidance: float = 3.0
    paintings: int | None = None
    paint_steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, kind in (("part", Part), ("painter", Painter)):
            if getattr(self, name) not in get_args(kind):
                raise BadInput(f"{name}: {unknown('choice', getattr(self, name), get_args(kind))}")
        for name in ("iterations", "paintings", "paint_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadInput(f"{name} must be at least 1, not {value}.")
        if not self.eta >= 0:
            raise BadInput(f"eta must be 0 or more, not {self.eta}.")
        if any(not concept.strip() for concept in self.concepts):
            raise BadInput("a concept is empty; write it in words, such as concepts=beer,wine.")

    def rate(self, model: TextToImage) -> float:
        """As published, and larger for small denoisers."""
        return self.lr or (1e-4 if small(model) else 1e-5)

    def lend(self, model: TextToImage, rng: torch.Generator) -> AbstractContextManager[Loan]:
        """Whole weights of the part."""
        names = trainable(model, self.part)
        if not names:
            raise Unsupported(
                f"the denoiser of {model.name} has no weights of part={self.part}; {CROSS} and "
                f"{OWN} are the names that are known of cross- and self-attention. part=all is all."
            )
        return full(model, ["denoiser"], only=names)

    # What stays constant

    def gather(
        self, model: TextToImage, data: TextData | None, *, seed: int, watch: Watch | None = None
    ) -> Material:
        """The concepts, and states of the untouched model's paintings of them.

        Raises:
            BadInput: No concepts.
        """
        concepts = self.concepts or (named(data.unsafe_prompts) if data is not None else ())
        if not concepts:
            raise BadInput(
                "esd needs names of what is to be removed: concepts=('beer', 'wine'), on the "
                "command line --set concepts=beer,wine, or unsafe prompts (--unsafe)."
            )
        rng = torch.Generator().manual_seed(seed)
        n = self.paintings or (64 if small(model) else 256)
        steps = self.paint_steps or (20 if small(model) else 50)
        material = Material(
            concepts=concepts,
            steps=steps,
            iterations=self.iterations or (300 if small(model) else 1000),
            data={} if data is None or self.concepts else data.hashes(),
            categories=() if data is None or self.concepts else _categories(data),
        )
        with model.unpatched():
            if self.painter == "frozen":
                several = shuffled(concepts, max(n, len(concepts)), rng)
                painted = self._painted(model, several, steps, rng, min(KEPT, steps))
                material = replace(material, states=painted)
            checked = self._painted(model, shuffled(concepts, CHECKED, rng), steps, rng, 1)
        return replace(material, checked=checked)

    def _painted(
        self,
        model: TextToImage,
        concepts: Sequence[str],
        steps: int,
        rng: torch.Generator,
        keep: int,
    ) -> States:
        return rollouts(model, concepts, steps=steps, guidance=self.guidance, keep=keep, rng=rng)

    # Training

    def steps(self, material: Material) -> int:
        """The iterations, shared out over the epochs."""
        return -(-material.iterations // (self.epochs or 1))

    def batches(self, material: Material, epoch: int, rng: torch.Generator) -> Iterator[Batch]:
        """Concepts, in shuffled rounds."""
        n = self.steps(material)
        drawn = shuffled(material.concepts, n * self.batch, rng)
        for i in range(n):
            yield Batch(tuple(drawn[i * self.batch : (i + 1) * self.batch]), material)

    def loss(self, model: TextToImage, batch: Batch, rng: torch.Generator) -> Loss:
        """L."""
        at = self.states(model, batch, rng).to(model.device)
        total = self.errors(model, at).mean()
        return Loss(total, {"L": total.item()})

    def states(self, model: TextToImage, batch: Batch, rng: torch.Generator) -> States:
        """Of each concept a state on the way from noise to its picture, and e_p and e_0 there."""
        if batch.material.states is not None:
            return batch.material.states.draw(batch.concepts, rng)
        at = self._painted(model, batch.concepts, batch.material.steps, rng, keep=1)
        return _reread(model, at.to(model.device))

    def errors(self, model: TextToImage, at: States) -> Float[Tensor, " state"]:
        """L of every state."""
        e_n = model.predict(at.z_t, at.t, _told(model, at))
        goal = target(at.e_p, at.e_0, self.eta)
        return (e_n.float() - goal.float()).square().flatten(1).mean(1)

    @torch.no_grad()
    def check(self, model: TextToImage, material: Material) -> dict[str, float]:
        """L at fixed states of the untouched model's paintings."""
        assert material.checked is not None
        at = material.checked.to(model.device)
        return {"objective": self.errors(model, at).mean().item()}

    def info(self, material: Material) -> dict[str, Any]:
        """What the None settings came to, and what was removed."""
        return {
            "iterations": material.iterations,
            "paint_steps": material.steps,
            "concepts": list(material.concepts),
            "categories": list(material.categories),
            "data": material.data,
        }


@dataclass(frozen=True)
class Material:
    """What stays constant while training.

    Args:
        concepts: What is to be removed.
        steps, iterations: What the settings come to on this model.
        data: SHA-256 of the prompt sets that the concepts are from.
        categories: Of their prompts.
        states: Of the frozen model's paintings, if they are learnt from.
        checked: Of the same, to look at after every epoch.
    """

    concepts: tuple[str, ...]
    steps: int
    iterations: int
    data: dict[str, str]
    categories: tuple[str, ...] = ()
    states: States | None = None
    checked: States | None = None


@dataclass(frozen=True)
class Batch:
    """A concept for every row."""

    concepts: tuple[str, ...]
    material: Material


def target(
    e_p: Float[Tensor, "*state"], e_0: Float[Tensor, "*state"], eta: float
) -> Float[Tensor, "*state"]:
    """What is to be said about a concept: the neutral prediction, and as far beyond it."""
    return e_0 - eta * (e_p - e_0)


def trainable(model: TextToImage, part: str) -> frozenset[str]:
    """Names of the denoiser's weights that belong to a part."""
    return frozenset(
        name for name in model.parameters() if name.startswith("denoiser.") and belongs(name, part)
    )


def belongs(name: str, part: str) -> bool:
    """Whether a weight belongs to a part, by its name."""
    match part:
        case "x":
            return f".{CROSS}." in name
        case "strict":
            return f".{CROSS}.to_k." in name or f".{CROSS}.to_v." in name
        case "u":
            return not any(f".{one}." in name for one in NOT_U)
        case "self":
            return f".{OWN}." in name
    return True


def named(prompts: Sequence[Prompt]) -> tuple[str, ...]:
    """What prompts have and their safe counterparts have not, each once."""
    phrases = (pair(p.text, p.safe_prompt).phrase if p.safe_prompt else p.text for p in prompts)
    return tuple(dict.fromkeys(phrase for phrase in phrases if phrase.strip()))


def _categories(data: TextData) -> tuple[str, ...]:
    return tuple(sorted({prompt.category for prompt in data.unsafe_prompts} - {""}))


@torch.no_grad()
def _reread(model: TextToImage, at: States) -> States:
    """The same states with what the untouched model says of them."""
    with model.unpatched():
        e_p = model.predict(at.z_t, at.t, _told(model, at))
        neutral = model.empty(len(at))
        e_0 = model.predict(at.z_t, at.t, neutral)
    return replace(at, e_p=e_p, e_0=e_0)


@torch.no_grad()
def _told(model: TextToImage, at: States) -> Any:
    return model.encode(at.prompts)
