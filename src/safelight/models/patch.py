"""A patch: a saved change of a model's weights.

A parameter is changed either as a whole (`full` holds its new value) or by a low-rank product, and
patches add up as changes of the untouched weights `W0`:

    W = W0 + sum_p scale_p * (full_p - W0)   or   scale_p * alpha / rank * up @ down

A patch of scale 1 that is alone gives exactly the values it was made with. On disk it is a folder
with `patch.json` and `weights.safetensors`; nothing is ever pickled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from safelight.errors import BadInput, Unsupported
from safelight.models import artifact
from safelight.models.base import TextToImage
from safelight.models.networks import tensors_sha256

FORMAT = 1
LowRank = tuple[Float[Tensor, "_ _"], Float[Tensor, "_ _"], float]  # (rank, in), (out, rank)


@dataclass(frozen=True, kw_only=True)
class Patch:
    """A change of weights, with all that is known about how it was made.

    Args:
        full: New values of whole parameters by name.
        low_rank: `(down, up, alpha)` by name; the change is `alpha / rank * up @ down`.
        method: Name of the method that made it.
        settings: The method's settings.
        family: Of the model it was made for.
        base: Hashes of that model's weights, `model.hashes()`; empty if unknown.
        info: Seed, cost, data hashes, versions, training history.

    Raises:
        BadInput: A tensor is not finite, or low-rank factors do not fit each other.
    """

    full: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    low_rank: Mapping[str, LowRank] = field(default_factory=dict, repr=False)
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    family: str
    base: Mapping[str, str] = field(default_factory=dict, repr=False)
    info: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name, (down, up, alpha) in self.low_rank.items():
            if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
                raise BadInput(
                    f"the factors of {name} do not fit: down is {tuple(down.shape)}, up is "
                    f"{tuple(up.shape)}; expected (rank, in) and (out, rank)."
                )
            if not math.isfinite(alpha):
                raise BadInput(f"alpha of {name} is {alpha}.")
        for name, tensor in self._tensors().items():
            if not torch.isfinite(tensor).all():
                raise BadInput(f"{name} of this patch has values that are not numbers.")

    @classmethod
    def between(
        cls,
        model: TextToImage,
        before: Mapping[str, Tensor],
        after: Mapping[str, Tensor],
        **about: Any,
    ) -> Patch:
        """The patch that turns some parameters into others; unchanged ones are left out.

        Args:
            model: The untouched model.
            before: Its parameters.
            after: The same after training.
            about: `method`, `settings` and `info`.
        """
        moved = {
            name: value.detach().cpu().clone()
            for name, value in after.items()
            if not torch.equal(value, before[name])
        }
        return cls(full=moved, family=model.family, base=model.hashes(), **about)

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters it changes."""
        return tuple(dict.fromkeys([*self.full, *self.low_rank]))

    @property
    def sha256(self) -> str:
        """Hash of what it changes, whatever folder it lies in."""
        return tensors_sha256(self._tensors())

    @property
    def about(self) -> dict[str, Any]:
        """All but the tensors, as `patch.json` has it."""
        return {
            "format": FORMAT,
            "method": self.method,
            "settings": dict(self.settings),
            "family": self.family,
            "base": dict(self.base),
            "info": dict(self.info),
        }

    # Putting it on

    def check(self, model: TextToImage, force: bool = False) -> None:
        """Refuse a model that this patch was not made for.

        Raises:
            Unsupported: The model is of another family.
            BadInput: Its weights have other hashes, and `force` is off.
        """
        if self.family != model.family:
            raise Unsupported(
                f"this {self.method} patch is for {self.family}; {model.name} is {model.family}."
            )
        if force or not self.base:
            return
        with model.unpatched():
            hashes = model.hashes()
        other = [name for name, sha in self.base.items() if hashes.get(name) != sha]
        if other:
            raise BadInput(
                f"this {self.method} patch was made for other weights than those of {model.name} "
                f"(different: {', '.join(other)}). Load the model it was made for, or force it."
            )

    @torch.no_grad()
    def applied(
        self, model: TextToImage, *, scale: float = 1.0, force: bool = False
    ) -> dict[str, Tensor]:
        """The model's parameters with this patch added to what they are now.

        Raises:
            Unsupported: The model is of another family.
            BadInput: It has other weights (and `force` is off), or lacks a parameter.
        """
        self.check(model, force)
        now = model.parameters()
        missing = [name for name in self.names if name not in now]
        if missing:
            raise BadInput(
                f"{model.name} has no parameter {missing[0]!r}, which this patch changes."
            )
        return {
            name: _parameter(self._added(model, name, now[name], scale), now[name])
            for name in self.names
        }

    def _added(self, model: TextToImage, name: str, now: Tensor, scale: float) -> Tensor:
        """In float32, so that a change below the weights' own precision is not lost twice."""
        W0 = model.untouched(name)
        W = now.float()
        if name in self.full:
            value = self.full[name].to(now.device, torch.float32)
            if value.shape != now.shape:
                raise BadInput(
                    f"{name} has shape {tuple(now.shape)} in {model.name}, "
                    f"{tuple(value.shape)} in the patch."
                )
            if now is W0 and scale == 1:
                W = value.clone()
            elif scale:
                W = W + scale * (value - W0.float())
        if name in self.low_rank:
            down, up, alpha = self.low_rank[name]
            if up.shape[0] * down.shape[1] != now.numel():
                raise BadInput(
                    f"{name} has shape {tuple(now.shape)} in {model.name}, "
                    f"{up.shape[0]} x {down.shape[1]} in the patch."
                )
            change = up.to(now.device, torch.float32) @ down.to(now.device, torch.float32)
            W = W + scale * alpha / down.shape[0] * change.view(now.shape)
        return W.to(now.dtype)

    # On disk

    def save(self, path: str | Path) -> None:
        """Write the folder; either all of it is there afterwards or nothing has changed.

        Raises:
            BadInput: Something that is not a patch is in the way, or the settings are not plain.
            WorkFailed: It could not be written.
        """
        artifact.save("patch", Path(path), self.about, self._tensors())

    @classmethod
    def load(cls, path: str | Path) -> Patch:
        """Read a folder that `save` wrote.

        Raises:
            NotFound: No patch there, or its weights are missing.
            Unsupported: It was written by a newer version.
            WorkFailed: A file is damaged.
        """
        named = ("method", "settings", "family", "base", "info")
        about, tensors = artifact.load("patch", Path(path), named, FORMAT)
        full, low_rank = _untangled(tensors)
        return cls(full=full, low_rank=low_rank, **{key: about[key] for key in named})

    def _tensors(self) -> dict[str, Tensor]:
        """All tensors by unambiguous keys: `full:<name>`, `down:<name>`, `up:...`, `alpha:...`."""
        found = {f"full:{name}": value for name, value in self.full.items()}
        for name, (down, up, alpha) in self.low_rank.items():
            found |= {f"down:{name}": down, f"up:{name}": up}
            found[f"alpha:{name}"] = torch.tensor(float(alpha), dtype=torch.float64)
        return found


@contextmanager
def worn(
    model: TextToImage, patches: Sequence[Patch], scales: Sequence[float] | None = None
) -> Iterator[None]:
    """Run with several patches on, added up."""
    if not patches:
        yield
        return
    scales = scales or [1.0] * len(patches)
    with model.patched(patches[0], scales[0]), worn(model, patches[1:], scales[1:]):
        yield


def export(model: TextToImage, patches: Sequence[Patch], path: str | Path, **settings: Any) -> Path:
    """See `safelight.models.export.export`."""
    from safelight.models.export import export as write

    return write(model, patches, path, **settings)


def _untangled(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, LowRank]]:
    kinds: dict[str, dict[str, Tensor]] = {"full": {}, "down": {}, "up": {}, "alpha": {}}
    for key, value in tensors.items():
        kind, _, name = key.partition(":")
        kinds[kind][name] = value
    low_rank = {
        name: (down, kinds["up"][name], float(kinds["alpha"][name]))
        for name, down in kinds["down"].items()
    }
    return kinds["full"], low_rank


def _parameter(value: Tensor, like: Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(value, requires_grad=like.requires_grad)
