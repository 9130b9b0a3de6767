"""Guards that learn before they protect, and their folders on disk.

    guard = Sanitizer(depth=2).fit(model, data)      # a copy that has learnt
    guard.save("sanitizer")                          # guard.json, weights.safetensors
    guard = load_guard("sanitizer", alpha=0.5)       # another strength of the same guard
    Guarded(model, [guard])

The loop is that of every trained method (`safelight.training.descent`).
"""

from __future__ import annotations

import copy
import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safelight.errors import BadInput, Unsupported, unknown
from safelight.guard.base import Guard
from safelight.models import artifact
from safelight.models.base import TextToImage
from safelight.names import find
from safelight.training.checkpoint import Checkpoint
from safelight.training.descent import Descent, Meter, Watch, method_name
from safelight.training.weights import Learnt, Loan

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What a guard has learnt, and from which model.

    Args:
        weights: The network's state by name.
        family: Of the model.
        base: Hashes of the text encoders it reads, without any patch.
        info: Seed, cost, data hashes, versions, training history.
    """

    weights: Mapping[str, Tensor]
    family: str
    base: Mapping[str, str]
    info: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class TrainedGuard(Descent, Guard):
    """A guard with a network of its own; the model's weights are never touched.

    A subclass says what its `network` is and how it learns (`gather`, `steps`, `batches`, `loss`,
    `check`); in those, and when it acts, the network is `self.network_`.
    """

    fitted_ = None  # type: Fitted | None
    network_ = None  # type: Any

    @abstractmethod
    def network(self, model: TextToImage) -> nn.Module:
        """An untrained network for a model's widths; torch's generator is seeded already."""

    def reads(self, model: TextToImage) -> tuple[str, ...]:
        """The encoders whose weights it depends on."""
        return tuple(model.text_encoders)

    def fit(
        self,
        model: TextToImage,
        data: Any = None,
        *,
        seed: int = 0,
        watch: Watch | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> TrainedGuard:
        """A copy that has learnt and is ready for this model.

        Args:
            data: What the method learns from.
            seed: Of every random choice; the same seed on the same machine learns the same.
            watch: Called after each step.
            checkpoint: Where to keep how far it is; the same call goes on from there if killed.

        Raises:
            BadInput: The data cannot be learnt from.
            WorkFailed: The loss is no longer a number.
        """
        meter = Meter(model.device)
        material = self.gather(model, data, seed=seed, watch=watch)
        about: dict[str, Any] = {"watch": watch, "meter": meter, "checkpoint": checkpoint}
        return self.train(model, material, seed=seed, **about)

    def train(
        self, model: TextToImage, material: Any, *, seed: int = 0, **descent: Any
    ) -> TrainedGuard:
        """`fit` on what `gather` returned, so that several runs can share it.

        Args:
            descent: `watch`, `meter`, `until`, `checkpoint` as for `descend`.
        """
        new = copy.copy(self)
        with torch.random.fork_rng():  # dropout draws from torch's own generator
            torch.manual_seed(seed)
            found = new.descend(model, material, seed=seed, **descent)
        return new._with(
            Fitted(
                weights=found.learnt.full,
                family=model.family,
                base=_hashes(model, new.reads(model)),
                info=found.info,
            )
        )

    @contextmanager
    def lend(self, model: TextToImage, rng: torch.Generator) -> Iterator[Loan]:
        """The network's own weights, fresh from the seed."""
        network = self._fresh(model, int(torch.randint(2**31, (1,), generator=rng)))
        network.train()
        object.__setattr__(self, "network_", network)  # frozen: settings are, this is not one
        try:
            own = {name: p for name, p in network.named_parameters() if p.requires_grad}
            yield _Own(own, network)
        finally:
            network.eval().requires_grad_(False)

    def prepare(self, model: TextToImage) -> None:
        """Put what was learnt into a network for this model.

        Raises:
            BadInput: Nothing was learnt yet, or for other text encoders.
            Unsupported: It was learnt for another family.
        """
        name = method_name(self)
        if self.fitted_ is None:
            raise BadInput(
                f"{name} must learn first: safelight align {name} {model.name} --unsafe ... "
                "-o FOLDER, then --guard FOLDER."
            )
        if self.fitted_.family != model.family:
            raise Unsupported(
                f"this {name} was trained for {self.fitted_.family}; {model.name} is "
                f"{model.family}."
            )
        known = _hashes(model, tuple(self.fitted_.base))
        other = [key for key, sha in self.fitted_.base.items() if known.get(key) != sha]
        if other:
            raise BadInput(
                f"this {name} was trained for other text encoders than those of {model.name} "
                f"(different: {', '.join(other)}); train it again for this model."
            )
        network = self._fresh(model, 0)
        network.load_state_dict(dict(self.fitted_.weights))
        network.to(model.device).eval().requires_grad_(False)
        object.__setattr__(self, "network_", network)

    def save(self, path: str | Path) -> None:
        """Write the folder; either all of it is there afterwards or nothing has changed.

        Raises:
            BadInput: Nothing was learnt yet, or something that is not a guard is in the way.
            WorkFailed: It could not be written.
        """
        if self.fitted_ is None:
            raise BadInput(f"this {method_name(self)} has learnt nothing; fit it first.")
        about = {
            "format": FORMAT,
            "guard": method_name(self),
            "settings": asdict(self),
            "family": self.fitted_.family,
            "base": dict(self.fitted_.base),
            "info": dict(self.fitted_.info),
        }
        artifact.save("guard", Path(path), about, self.fitted_.weights)

    @property
    def sha256(self) -> str:
        """A hash of what was learnt, for `run.json`."""
        found = hashlib.sha256()
        for name, value in sorted((self.fitted_.weights if self.fitted_ else {}).items()):
            found.update(name.encode() + value.contiguous().numpy().tobytes())
        return found.hexdigest()

    def _with(self, fitted: Fitted) -> TrainedGuard:
        object.__setattr__(self, "fitted_", fitted)
        return self

    def _fresh(self, model: TextToImage, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.network(model).to(model.device, torch.float32)


def load_guard(path: str | Path, **changed: Any) -> TrainedGuard:
    """A guard from its folder.

    Args:
        path: What `save` wrote.
        changed: Settings that are to be others at use, such as a strength.

    Raises:
        NotFound: No guard there, or no such method here.
        BadInput: The method has no such setting.
        Unsupported: It was written by a newer version.
        WorkFailed: A file is damaged.
    """
    named = ("guard", "settings", "family", "base", "info")
    about, weights = artifact.load("guard", Path(path), named, FORMAT)
    kind = find("guard", about["guard"])
    settings = {**about["settings"], **changed}
    known = [field.name for field in fields(kind) if field.init]
    for name in settings:
        if name not in known:
            raise BadInput(f"{path}: {unknown('setting', name, known)}")
    held = {key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()}
    guard: TrainedGuard = kind(**held)
    fitted = Fitted(weights=weights, family=about["family"], base=about["base"], info=about["info"])
    return guard._with(fitted)


@dataclass(frozen=True)
class _Own(Loan):
    """The weights of a network that belongs to nobody else."""

    network: nn.Module

    def learnt(self) -> Learnt:
        state = self.network.state_dict()
        return Learnt({name: x.detach().cpu().clone() for name, x in state.items()}, {})

    @torch.no_grad()
    def nudge(self, size: float, rng: torch.Generator) -> None:
        for p in self.parameters.values():
            noise = torch.randn(p.shape, generator=rng).to(p)
            p.add_(noise * size * p.norm() / p.numel() ** 0.5)


def _hashes(model: TextToImage, encoders: tuple[str, ...]) -> dict[str, str]:
    with model.unpatched():
        hashes = model.hashes()
    return {name: hashes[name] for name in encoders if name in hashes}
