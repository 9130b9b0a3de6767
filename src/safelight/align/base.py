"""What an alignment is.

An `Alignment` looks at a model and some data and returns a `Patch`; the model itself is left as it
was. A `Trained` alignment gets there by gradient descent (`safelight.training.descent`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from safelight.errors import Unsupported
from safelight.flow import Card
from safelight.models.base import TextToImage
from safelight.models.patch import Patch
from safelight.training.checkpoint import Checkpoint as Checkpoint
from safelight.training.data import Split as Split
from safelight.training.data import TextData as TextData
from safelight.training.descent import Descent, Meter, method_name
from safelight.training.descent import Loss as Loss
from safelight.training.descent import Tick as Tick
from safelight.training.descent import Watch as Watch


class Alignment(ABC):
    """A method that changes weights, once."""

    card: ClassVar[Card]

    @abstractmethod
    def fit(self, model: TextToImage, data: Any = None, *, seed: int = 0) -> Patch:
        """Learn a patch; the model is left as it was."""


@dataclass(frozen=True, kw_only=True)
class Trained(Descent, Alignment):
    """An alignment found by gradient descent; what is learnt becomes a patch."""

    def fit(
        self,
        model: TextToImage,
        data: Any = None,
        *,
        seed: int = 0,
        watch: Watch | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> Patch:
        """Learn a patch; the model is left as it was, also after an error or Ctrl-C.

        Args:
            data: What the method learns from.
            seed: Of every random choice; the same seed on the same machine gives the same patch.
            watch: Called after each step.
            checkpoint: Where to keep how far it is; the same call goes on from there if killed.

        Raises:
            Unsupported: The method is not for this family.
            BadInput: The data cannot be learnt from.
            WorkFailed: The loss is no longer a number.
        """
        if model.family not in self.card.families:
            raise Unsupported(
                f"{method_name(self)} supports {', '.join(self.card.families)}; {model.name} is "
                f"{model.family}."
            )
        meter = Meter(model.device)
        material = self.gather(model, data, seed=seed, watch=watch)
        about: dict[str, Any] = {"watch": watch, "meter": meter, "checkpoint": checkpoint}
        return self.train(model, material, seed=seed, **about)

    def train(self, model: TextToImage, material: Any, *, seed: int = 0, **descent: Any) -> Patch:
        """`fit` on what `gather` returned, so that several runs can share it.

        Args:
            descent: `watch`, `meter`, `until`, `checkpoint` as for `descend`.
        """
        found = self.descend(model, material, seed=seed, **descent)
        return Patch(
            full=dict(found.learnt.full),
            low_rank=dict(found.learnt.low_rank),
            method=method_name(self),
            settings=asdict(self),
            family=model.family,
            base=dict(model.hashes()),
            info=found.info,
        )
