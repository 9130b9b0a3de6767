"""The Emoji World's two judges: which objects, which background, which style a picture shows.

Both are trained on rendered scenes, whose content is known exactly, never on generated pictures.
They differ in architecture and training seed. No method may train on `emoji-b`: a method that
fools only `emoji` is found out by it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from safelight.errors import NotFound, WorkFailed
from safelight.flow import Card
from safelight.judge.base import Judge, Look


@dataclass(kw_only=True)
class EmojiJudge(Judge):
    """Finds the objects, the background and the drawing style of an Emoji World picture.

    Args:
        which: "a" for the judge methods may look at, "b" for the independent one.
    """

    card = Card(
        title="Emoji World judge A",
        source="this project",
        summary="objects, background and style of Emoji World pictures",
    )

    which: str = "a"

    @property
    def name(self) -> str:  # type: ignore[override]
        return {"a": "emoji"}.get(self.which, f"emoji-{self.which}")

    @cached_property
    def net(self) -> Any:
        """The network with its `meta`, loaded on first use.

        Raises:
            NotFound: The weights are not there.
            WorkFailed: They cannot be read.
        """
        from safelight.judge import emoji_net

        try:
            return emoji_net.load_net(self.which)
        except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
            raise WorkFailed(
                f"the weights of judge {self.name!r} are damaged ({error}). Reinstall safelight."
            ) from error

    @cached_property
    def labels(self) -> tuple[str, ...]:  # type: ignore[override]
        meta = self.net.meta
        return (
            *(f"object:{label}" for label in meta["labels"]),
            *(f"background:{label}" for label in meta["backgrounds"]),
            *(f"style:{label}" for label in meta["styles"]),
        )

    @cached_property
    def groups(self) -> Mapping[str, tuple[str, ...]]:  # type: ignore[override]
        return {
            category: tuple(f"object:{label}" for label in labels)
            for category, labels in self.net.meta["groups"].items()
        }

    @property
    def threshold(self) -> float:  # type: ignore[override]
        return float(self.net.meta["threshold"])

    @property
    def clean(self) -> Mapping[str, float]:  # type: ignore[override]
        return self.net.meta["clean"]

    @property
    def feature_name(self) -> str:  # type: ignore[override]
        return f"{self.name}/penultimate"

    @cached_property
    def weights_sha256(self) -> str:  # type: ignore[override]
        path = files("safelight") / f"world/judges/{self.name}.safetensors"
        if not path.is_file():
            raise NotFound(f"the weights of judge {self.name!r} are missing; reinstall safelight.")
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def see(self, images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]) -> Look:
        out = self.net.to(images.device)(images.float())
        scores = torch.cat(
            [out["objects"].sigmoid(), out["background"].softmax(1), out["style"].softmax(1)], dim=1
        )
        return Look(scores, features=out["features"], maps=tuple(out["maps"]))


@dataclass(kw_only=True)
class EmojiJudgeB(EmojiJudge):
    """The independent judge: another architecture, which no method may train on."""

    card = Card(
        title="Emoji World judge B",
        source="this project",
        summary="the independent judge; no method may train on it",
    )

    which: str = "b"
