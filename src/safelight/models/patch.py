"""A patch: a saved change of a model's weights.

A parameter is changed either as a whole (`full` holds its new value) or by a low-rank product, and
patches add up as changes of the untouched weights `W0`:

    W = W0 + sum_p scale_p * (full_p - W0)   or   scale_p * alpha / rank * up @ down

A patch of scale 1 that is alone gives exactly the values it was made with. On disk it is a folder
with `patch.json` and `weights.safetensors`; nothing is ever pickled.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from safelight.errors import BadInput, NotFound, Unsupported, WorkFailed
from safelight.models.base import TextToImage
from safelight.models.folder import replaced

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
        path = Path(path)
        if path.is_file() or (path.is_dir() and any(path.iterdir()) and not _is_patch(path)):
            raise BadInput(f"{path} exists and is not a patch; choose another place.")
        with replaced(path) as folder:
            weights = folder / "weights.safetensors"
            save_file(self._tensors(), weights, metadata={"format": "safelight-patch"})
            about = {**self.about, "weights_sha256": _sha256(weights)}
            (folder / "patch.json").write_text(_json(about), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Patch:
        """Read a folder that `save` wrote.

        Raises:
            NotFound: No patch there, or its weights are missing.
            Unsupported: It was written by a newer version.
            WorkFailed: A file is damaged.
        """
        path = Path(path)
        if not _is_patch(path):
            raise NotFound(f"there is no patch at {path}: it has no patch.json.")
        about = _read_json(path / "patch.json")
        weights = path / "weights.safetensors"
        if not weights.is_file():
            raise NotFound(f"the patch at {path} has lost its weights.safetensors.")
        if about.get("weights_sha256") != _sha256(weights):
            raise WorkFailed(f"{weights} is damaged: its hash is not the one in patch.json.")
        try:
            tensors = load_file(weights)
        except SafetensorError as error:
            raise WorkFailed(f"{weights} cannot be read: {error}.") from error
        full, low_rank = _untangled(tensors)
        named = ("method", "settings", "family", "base", "info")
        return cls(full=full, low_rank=low_rank, **{key: about[key] for key in named})

    def _tensors(self) -> dict[str, Tensor]:
        """All tensors by unambiguous keys: `full:<name>`, `down:<name>`, `up:...`, `alpha:...`."""
        found = {f"full:{name}": value for name, value in self.full.items()}
        for name, (down, up, alpha) in self.low_rank.items():
            found |= {f"down:{name}": down, f"up:{name}": up}
            found[f"alpha:{name}"] = torch.tensor(float(alpha), dtype=torch.float64)
        return {key: value.detach().cpu().contiguous() for key, value in found.items()}


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


def _is_patch(path: Path) -> bool:
    return (path / "patch.json").is_file()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WorkFailed(f"{path} is damaged: {error}.") from error
    needed = {"format", "method", "settings", "family", "base", "info", "weights_sha256"}
    if not isinstance(about, dict) or not needed <= about.keys():
        raise WorkFailed(f"{path} is damaged: it lacks some of {', '.join(sorted(needed))}.")
    if about["format"] > FORMAT:
        raise Unsupported(
            f"{path} has format {about['format']}; this version reads up to {FORMAT}. "
            "Update safelight."
        )
    return about


def _json(about: Mapping[str, Any]) -> str:
    try:
        return json.dumps(about, indent=1, ensure_ascii=False)
    except TypeError as error:
        raise BadInput(
            f"a patch's settings and info must be plain JSON values: {error}."
        ) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
