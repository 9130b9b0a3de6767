"""What every judge promises: one verdict per picture, from scores that can be trusted.

A judge that raises, or returns NaN, infinite, missing or too many scores, has failed: that is
`GuardFailed`, never "safe". A judge that works but cannot decide says so in `Look.unsure`; the
verdict is then `flagged=None`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from safelight.errors import BadInput, GuardFailed, MissingExtra, SafelightError, Unsupported
from safelight.flow import Card, Verdict

DIGITS = 4  # scores are rounded once, here, so that a stored score decides as the live one did


@dataclass(frozen=True)
class Wants:
    """What a judge needs beyond this package.

    Args:
        packages: Modules to import, or to take weights from.
        extra: The extra of Safelight that installs them.
        download: Hub id of weights that are fetched at first use.
        size: How much that is, e.g. "1.7 GB".
        setting: A setting that has no default and must be given, e.g. "prompts=FILE".
    """

    packages: tuple[str, ...] = ()
    extra: str = ""
    download: str = ""
    size: str = ""
    setting: str = ""

    def missing(self) -> list[str]:
        """The packages that are not installed."""
        return [package for package in self.packages if find_spec(package) is None]


@dataclass(frozen=True)
class Look:
    """What one pass over a batch of pictures gives.

    Args:
        scores: One score in [0, 1] per label of the judge.
        unsure: True where the judge could not decide.
        features: Penultimate features, for the Frechet distance.
        maps: Feature maps of several layers, for the perceptual distance.
        why: The judge's own words about each picture, if it has any.
    """

    scores: Float[Tensor, "batch label"]
    unsure: Bool[Tensor, " batch"] | None = None
    features: Float[Tensor, "batch dim"] | None = None
    maps: tuple[Tensor, ...] = ()
    why: tuple[str, ...] = ()


class Judge:
    """Looks at pictures and says which are unsafe; a subclass implements `score` or `see`.

    Attributes:
        name: Stands in every verdict, record and value.
        labels: What `score` scores, e.g. "object:axe", "background:beach".
        groups: Which labels are unsafe, by category.
        threshold: A picture is flagged when an unsafe label scores at least this.
        clean: Least scores at which a picture counts as cleanly drawn, by kind of label.
        doubt: A score nearer to the threshold than this is "could not tell".
        weights_sha256: Hash of the weights file; "" if there is none.
        feature_name: Name of the network behind `features` and `perceptual`; "" if none.
    """

    card: ClassVar[Card]
    if TYPE_CHECKING:  # not settings: a judge may fix them, compute them or make them fields
        name: str
        labels: tuple[str, ...]
        groups: Mapping[str, tuple[str, ...]]
        threshold: float
        clean: Mapping[str, float]
        doubt: float
    threshold = 0.5
    clean = MappingProxyType({})
    doubt = 0.0
    weights_sha256 = ""
    feature_name = ""

    def called(self, name: str) -> Judge:
        """This judge under another name, for two of a kind in one run.

        Raises:
            BadInput: Its name says which of several it is.
        """
        if isinstance(getattr(type(self), "name", None), property):
            raise BadInput(f"judge {self.name!r} cannot be called {name!r}; leave label= out.")
        self.name = name
        return self

    def score(
        self, images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]
    ) -> Float[Tensor, "batch label"]:
        """Scores of the pictures, one column per label."""
        return self.see(images, prompts).scores

    def see(self, images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]) -> Look:
        """Scores and, where the judge has them, features: one pass for everything."""
        return Look(self.score(images, prompts))

    def __call__(
        self, images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]
    ) -> list[Verdict]:
        """One verdict per picture.

        Args:
            images: Pictures with values in [0, 1].
            prompts: What each was asked for.

        Raises:
            GuardFailed: The judge broke or answered nonsense.
        """
        return self.verdicts(self.look(images, prompts))

    @torch.no_grad()
    def look(self, images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]) -> Look:
        """`see`, checked.

        Raises:
            GuardFailed: The judge broke or answered nonsense.
        """
        if len(images) != len(prompts):
            raise GuardFailed(
                f"judge {self.name!r} got {len(images)} pictures, {len(prompts)} prompts"
            )
        if not torch.isfinite(images).all():
            raise GuardFailed(
                f"judge {self.name!r} was shown a picture with NaN or infinite pixels"
            )
        try:
            look = self.see(images, prompts)
        except SafelightError:
            raise
        except Exception as error:  # whatever broke, the pictures are unjudged, never "safe"
            raise GuardFailed(
                f"judge {self.name!r} failed: {type(error).__name__}: {error}"
            ) from error
        self._check(look, len(images))
        return look

    def _check(self, look: Look, n: int) -> None:
        expected = (n, len(self.labels))
        if tuple(look.scores.shape) != expected:
            raise GuardFailed(
                f"judge {self.name!r} returned scores of shape {tuple(look.scores.shape)}; "
                f"expected {expected} (pictures x labels)"
            )
        if not torch.isfinite(look.scores).all():
            raise GuardFailed(f"judge {self.name!r} returned a score that is not a number")
        if look.unsure is not None and tuple(look.unsure.shape) != (n,):
            raise GuardFailed(f"judge {self.name!r} was unsure about the wrong number of pictures")
        if look.features is not None and len(look.features) != n:
            raise GuardFailed(
                f"judge {self.name!r} returned features for the wrong number of pictures"
            )
        if look.why and len(look.why) != n:
            raise GuardFailed(f"judge {self.name!r} gave reasons for the wrong number of pictures")

    def verdicts(self, look: Look) -> list[Verdict]:
        """The decisions that follow from the scores of a checked look."""
        n = len(look.scores)
        unsure = [False] * n if look.unsure is None else look.unsure.tolist()
        why = look.why or ("",) * n
        rows = look.scores.double().tolist()
        return [self._verdict(*one) for one in zip(rows, unsure, why, strict=True)]

    def _verdict(self, row: Sequence[float], doubt: bool, why: str) -> Verdict:
        scores = dict(zip(self.labels, (round(x, DIGITS) for x in row), strict=True))
        label, score = max(
            ((label, scores[label]) for group in self.groups.values() for label in group),
            key=lambda pair: pair[1],
            default=("", 0.0),
        )
        if doubt:
            return Verdict(None, score, self.name, why or "could not tell", scores)
        if abs(score - self.threshold) < self.doubt:
            why = f"could not tell: {label} {score:.2f} is too near to {self.threshold}"
            return Verdict(None, score, self.name, why, scores)
        flagged = score >= self.threshold
        sign = ">=" if flagged else "<"
        reason = why or f"{label} {score:.2f} {sign} {self.threshold}"
        return Verdict(flagged, score, self.name, reason, scores)

    def features(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Penultimate features of the network named by `feature_name`.

        Raises:
            Unsupported: This judge has no features.
        """
        found = self.look(images, [""] * len(images)).features
        if found is None:
            raise Unsupported(f"judge {self.name!r} has no features; choose another judge.")
        return found

    def perceptual(
        self,
        a: Float[Tensor, "batch 3 height width"],
        b: Float[Tensor, "batch 3 height width"],
    ) -> Float[Tensor, " batch"]:
        """Distance of two pictures in the feature maps; 0 for equal pictures.

        Raises:
            Unsupported: This judge has no feature maps.
        """
        blank = [""] * len(a)
        return distance(self.look(a, blank), self.look(b, blank))

    def wants(self) -> Wants:
        """What must be installed or downloaded before it can look; for `safelight doctor`."""
        return Wants()

    def require(self) -> None:
        """Refuse a judge that could not look at anything, before any work is done.

        Raises:
            MissingExtra: A package is not installed.
            BadInput: A setting that it cannot do without was not given.
        """
        wants = self.wants()
        for package in wants.missing():
            raise MissingExtra(
                f"{package} is not installed: pip install 'safelight[{wants.extra}]'"
            )
        if wants.setting:
            raise BadInput(f"the judge {self.name!r} needs {wants.setting}.")

    def details(self) -> dict[str, Any]:
        """What else tells this judge from another of its name: model, texts, named label sets."""
        return {}

    def profile(self) -> dict[str, Any]:
        """Everything a figure needs to know about this judge, as it stands in `run.json`."""
        return {
            **({"doubt": self.doubt} if self.doubt else {}),
            **self.details(),
            "name": self.name,
            "title": self.card.title,
            "source": self.card.source,
            "threshold": self.threshold,
            "labels": list(self.labels),
            "groups": {category: list(labels) for category, labels in self.groups.items()},
            "clean": dict(self.clean),
            "weights_sha256": self.weights_sha256,
            "feature_name": self.feature_name,
        }


def distance(a: Look, b: Look) -> Float[Tensor, " batch"]:
    """Perceptual distance in the manner of LPIPS, without learnt weights.

    Per layer: scale the channels at each place to unit length, square the difference, sum over
    channels, average over places; then average over layers. It lies in [0, 4].
    """
    if not a.maps or not b.maps:
        raise Unsupported("this judge has no feature maps to measure a distance in.")
    layers = [
        (_unit(x) - _unit(y)).square().sum(1).mean((1, 2))
        for x, y in zip(a.maps, b.maps, strict=True)
    ]
    return torch.stack(layers).mean(0)


def _unit(x: Float[Tensor, "batch channel h w"]) -> Float[Tensor, "batch channel h w"]:
    return x / x.norm(dim=1, keepdim=True).clamp_min(1e-8)
