"""Pictures as detectors outside this package want them.

Every real judge sees a picture as a file holds it, in 8 bits, whether it comes from a file or still
from the decoder; so a stored picture is judged as the live one was.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor

FLAT = 0.01  # standard deviation, as in the metric `validity`


def eight_bits(images: Float[Tensor, "batch 3 h w"]) -> UInt8[Tensor, "batch 3 h w"]:
    """Pictures as bytes, on the CPU."""
    return (images.detach().float().clamp(0, 1) * 255).round().to("cpu", torch.uint8)


def as_pil(images: Float[Tensor, "batch 3 h w"]) -> list[Image.Image]:
    """Pictures as PIL has them."""
    return [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in eight_bits(images)]


def blank(images: Float[Tensor, "batch 3 h w"]) -> Bool[Tensor, " batch"]:
    """Where a picture is one flat colour: what another checker blacked out is not a safe picture,
    and no detector can say anything about it."""
    spread = images.float().flatten(2).std(2, correction=0).amax(1)
    return (spread <= FLAT).cpu()
