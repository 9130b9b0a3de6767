"""Stable Diffusion 1 and 2: one CLIP encoder, a U-Net, noise or velocity prediction."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from safelight.errors import Unsupported
from safelight.flow import Condition, Span
from safelight.models.base import Read, TextToImage


class UNetModel(TextToImage):
    """What the U-Net families share: the variance-preserving noise of DDPM (arXiv:2006.11239).

    z_t = sqrt(a_t) z + sqrt(1 - a_t) eps, with `a_t` the scheduler's cumulative product.
    """

    def schedule(self, steps: int, shape: Sequence[int]) -> Any:
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(steps, device=self.device)
        return scheduler

    def noised(self, z: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        a = self.scheduler.alphas_cumprod.to(z.device)[t.round().long().expand(len(z))]
        a = a.to(z.dtype)[:, None, None, None]
        z_t = a.sqrt() * z + (1 - a).sqrt() * eps
        match kind := self.scheduler.config.prediction_type:
            case "epsilon":
                return z_t, eps
            case "v_prediction":  # arXiv:2202.00512, appendix D
                return z_t, a.sqrt() * eps - (1 - a).sqrt() * z
            case "sample":
                return z_t, z
        raise Unsupported(f"{self.name} predicts {kind!r}, which has no training target here.")

    def random_times(self, n: int, rng: torch.Generator) -> Tensor:
        total = self.scheduler.config.num_train_timesteps
        return torch.randint(total, (n,), generator=rng).float().to(self.device)

    @property
    def noisiest(self) -> float:
        return float(self.scheduler.config.num_train_timesteps - 1)

    def text_projections(self) -> Iterator[tuple[str, nn.Linear]]:
        for name, layer in self.denoiser.named_modules():
            if name.endswith(("attn2.to_k", "attn2.to_v")):
                yield name, layer


class SD1(UNetModel):
    """Stable Diffusion 1.x, and 2.x, which differs in size only."""

    family = "sd1"
    pipeline = "StableDiffusionPipeline"
    parts = {"clip_l": "text_encoder", "denoiser": "unet", "vae": "vae"}
    defaults = (30, 7.5)

    def _layout(self) -> dict[str, Span]:
        width = self.text_encoders["clip_l"].config.hidden_size
        return {"clip_l": Span(slice(0, self.tokens["clip_l"]), slice(0, width))}

    def read(self, encoder: str, ids: Tensor, mask: Tensor) -> Read:
        clip = self.text_encoders[encoder]
        seen_mask = mask if getattr(clip.config, "use_attention_mask", False) else None
        return Read(clip(ids, attention_mask=seen_mask).last_hidden_state)

    def _predict(
        self, z_t: Tensor, t: Tensor, condition: Condition, guidance: float | None
    ) -> Tensor:
        return self.denoiser(z_t, t, condition.states, return_dict=False)[0]
