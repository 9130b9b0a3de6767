"""FLUX.1: T5 for the tokens, CLIP for the pooled vector, a flow transformer on packed latents.

The transformer sees 2 x 2 squares; outside this file latents are (batch, channel, h, w).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from safelight.flow import Condition, Span
from safelight.models.base import Read
from safelight.models.sd3 import FlowModel


class Flux(FlowModel):
    """FLUX.1 dev (guidance is an input of the denoiser) and schnell (it is not)."""

    family = "flux"
    pipeline = "FluxPipeline"
    parts = {
        "clip_l": "text_encoder",
        "t5": "text_encoder_2",
        "denoiser": "transformer",
        "vae": "vae",
    }
    defaults = (28, 3.5)
    patch_size = 2
    t5_tokens = 512

    @property
    def distilled(self) -> bool:
        return bool(self.denoiser.config.guidance_embeds)

    @property
    def latent_channels(self) -> int:
        return self.denoiser.config.in_channels // 4

    def _layout(self) -> dict[str, Span]:
        none = slice(0, 0)
        pooled = slice(0, self.text_encoders["clip_l"].config.hidden_size)
        width = self.text_encoders["t5"].config.d_model
        return {
            "clip_l": Span(none, none, pooled),
            "t5": Span(slice(0, self.tokens["t5"]), slice(0, width)),
        }

    def read(self, encoder: str, ids: Tensor, mask: Tensor) -> Read:
        seen = self.text_encoders[encoder](ids)
        return Read(seen[0]) if encoder == "t5" else Read(pooled=seen.pooler_output)

    def schedule(self, steps: int, shape: Sequence[int]) -> Any:
        scheduler = copy.deepcopy(self.scheduler)
        sigmas: Any = np.linspace(1.0, 1 / steps, steps)
        if scheduler.config.get("use_flow_sigmas"):
            sigmas = None
        scheduler.set_timesteps(
            None if sigmas is not None else steps,
            sigmas=sigmas,
            device=self.device,
            **self._shift(shape),
        )
        scheduler.set_begin_index(0)  # else every step searches its index, and waits for the GPU
        return scheduler

    def _predict(
        self, z_t: Tensor, t: Tensor, condition: Condition, guidance: float | None
    ) -> Tensor:
        h, w = z_t.shape[-2:]
        strength = None
        if self.distilled:
            value = self.sampling.guidance if guidance is None else guidance
            strength = torch.full([len(z_t)], value, device=z_t.device, dtype=torch.float32)
        packed = self.denoiser(
            hidden_states=pack(z_t),
            timestep=t.to(z_t.dtype) / 1000,
            guidance=strength,
            pooled_projections=condition.pooled,
            encoder_hidden_states=condition.states,
            txt_ids=z_t.new_zeros(condition.states.shape[1], 3),
            img_ids=places(h // 2, w // 2).to(z_t),
            return_dict=False,
        )[0]
        return unpack(packed, h, w)

    def _trained_size(self) -> tuple[int, int]:
        return 128 * self.vae_factor, 128 * self.vae_factor


def pack(z: Float[Tensor, "batch channel h w"]) -> Float[Tensor, "batch patch packed"]:
    """Every 2 x 2 square of latents as one token."""
    b, c, h, w = z.shape
    squares = z.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return squares.reshape(b, h * w // 4, c * 4)


def unpack(
    tokens: Float[Tensor, "batch patch packed"], h: int, w: int
) -> Float[Tensor, "batch channel h w"]:
    """The reverse of `pack`."""
    b, _, packed = tokens.shape
    squares = tokens.view(b, h // 2, w // 2, packed // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return squares.reshape(b, packed // 4, h, w)


def places(rows: int, columns: int) -> Float[Tensor, "patch 3"]:
    """The row and column of every token, for the rotary embedding."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], -1).view(-1, 3).float()
