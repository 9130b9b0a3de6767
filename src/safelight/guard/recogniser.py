"""What filters on text embeddings share: one vector per prompt, a small network, a threshold.

The vector is read from the *untouched* encoders, whatever patches are on the model, and from the
very embeddings that the encoders are given, learnt ones included. The network tells classes apart
(safe, and the unsafe ones); the score of a prompt is

    s = 1 - softmax(f((x - mean) / scale))[safe]

A threshold is calibrated on safe prompts that took no part in training nor in its stopping. Of `n`
of them with scores `s_(1) >= s_(2) >= ...`, and `k = floor(fpr (n + 1))`, it is `s_(k)`, and what
lies above is refused: the share of new safe prompts from the same source that is refused is then
Beta(k, n + 1 - k), whatever the scores' distribution, with mean `k / (n + 1) <= fpr`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import floor
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor, nn

from safelight.errors import BadInput, unknown
from safelight.flow import Condition, Prompt, Verdict, Written
from safelight.guard.trained import TrainedGuard
from safelight.models.base import TextToImage
from safelight.training.augment import exchanged, vocabulary
from safelight.training.data import TextData, texts
from safelight.training.descent import Loss, Watch

Which = Literal["eos", "mean", "pooled"]


@dataclass(frozen=True, kw_only=True)
class Recogniser(TrainedGuard):
    """A guard that recognises unsafe prompts by their embeddings; says what its network is.

    Args:
        encoders: Names of the encoders that are read; () is all of them.
        which: Which vector of each encoder: the state at the end mark, the mean of the content
            tokens' states, or the pooled vector (the state at the end mark where there is none).
        dropout: Share of the hidden units that is left out while training.
        counterparts: Whether the unsafe prompts' safe counterparts are learnt from as safe ones.
        variants: Copies of each safe prompt to learn from, with one or two words exchanged at
            random, so that a word that no list mentions is not taken for an unsafe one.
        fpr: Share of safe prompts that may be refused, by which the threshold is calibrated.
        held: Share of the safe training prompts that is kept for the calibration.
        threshold: Scores above it are unsafe; None is the calibrated one.
    """

    encoders: tuple[str, ...] = ()
    which: Which = "eos"
    dropout: float = 0.0
    counterparts: bool = True
    variants: int = 0
    fpr: float = 0.01
    held: float = 0.25
    threshold: float | None = None

    labels_ = ()  # type: tuple[str, ...]
    moments_ = None  # type: tuple[Tensor, Tensor] | None
    model_ = None  # type: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.which not in get_args(Which):
            raise BadInput(f"which: {unknown('choice', self.which, get_args(Which))}")
        for name in ("fpr", "held"):
            if not 0 < getattr(self, name) < 1:
                raise BadInput(f"{name} must be between 0 and 1, not {getattr(self, name)}.")

    @abstractmethod
    def hidden_widths(self) -> tuple[int, ...]:
        """Units of the hidden layers; () for a linear filter."""

    def network(self, model: TextToImage) -> nn.Module:
        dim = self.vectors(model, plain([""])).shape[1]
        found = Network(dim, self.hidden_widths(), len(self.labels_), self.dropout)
        if self.moments_ is not None:
            found.mean, found.scale = self.moments_
        return found

    # What it looks at

    def chosen(self, model: TextToImage) -> tuple[str, ...]:
        """The encoders that are read."""
        for name in self.encoders:
            if name not in model.text_encoders:
                raise BadInput(unknown("text encoder", name, model.text_encoders))
        return self.encoders or tuple(model.text_encoders)

    def reads(self, model: TextToImage) -> tuple[str, ...]:
        return self.chosen(model)

    @torch.no_grad()
    def vectors(
        self, model: TextToImage, written: Written, batch: int = 64
    ) -> Float[Tensor, "prompt dim"]:
        """What the network is told about prompts."""
        encoders = self.chosen(model)
        found = []
        with model.unpatched():
            for i in range(0, len(written.texts), batch):
                part = written.rows(range(i, min(i + batch, len(written.texts))))
                seen = model.encode_written(part, encoders)
                each = [read_vector(model, seen, name, self.which) for name in encoders]
                found.append(torch.cat(each, 1).float())
        return torch.cat(found)

    def judged(
        self, network: nn.Module, x: Float[Tensor, "prompt dim"]
    ) -> Float[Tensor, "prompt label"]:
        """The probability of each label; double, so that scores near 1 can be told apart."""
        return network(x).double().softmax(1)

    @torch.no_grad()
    def scores(self, written: Written) -> Float[Tensor, "prompt label"]:
        """The probabilities of prompts, "safe" first, once it is prepared for a model."""
        return self.judged(self.network_, self.vectors(self.model_, written)).cpu()

    @property
    def limit(self) -> float:
        """Scores above it are unsafe."""
        if self.threshold is not None:
            return self.threshold
        assert self.fitted_ is not None
        return float(self.fitted_.info["threshold"]["value"])

    def prepare(self, model: TextToImage) -> None:
        if self.fitted_ is not None:
            object.__setattr__(self, "labels_", tuple(self.fitted_.info["labels"]))
        super().prepare(model)
        object.__setattr__(self, "model_", model)

    def screen_prompts(self, prompts: Sequence[str]) -> Sequence[Verdict]:
        """Prompts without learnt embeddings are those of `screen_learnt` that have none."""
        return self.screen_learnt(prompts, [None] * len(prompts))

    # How it learns

    def gather(
        self, model: TextToImage, data: TextData, *, seed: int, watch: Watch | None = None
    ) -> Material:
        """The vectors of all prompts, with labels, and those that the threshold is found with."""
        split = data.split(seed)
        rng = torch.Generator().manual_seed(seed)
        safe, held = self._apart(split.safe, rng)
        unsafe = (*split.unsafe, *split.unsafe_check)
        _require_two_sides((*safe, *held, *texts(split.safe_check)), texts(unsafe))
        labels = ("safe", *sorted({prompt.category or "unsafe" for prompt in unsafe}))
        object.__setattr__(self, "labels_", self.classes(labels))

        words = _neutral_words(model.tokenizers[self.chosen(model)[0]], [*safe, *held], unsafe)

        def side(safe: Sequence[str], unsafe: Sequence[Prompt]) -> Side:
            extra = [p.safe_prompt for p in unsafe if p.safe_prompt and self.counterparts]
            extra += [new for _, new in exchanged(list(safe) * self.variants, words, rng)]
            kept = list(dict.fromkeys([*safe, *extra]))
            y = [self._label(p) for p in unsafe]
            x = self.vectors(model, plain([*kept, *texts(unsafe)]))
            return Side(x, torch.tensor([0] * len(kept) + y, device=x.device))

        learn = side(safe, split.unsafe)
        moments = learn.x.mean(0).cpu(), learn.x.std(0).clamp(min=1e-6).cpu()
        object.__setattr__(self, "moments_", moments)
        return Material(
            learn=learn,
            check=side(texts(split.safe_check), split.unsafe_check),
            held=self.vectors(model, plain(held)),
            hashes=data.hashes(),
        )

    def classes(self, labels: tuple[str, ...]) -> tuple[str, ...]:
        """Which classes are told apart, of "safe" and all categories."""
        return labels

    def _label(self, prompt: Prompt) -> int:
        name = prompt.category or "unsafe"
        return self.labels_.index(name) if name in self.labels_ else 1

    def _apart(self, safe: Sequence[Prompt], rng: torch.Generator) -> tuple[list[str], list[str]]:
        """Safe prompts to learn from, and to find the threshold with."""
        unique = list(dict.fromkeys(texts(safe)))
        order = torch.randperm(len(unique), generator=rng).tolist()
        n = round(self.held * len(unique))
        require_enough(n, self.fpr, f"{self.held:.0%} of {len(unique)} safe training prompts")
        held, rest = sorted(order[:n]), sorted(order[n:])
        return [unique[i] for i in rest], [unique[i] for i in held]

    def steps(self, material: Material) -> int:
        return -(-len(material.learn.x) // self.batch)

    def batches(self, material: Material, epoch: int, rng: torch.Generator) -> Iterator[Side]:
        order = torch.randperm(len(material.learn.x), generator=rng).to(material.learn.x.device)
        for rows in order.split(self.batch):
            yield Side(material.learn.x[rows], material.learn.y[rows])

    def loss(self, model: TextToImage, batch: Side, rng: torch.Generator) -> Loss:
        """Cross-entropy."""
        total = F.cross_entropy(self.network_(batch.x), batch.y)
        return Loss(total, {"cross_entropy": total.item()})

    @torch.no_grad()
    def check(self, model: TextToImage, material: Material) -> dict[str, float]:
        """On held-out prompts the loss, and how well the two sides can be told apart at all."""
        self.network_.eval()
        x, y = material.check.x, material.check.y
        figures = {
            "objective": F.cross_entropy(self.network_(x), y).item(),
            "roc_area": roc_area(*_two(1 - self.judged(self.network_, x)[:, 0], y)),
        }
        self.network_.train()
        return figures

    @torch.no_grad()
    def info(self, material: Material) -> dict[str, Any]:
        """The labels, the threshold, and what was learnt from."""
        s = 1 - self.judged(self.network_, material.held)[:, 0]
        return {
            "data": material.hashes,
            "labels": list(self.labels_),
            "split": {name: len(getattr(material, name).x) for name in ("learn", "check")},
            "threshold": asdict(calibrate(s.tolist(), self.fpr)),
        }


@dataclass(frozen=True)
class Side:
    """Vectors and the numbers of their labels."""

    x: Float[Tensor, "prompt dim"]
    y: Int[Tensor, " prompt"]


@dataclass(frozen=True)
class Material:
    """What stays constant while training.

    Args:
        learn: To learn from.
        check: To stop by.
        held: Safe prompts that the threshold is found with.
        hashes: SHA-256 of each prompt set.
    """

    learn: Side
    check: Side
    held: Float[Tensor, "prompt dim"]
    hashes: Mapping[str, str]


class Network(nn.Module):
    """Linear layers with ReLU and dropout in between, on standardised vectors."""

    mean: Tensor
    scale: Tensor

    def __init__(self, dim: int, hidden: Sequence[int], labels: int, dropout: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.Linear(dim, width), nn.ReLU(), nn.Dropout(dropout)]
            dim = width
        self.layers = nn.Sequential(*layers, nn.Linear(dim, labels))

    def forward(self, x: Float[Tensor, "prompt dim"]) -> Float[Tensor, "prompt label"]:
        return self.layers((x - self.mean) / self.scale)


def read_vector(
    model: TextToImage, seen: Condition, encoder: str, which: Which
) -> Float[Tensor, "prompt dim"]:
    """One vector per prompt of one encoder; its pooled vector where it has no token states."""
    pooled = seen.pooled_stream(encoder)
    if pooled is not None and (which == "pooled" or encoder not in seen.encoders):
        return pooled
    states, length = seen.stream(encoder), seen.masks[encoder].sum(1)
    if which != "mean":
        return states[torch.arange(len(states), device=states.device), length - 1]
    marks = len(model.tokenizers[encoder]("").input_ids)  # a start mark, where there is one; an end
    places = torch.arange(states.shape[1], device=states.device)
    content = (places >= marks - 1) & (places < length[:, None] - 1)
    nothing = length[:, None] <= marks  # "" is read at its end mark
    content |= nothing & (places == length[:, None] - 1)
    weight = content / content.sum(1, keepdim=True)
    return (states * weight[..., None].to(states)).sum(1)


def plain(prompts: Sequence[str]) -> Written:
    """Words without anything else."""
    none = (None,) * len(prompts)
    return Written(tuple(prompts), none, none, none)


@dataclass(frozen=True)
class Threshold:
    """Where a filter begins to refuse.

    Args:
        value: Scores above it are refused.
        fpr: The share of safe prompts that may be refused.
        n: Safe prompts it was found with.
        above: How many of them lie at or above it.
        expected: The share of new safe prompts that is refused, in the mean.
        low: Lower end of that share's 95 % interval.
        high: Upper end.
    """

    value: float
    fpr: float
    n: int
    above: int
    expected: float
    low: float
    high: float


def calibrate(scores: Sequence[float], fpr: float) -> Threshold:
    """The lowest threshold at which new safe prompts are refused with at most this chance.

    Raises:
        BadInput: Too few safe prompts for so small a share.
    """
    n = len(scores)
    require_enough(n, fpr, "those given")
    k = _above(n, fpr)
    share = stats.beta(k, n + 1 - k)
    low, high = (float(share.ppf(q)) for q in (0.025, 0.975))
    value = sorted(scores, reverse=True)[k - 1]
    return Threshold(float(value), fpr, n, k, k / (n + 1), low, high)


def require_enough(n: int, fpr: float, what: str) -> None:
    """Refuse to calibrate where no threshold can keep the promise."""
    if _above(n, fpr) < 1:
        least = next(m for m in range(n, 10**9) if _above(m, fpr) >= 1)
        raise BadInput(
            f"a threshold for {fpr:.2%} false positives needs at least {least} safe prompts that "
            f"are not trained on; {what} are {n}. Give more safe prompts, or a larger fpr or held."
        )


def _above(n: int, fpr: float) -> int:
    return floor(fpr * (n + 1) + 1e-9)


def roc_area(unsafe: Sequence[float], safe: Sequence[float]) -> float:
    """The chance that an unsafe prompt scores above a safe one; equal scores count half."""
    a, b = torch.tensor(unsafe).double()[:, None], torch.tensor(safe).double()
    return ((a > b).double() + (a == b).double() / 2).mean().item()


def _two(scores: Tensor, y: Tensor) -> tuple[list[float], list[float]]:
    return scores[y > 0].tolist(), scores[y == 0].tolist()


def _neutral_words(tokenizer: Any, safe: Sequence[str], unsafe: Sequence[Prompt]) -> list[str]:
    """The tokenizer's whole words, but for those that only unsafe prompts have."""
    known = {word for text in safe for word in text.split()}
    only = {word for prompt in unsafe for word in prompt.text.split()} - known
    return [word for word in vocabulary(tokenizer) if word not in only]


def _require_two_sides(safe: Sequence[str], unsafe: Sequence[str]) -> None:
    both = sorted(set(safe) & set(unsafe))
    if both:
        raise BadInput(
            f"{len(both)} prompt(s) are on the safe and on the unsafe side, for example "
            f"{both[0][:60]!r}; a filter cannot tell them apart. Take them out of one side."
        )
