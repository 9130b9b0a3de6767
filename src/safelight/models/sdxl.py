"""Stable Diffusion XL: two CLIP encoders side by side, a pooled vector, a U-Net told its size."""

from __future__ import annotations

import torch
from torch import Tensor

from safelight.flow import Condition, Span
from safelight.models.base import Read
from safelight.models.sd1 import UNetModel


class SDXL(UNetModel):
    """Stable Diffusion XL (arXiv:2307.01952)."""

    family = "sdxl"
    pipeline = "StableDiffusionXLPipeline"
    parts = {
        "clip_l": "text_encoder",
        "clip_g": "text_encoder_2",
        "denoiser": "unet",
        "vae": "vae",
    }
    defaults = (30, 5.0)

    def _layout(self) -> dict[str, Span]:
        at, layout = 0, {}
        for name, clip in self.text_encoders.items():
            dims = slice(at, at := at + clip.config.hidden_size)
            pooled = slice(0, clip.config.projection_dim) if name == "clip_g" else None
            layout[name] = Span(slice(0, self.tokens[name]), dims, pooled)
        return layout

    def read(self, encoder: str, ids: Tensor, mask: Tensor) -> Read:
        seen = self.text_encoders[encoder](ids, output_hidden_states=True)
        # The last layer is never read: the denoiser was trained on the one before it.
        return Read(seen.hidden_states[-2], seen.text_embeds if encoder == "clip_g" else None)

    def empty(self, n: int) -> Condition:
        """Zeros instead of the text "", where the pipeline's settings ask for them."""
        seen = self.encode([""] * n)
        if not self.config.get("force_zeros_for_empty_prompt", True):
            return seen
        return seen.edit(*[lambda encoder, part: torch.zeros_like(part)] * 2)

    def _predict(
        self, z_t: Tensor, t: Tensor, condition: Condition, guidance: float | None
    ) -> Tensor:
        size = [side * self.vae_factor for side in z_t.shape[-2:]]
        times = torch.tensor([*size, 0, 0, *size], device=z_t.device, dtype=z_t.dtype)
        added = {"text_embeds": condition.pooled, "time_ids": times.expand(len(z_t), -1)}
        return self.denoiser(z_t, t, condition.states, added_cond_kwargs=added, return_dict=False)[
            0
        ]

    # Some checkpoints (playground-v2.5) centre their latents.

    def _scaled(self, z: Tensor) -> Tensor:
        mean, std = self._centre(z)
        return (z - mean) * self.vae.config.scaling_factor / std

    def _unscaled(self, z: Tensor) -> Tensor:
        mean, std = self._centre(z)
        return z * std / self.vae.config.scaling_factor + mean

    def _centre(self, z: Tensor) -> tuple[Tensor, Tensor]:
        config = self.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return z.new_zeros(()), z.new_ones(())
        return z.new_tensor(mean).view(1, -1, 1, 1), z.new_tensor(std).view(1, -1, 1, 1)
