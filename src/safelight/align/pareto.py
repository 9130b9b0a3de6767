"""The trade-off of a trained alignment: every epoch of every lambda, and a fixed rule to pick one.

Each point is measured on the held-out prompts: `drift` (how far safe embeddings moved, less is
better) and `cosine` (how much of unsafe embeddings is still where it was, less is better). The
original encoder's embeddings do not depend on lambda and are computed once for the whole sweep.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from safelight.align.base import TextData, Watch
from safelight.align.safetext import SafeText
from safelight.errors import BadInput
from safelight.models.base import TextToImage
from safelight.models.patch import Patch

Point = Mapping[str, Any]  # epoch, lam, drift, cosine and the loss terms


@dataclass(frozen=True)
class Sweep:
    """All points of a sweep, and how to get the weights of any one of them."""

    points: tuple[Point, ...]
    fit: Callable[[Point], Patch]

    @property
    def front(self) -> tuple[Point, ...]:
        """The points that no other point beats on both axes, by rising drift."""
        return front(self.points)

    def choose(self, drift: float) -> Patch:
        """The patch that moves unsafe prompts most while safe ones drift by at most `drift`."""
        return self.fit(choose(self.points, drift))


def sweep(
    method: SafeText,
    model: TextToImage,
    data: TextData,
    *,
    lams: Sequence[float],
    seed: int = 0,
    watch: Watch | None = None,
) -> Sweep:
    """Run `method.epochs` epochs for each lambda and keep every epoch as a point.

    Args:
        lams: Values of lambda to try.
    """
    if not lams:
        raise BadInput("a sweep needs at least one value of lam.")
    material = method.gather(model, data, seed=seed, watch=watch)
    points: list[Point] = []

    def fit(point: Point) -> Patch:
        """The same descent again, broken off at the point's epoch."""
        chosen = replace(method, lam=point["lam"], patience=0)
        patch = chosen.train(model, material, seed=seed, watch=watch, until=int(point["epoch"]))
        return _remember(patch, points)

    for lam in lams:
        whole = replace(method, lam=lam, patience=0)
        points += whole.train(model, material, seed=seed, watch=watch).info["pareto"][1:]
    return Sweep(tuple(points), fit)


def front(points: Sequence[Point]) -> tuple[Point, ...]:
    """The points that no other point beats on both axes, by rising drift."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p["drift"], p["cosine"])):
        if not kept or point["cosine"] < kept[-1]["cosine"]:
            kept.append(point)
    return tuple(kept)


def choose(points: Sequence[Point], drift: float) -> Point:
    """Of the points with at most this drift, the one with the least cosine.

    Raises:
        BadInput: Every point drifts further.
    """
    allowed = [point for point in points if point["drift"] <= drift]
    if not allowed:
        least = min(point["drift"] for point in points)
        raise BadInput(f"every point drifts by more than {drift:g}; the least is {least:.3g}.")
    return min(allowed, key=lambda point: (point["cosine"], point["drift"]))


def _remember(patch: Patch, points: Sequence[Point]) -> Patch:
    info: dict[str, Any] = {**patch.info, "pareto": [dict(point) for point in points]}
    return replace(patch, info=info)
