"""The two networks behind the Emoji World's judges: which concepts, which background, which style.

`a` is a residual network, `b` a densely connected one on overlapping patches; they share
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


class Dense(nn.Module):
    """Layers that each see all maps before them (DenseNet, Huang et al. 2017)."""

    def __init__(self, inside: int, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(inside + k * growth),
                nn.SiLU(),
                nn.Conv2d(inside + k * growth, growth, 3, 1, 1),
            )
            for k in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


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
        nn.Sequential(nn.Conv2d(3, 64, 6, 4, 1), Dense(64, 60, 4)),
        nn.Sequential(nn.BatchNorm2d(304), nn.SiLU(), nn.Conv2d(304, 160, 2, 2), Dense(160, 60, 4)),
        nn.Sequential(nn.BatchNorm2d(400), nn.SiLU()),
    ]
    return nn.ModuleList(stages), 400


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
