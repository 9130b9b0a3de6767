"""Stable Diffusion 3 and 3.5: two CLIP encoders and T5 one after the other, a flow transformer."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from safelight.flow import Condition, Span
from safelight.models.base import Read, TextToImage


class FlowModel(TextToImage):
    """What the rectified-flow families share (arXiv:2403.03206).

    z_t = (1 - s) z + s eps with s = t / 1000; the denoiser says the flow `eps - z`.
    """

    def noised(self, z: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        s = (t.to(z) / self._unit).expand(len(z))[:, None, None, None]
        return (1 - s) * z + s * eps, eps - z

    def random_times(self, n: int, rng: torch.Generator) -> Tensor:
        """Logit-normal, shifted towards noise as the scheduler is (arXiv:2403.03206, eq. 23)."""
        u = torch.randn(n, generator=rng).sigmoid()
        config = self.scheduler.config
        shift = 1.0 if config.get("use_dynamic_shifting") else config.get("shift", 1.0)
        return (self._unit * shift * u / (1 + (shift - 1) * u)).to(self.device)

    @property
    def noisiest(self) -> float:
        return float(self._unit)

    @property
    def _unit(self) -> int:
        return self.scheduler.config.num_train_timesteps

    def schedule(self, steps: int, shape: Sequence[int]) -> Any:
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(steps, device=self.device, **self._shift(shape))
        return scheduler

    def _shift(self, shape: Sequence[int]) -> dict[str, float]:
        """The time shift for a picture's size: linear in its number of tokens."""
        config = self.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return {}
        tokens = math.prod(side // self.patch_size for side in shape[-2:])
        least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        slope = (high - low) / (most - least)
        return {"mu": tokens * slope + low - slope * least}

    def text_projections(self) -> Iterator[tuple[str, nn.Linear]]:
        # One layer reads the text states; all blocks work on what it says.
        yield "context_embedder", self.denoiser.context_embedder


class SD3(FlowModel):
    """Stable Diffusion 3 and 3.5. T5 may be left out, its tokens are zeros then."""

    family = "sd3"
    pipeline = "StableDiffusion3Pipeline"
    parts = {
        "clip_l": "text_encoder",
        "clip_g": "text_encoder_2",
        "t5": "text_encoder_3",
        "denoiser": "transformer",
        "vae": "vae",
    }
    defaults = (28, 7.0)
    patch_size = 2

    def _layout(self) -> dict[str, Span]:
        at, pooled_at, layout = 0, 0, {}
        for name in ("clip_l", "clip_g"):
            config = self.text_encoders[name].config
            dims = slice(at, at := at + config.hidden_size)
            pooled = slice(pooled_at, pooled_at := pooled_at + config.projection_dim)
            layout[name] = Span(slice(0, self.tokens[name]), dims, pooled)
        if "t5" in self.text_encoders:
            first = self.tokens["clip_l"]
            layout["t5"] = Span(slice(first, first + self.tokens["t5"]), slice(0, self._width))
        return layout

    @property
    def _width(self) -> int:
        return self.denoiser.config.joint_attention_dim

    def _joined_shape(self) -> tuple[int, int]:
        return self.tokens["clip_l"] + self.tokens.get("t5", self.t5_tokens), self._width

    def read(self, encoder: str, ids: Tensor, mask: Tensor) -> Read:
        if encoder == "t5":
            return Read(self.text_encoders["t5"](ids)[0])  # unmasked, as it was trained
        seen = self.text_encoders[encoder](ids, output_hidden_states=True)
        return Read(seen.hidden_states[-2], seen.text_embeds)

    def _predict(
        self, z_t: Tensor, t: Tensor, condition: Condition, guidance: float | None
    ) -> Tensor:
        return self.denoiser(
            hidden_states=z_t,
            timestep=t,
            encoder_hidden_states=condition.states,
            pooled_projections=condition.pooled,
            return_dict=False,
        )[0]
