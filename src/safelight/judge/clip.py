"""CLIP as judges use it: unit vectors of pictures and of texts, from one folder or hub id.

Pictures are prepared as CLIP was trained: 8 bits, shorter side to the network's size (bicubic),
centre crop, normalised. Equal to transformers' own image processor, which needs more packages.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from safelight.judge.pixels import as_pil
from safelight.models import networks

LARGE = "openai/clip-vit-large-patch14"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass
class Clip:
    """A CLIP network, loaded at first use.

    Args:
        source: A folder or a hub id with safetensors.
    """

    source: str = LARGE

    @cached_property
    def folder(self) -> Path:
        return networks.folder(self.source)

    @cached_property
    def net(self) -> Any:
        from transformers import CLIPModel

        return networks.module(CLIPModel, self.folder)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import CLIPTokenizerFast  # type: ignore[attr-defined]

        return networks.part(CLIPTokenizerFast, self.folder)

    @cached_property
    def sha256(self) -> str:
        return networks.tensors_sha256(self.net.state_dict())

    @property
    def width(self) -> int:
        return int(self.net.config.projection_dim)

    def images(self, images: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch dim"]:
        """Unit vectors of pictures."""
        net = self.net.to(images.device)
        x = pixel_values(images, net.config.vision_config.image_size, *self._normalisation)
        pooled = net.vision_model(pixel_values=x.to(images.device))[1]
        return F.normalize(net.visual_projection(pooled), dim=-1)

    def texts(self, texts: Sequence[str], device: Any = "cpu") -> Float[Tensor, "text dim"]:
        """Unit vectors of texts; what is longer than the network reads is cut off."""
        net = self.net.to(device)
        tokens = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=net.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        pooled = net.text_model(
            input_ids=tokens["input_ids"].to(device),
            attention_mask=tokens["attention_mask"].to(device),
        )[1]
        return F.normalize(net.text_projection(pooled), dim=-1)

    @cached_property
    def _normalisation(self) -> tuple[Sequence[float], Sequence[float]]:
        return normalisation(self.folder)


def normalisation(folder: Path) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation of the channels, as the folder's `preprocessor_config.json` has them."""
    path = folder / "preprocessor_config.json"
    said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return said.get("image_mean", MEAN), said.get("image_std", STD)


def pixel_values(
    images: Float[Tensor, "batch 3 h w"],
    side: int,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> Float[Tensor, "batch 3 side side"]:
    """Pictures as CLIP reads them, on the CPU."""
    arrays = np.stack([np.asarray(_square(picture, side)) for picture in as_pil(images)])
    x = torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def _square(picture: Image.Image, side: int) -> Image.Image:
    width, height = picture.size
    short = min(width, height)
    picture = picture.resize(
        (int(side * width / short), int(side * height / short)), Image.Resampling.BICUBIC
    )
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))
