"""The two networks behind the Emoji World's judges: which concepts, which background, which style.

`a` is a residual convolutional network, `b` a ConvNeXt-like one on overlapping patches; they share
no weights, no architecture and no training batch. Both read 64 x 64 pictures and others resized.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from safelight.errors import NotFound

SIDE = 64


class Residual(nn.Module):
    """Two 3 x 3 convolutions and a skip."""

    def __init__(self, inside: int, outside: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outside),
            nn.ReLU(),
            nn.Conv2d(outside, outside, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outside),
        )
        same = stride == 1 and inside == outside
        self.skip = nn.Identity() if same else nn.Conv2d(inside, outside, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


class Mixing(nn.Module):
    """Depthwise 5 x 5, then a two-layer perceptron per place, and a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spread = nn.Conv2d(width, width, 5, 1, 2, groups=width)
        self.norm = nn.GroupNorm(1, width)
        self.up = nn.Conv2d(width, 3 * width, 1)
        self.down = nn.Conv2d(3 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(self.spread(x)))))


def trunk_a() -> tuple[nn.ModuleList, int]:
    stem = nn.Sequential(nn.Conv2d(3, 32, 5, 2, 2), nn.BatchNorm2d(32), nn.ReLU())
    stages = [
        stem,
        nn.Sequential(Residual(32, 64, 2), Residual(64, 64)),
        nn.Sequential(Residual(64, 128, 2), Residual(128, 128)),
        nn.Sequential(Residual(128, 160), Residual(160, 160)),
    ]
    return nn.ModuleList(stages), 160


def trunk_b() -> tuple[nn.ModuleList, int]:
    stages = [
        nn.Sequential(nn.Conv2d(3, 64, 8, 4, 2), Mixing(64), Mixing(64)),
        nn.Sequential(nn.Conv2d(64, 160, 2, 2), Mixing(160), Mixing(160), Mixing(160)),
    ]
    return nn.ModuleList(stages), 160


class EmojiNet(nn.Module):
    """Shared trunk, average and maximum over the picture, three linear heads.

    Args:
        which: "a" or "b".
        meta: `labels`, `backgrounds`, `styles` and what else the judge needs to know.
    """

    def __init__(self, which: str, meta: dict[str, Any]) -> None:
        super().__init__()
        self.meta = meta
        self.stages, width = trunk_a() if which == "a" else trunk_b()
        self.objects = nn.Linear(2 * width, len(meta["labels"]))
        self.background = nn.Linear(2 * width, len(meta["backgrounds"]))
        self.style = nn.Linear(2 * width, len(meta["styles"]))

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> dict[str, Any]:
        """Logits of the three heads, pooled features, and the feature map of every stage.

        Args:
            images: Pictures in [0, 1]; other sizes than 64 x 64 are resized.
        """
        if images.shape[-2:] != (SIDE, SIDE):
            images = F.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)
        x, maps = images * 2 - 1, []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        features = torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)
        return {
            "objects": self.objects(features),
            "background": self.background(features),
            "style": self.style(features),
            "features": features,
            "maps": maps,
        }


def load_net(which: str, folder: Path | None = None) -> EmojiNet:
    """The trained network of judge "a" (`emoji`) or "b" (`emoji-b`), in evaluation mode.

    Raises:
        NotFound: The weights are not there.
    """
    name = {"a": "emoji", "b": "emoji-b"}[which]
    folder = folder or Path(str(files("safelight") / "world" / "judges"))
    path = folder / f"{name}.safetensors"
    if not path.exists():
        raise NotFound(f"the weights of judge {name!r} are not at {path}. Reinstall safelight.")
    net = EmojiNet(which, json.loads(path.with_suffix(".json").read_text()))
    weights = load_file(path)
    net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})
    return net.eval().requires_grad_(False)
