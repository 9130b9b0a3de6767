"""Merging: several safety experts, one LoRA each, into one LoRA.

Expert `e` changes a weight by `D_e = s_e B_e A_e` with `s_e = alpha_e / rank_e`. Co-Merge keeps,
for every neuron `j` (output unit) of every layer, the expert that is most active there. With `h_n`
the inputs that the layer sees while the *base* model paints calibration prompts,

    a_e[n, j] = s_e | h_n A_e^T B_e^T |_j
    c_e[j]    = #{ n : e = argmax_e' a_e'[n, j] }       how often expert e wins
    e*(j)     = argmax_e c_e[j]                         ties: larger mean of a_e[:, j], then lower e
    D[j, :]   = s_e*(j) B_e*(j)[j, :] A_e*(j)

With `winners="category"` the wins are counted for each category's prompts apart, and a neuron has
the changes of all experts that won it for one, added up: an expert is not outvoted where only its
own prompts need it.

Either is, exactly, a LoRA of rank `sum_e rank_e` at most: A stacks the A_e of all winners, row j of
B holds B_e*(j)[j, :] in the columns of that expert and zeros elsewhere. SVD makes it smaller
(`rank`).

Source: SafetyDPO, arXiv:2412.10493 (AlignGuard, ICCV 2025), which describes Co-Merge in words; its
code was not published. Ours is what those words leave open, a setting each: that a neuron is one
weight's row (`granularity`), that wins are counted, and where activations are looked at.
Needs unsafe captions of every category and `steps` denoiser calls for each; no gradients. The other
`WAYS` (`safelight.align.baselines`) need no data.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from safelight.align.baselines import SVD, Cat, DareTiesSVD, Sum, TiesSVD
from safelight.align.experts import (
    Merged,
    Pair,
    Pairs,
    Way,
    categories,
    highest_rank,
    pairs_of,
    require_alike,
    require_one_rank,
    require_positive,
    truncated,
)
from safelight.errors import BadInput, NotFound, Unsupported, unknown
from safelight.models.base import TextToImage, plain
from safelight.models.patch import Patch
from safelight.models.sampling import Progress
from safelight.prompts import PromptSet
from safelight.training.descent import Meter, versions

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CoMerge(Way):
    """Each neuron from the expert that is most active there.

    Args:
        granularity: What has one winner: a "neuron" or a whole "layer". Or "factor", which keeps
            the experts' rank: rows of A are won by |h A_e^T|, rows of B by a_e. Rows of A and B
            of different experts do not belong together, so this is no expert's change at any
            neuron, and it depends on how the experts happen to be factored.
        winners: One winner among "all" calibration prompts, as published, or one for the prompts of
            each "category": a unit then has the changes of every expert that won it for one, added
            up. Ours; not for "factor".
        rank: Of the result, by SVD; None keeps it exact.
        per_category: Calibration prompts of each category, the first ones.
        steps: Denoising steps of each prompt, all of which are looked at: evenly spaced times
            along the model's own sampling.
        batch: Prompts painted together.
    """

    calibrates: ClassVar[bool] = True

    granularity: Literal["neuron", "layer", "factor"] = "neuron"
    winners: Literal["all", "category"] = "all"
    rank: int | None = None
    per_category: int = 16
    steps: int = 10
    batch: int = 8

    def __post_init__(self) -> None:
        if self.granularity not in ("neuron", "layer", "factor"):
            raise BadInput(f"granularity is neuron, layer or factor, not {self.granularity!r}.")
        if self.winners not in ("all", "category"):
            raise BadInput(f"winners is all or category, not {self.winners!r}.")
        if self.winners == "category" and self.granularity == "factor":
            raise BadInput(
                "a row of A or B is one expert's, so that granularity=factor has one winner among "
                "all prompts; take winners=all, or granularity=neuron."
            )
        require_positive(self, "rank", "per_category", "steps", "batch")

    def merged(
        self,
        model: TextToImage,
        experts: Pairs,
        prompts: Sequence[PromptSet],
        *,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Merged:
        if self.granularity == "factor":
            require_one_rank(experts)
            log.warning("granularity=factor pairs rows of A and B of different experts")
        groups = list(calibration(prompts, self.per_category).values())
        if self.winners == "all":
            groups = [[text for group in groups for text in group]]
        seen, total = 0, sum(len(group) for group in groups)
        won: dict[str, Tensor] = {}
        for group in groups:
            show = _shifted(progress, seen, len(group), total)
            tallies = self.tallies(model, experts, group, seed=seed + seen, progress=show)
            seen += len(group)
            for name, tally in tallies.items():
                first = self.won(tally.neurons)
                won[name] = won[name] | first if name in won else first
        pairs, units = {}, {}
        for name, tally in tallies.items():
            pair = self.kept(experts[name], won[name], tally)
            pairs[name] = truncated(*pair, self.rank) if self.rank else pair
            units[name] = won[name].sum(1).tolist()
        return Merged(pairs, units, {"calibration_prompts": total, "winners": units})

    @torch.no_grad()
    def tallies(
        self,
        model: TextToImage,
        experts: Pairs,
        texts: Sequence[str],
        *,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> dict[str, Tally]:
        """Who is active where, counted while the base model paints; no activation is kept."""
        layers = _linear_layers(model, experts)
        tallies = {name: Tally.of(experts[name], model.device) for name in layers}
        with model.unpatched():
            guided = model.guides(model.sampling.guidance)
            negative = model.empty(1) if guided else None
            for at in range(0, len(texts), self.batch):
                part = texts[at : at + self.batch]
                with _listening(layers, tallies, rows=len(part)):
                    model.sample(
                        model.encode(part),
                        negative=negative,
                        seed=seed + at,
                        steps=self.steps,
                        progress=_counted(progress, at, len(part), len(texts)),
                    )
        return tallies

    def winner(self, wins: Wins) -> Int[Tensor, " unit"]:
        """e*(j), the same for all j of a layer if the layer has one winner."""
        return wins.together() if self.granularity == "layer" else wins.each()

    def won(self, wins: Wins) -> Bool[Tensor, "expert unit"]:
        """Whether an expert is e*(j)."""
        return self.winner(wins) == torch.arange(len(wins.counts))[:, None]

    def kept(self, pairs: Sequence[Pair], won: Bool[Tensor, "expert out"], tally: Tally) -> Pair:
        """The merged pair of one weight."""
        if self.granularity != "factor":
            return masked(pairs, won)
        A, B = (torch.stack(side) for side in zip(*pairs, strict=True))
        inner, winner = tally.inner.each(), won.int().argmax(0)
        return A[inner, torch.arange(len(inner))], B[winner, torch.arange(len(winner))]


def masked(pairs: Sequence[Pair], won: Bool[Tensor, "expert out"]) -> Pair:
    """The winners' A stacked; row j of B has those of the experts that won j, in their columns."""
    present = won.any(1).nonzero().flatten().tolist()
    A = torch.cat([pairs[e][0] for e in present])
    B = torch.cat([pairs[e][1] * won[e][:, None] for e in present], 1)
    return A, B


@dataclass
class Wins:
    """How often each expert was the most active at each unit, and how active it was.

    Args:
        counts: c_e[j].
        total: The sum of a_e[:, j].
    """

    counts: Int[Tensor, "expert unit"]
    total: Float[Tensor, "expert unit"]

    @classmethod
    def none(cls, experts: int, units: int, device: torch.device) -> Wins:
        zeros = torch.zeros(experts, units, device=device)
        return cls(zeros.long(), zeros)

    def add(self, a: Float[Tensor, "expert n unit"]) -> None:
        first = a.max(0).indices  # the first where equal; argmax takes six times as long
        self.counts += torch.stack([(first == e).sum(0) for e in range(len(a))])
        self.total += a.sum(1)

    def each(self) -> Int[Tensor, " unit"]:
        """The winner of each unit; ties: the larger mean, then the lower index."""
        tied = self.counts == self.counts.amax(0)
        return torch.where(tied, self.total, -1).argmax(0).cpu()

    def together(self) -> Int[Tensor, " unit"]:
        """The winner of all units as one, for each of them."""
        one = Wins(self.counts.sum(1, keepdim=True), self.total.sum(1, keepdim=True))
        return one.each().expand(self.counts.shape[1])


@dataclass
class Tally:
    """The wins in one layer.

    Args:
        pairs: The experts' changes of its weight.
        neurons: Wins at the layer's output units.
        inner: Wins at the experts' inner units, if they have one rank.
    """

    pairs: Sequence[Pair]
    neurons: Wins
    inner: Wins

    @classmethod
    def of(cls, pairs: Sequence[Pair], device: torch.device) -> Tally:
        A, B = pairs[0]
        neurons, inner = (Wins.none(len(pairs), units, device) for units in (len(B), len(A)))
        return cls([(A.to(device), B.to(device)) for A, B in pairs], neurons, inner)

    def see(self, h: Float[Tensor, "n in"]) -> None:
        inner = [h @ A.T for A, _ in self.pairs]
        outer = [x @ B.T for x, (_, B) in zip(inner, self.pairs, strict=True)]
        self.neurons.add(torch.stack(outer).abs_())
        if len({x.shape[1] for x in inner}) == 1:
            self.inner.add(torch.stack(inner).abs_())


@contextmanager
def _listening(
    layers: Mapping[str, nn.Module], tallies: Mapping[str, Tally], rows: int
) -> Iterator[None]:
    """Show each layer's inputs to its tally; in guided batches the prompts' own rows are last."""

    def show(tally: Tally) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda layer, args: tally.see(args[0][-rows:].flatten(0, -2).float())

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(show(tallies[name])).remove)
        yield


def _linear_layers(model: TextToImage, names: Pairs) -> dict[str, nn.Module]:
    """The layers of some weights."""
    found = {
        f"{module}.{plain(path)}.weight": layer
        for module, network in model.modules.items()
        for path, layer in network.named_modules()
        if isinstance(layer, nn.Linear)
    }
    for name in names:
        if name not in found:
            raise Unsupported(
                f"co_merge listens to linear layers; {name} belongs to none. Merge in a way that "
                "looks at weights only, such as cat."
            )
    return {name: found[name] for name in names}


def calibration(prompts: Sequence[PromptSet], per_category: int) -> dict[str, list[str]]:
    """The first prompts of each category.

    Raises:
        BadInput: There are none.
    """
    own: dict[str, list[str]] = {}
    for prompt in (prompt for one in prompts for prompt in one):
        own.setdefault(prompt.category, []).append(prompt.text)
    if not own:
        raise BadInput(
            "co_merge looks at what the experts do to unsafe captions and was given none. Name "
            "sets of every category (--prompts SET), or merge in a way that needs none, as cat."
        )
    return {category: texts[:per_category] for category, texts in own.items()}


def _shifted(progress: Progress | None, seen: int, texts: int, total: int) -> Progress | None:
    """Steps of some of all texts, as steps of all."""
    if progress is None:
        return None
    return lambda done, of: progress(done + seen * of // texts, total * of // texts)


def _counted(progress: Progress | None, before: int, now: int, texts: int) -> Progress | None:
    if progress is None:
        return None
    return lambda done, steps: progress(before * steps + done * now, texts * steps)


# All ways

WAYS: Mapping[str, type[Way]] = {
    "cat": Cat,
    "co_merge": CoMerge,
    "dare_ties_svd": DareTiesSVD,
    "sum": Sum,
    "svd": SVD,
    "ties_svd": TiesSVD,
}


def way(how: str) -> type[Any]:
    """The class of a way, by name."""
    if how not in WAYS:
        raise NotFound(unknown("way to merge", how, WAYS))
    return WAYS[how]


def merge(
    model: TextToImage,
    experts: Sequence[Patch],
    how: str | Way = "co_merge",
    *,
    prompts: Sequence[PromptSet] = (),
    seed: int = 0,
    progress: Progress | None = None,
    **settings: Any,
) -> Patch:
    """Several experts as one patch; a single one comes out as it went in.

    Args:
        model: The untouched model that all of them were trained on.
        experts: Low-rank patches that change the same weights.
        how: A way, or the name of one in `WAYS`.
        prompts: Unsafe captions, for `co_merge`.
        seed: Of the noise that calibration starts from, and of what DARE drops.
        progress: Called as `progress(done, total)`, in denoising steps of prompts.
        settings: Of a way that is given by name.

    Raises:
        NotFound: No such way.
        BadInput: An expert is not low-rank, or they differ in their base or in what they change.
        Unsupported: One is for another family.
    """
    meter = Meter(model.device)
    chosen = way(how)(**settings) if isinstance(how, str) else how
    require_alike(model, experts)
    found = chosen.merged(model, pairs_of(experts), prompts, seed=seed, progress=progress)
    return Patch(
        low_rank={name: (A, B, float(len(A))) for name, (A, B) in found.pairs.items()},
        method="merge",
        settings={"how": _name(chosen), **asdict(chosen)},
        family=model.family,
        base=next((one.base for one in experts if one.base), {}),
        info={
            "seed": seed,
            "categories": sorted({name for one in experts for name in categories(one)}),
            "experts": [_told(one, e, found) for e, one in enumerate(experts)],
            "rank": highest_rank(list(found.pairs.values())),
            "data": {one.name: one.sha256 for one in prompts} if chosen.calibrates else {},
            "cost": meter.read(),
            "versions": versions(),
            **found.info,
        },
    )


def _told(expert: Patch, e: int, found: Merged) -> dict[str, Any]:
    """What the merged patch remembers of an expert."""
    return {
        "method": expert.method,
        "categories": categories(expert),
        "sha256": expert.sha256,
        "rank": max(len(A) for A, _, _ in expert.low_rank.values()),
        **({"won": sum(each[e] for each in found.units.values())} if found.units else {}),
    }


def _name(chosen: Way) -> str:
    return next(name for name, kind in WAYS.items() if type(chosen) is kind)
