"""Stage 1: the autoencoder, 64 x 64 x 3 to 8 x 8 x 8.

L1 and L2 on pixels, L2 on pixel differences, noise on the latents so that the decoder forgives the
denoiser's small errors, a weak pull of the latents to unit variance.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from scenes import many
from torch import Tensor
from torch.nn import functional as F
from training import Loop, warm_start

CHANNELS = 8
NOISE = 0.08  # of a unit-variance latent


def build() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=64,
    )  # contiguous: GroupNorm's backward is slow in channels_last on CPUs


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def train(
    folder: Path,
    *,
    seconds: float,
    pictures: int = 60_000,
    batch: int = 8,
    start: Path | None = None,
) -> None:
    """`start`: the same stage of an earlier build, to begin from."""
    vae = build()
    if start is not None:
        warm_start(vae, start, "vae")
    loop = Loop(
        folder, {"vae": vae}, steps=10**9, lr=1.2e-3, seconds=seconds, ema=0.998, warmup=100
    )
    if loop.finished:
        return
    data = torch.from_numpy(many(pictures, seed=1)[1]).permute(0, 3, 1, 2)

    def step(i: int) -> Tensor:
        rng = torch.Generator().manual_seed(i)
        rows = torch.randint(len(data), (batch,), generator=rng)
        x = data[rows].float() / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16):
            z = vae.quant_conv(vae.encoder(x))[:, :CHANNELS].float()
            noisy = z + NOISE * torch.randn(z.shape, generator=rng)
            y = vae.decoder(vae.post_quant_conv(noisy)).float()
        loss = F.l1_loss(y, x) + F.mse_loss(y, x)
        loss = loss + sum(F.mse_loss(a, b) for a, b in zip(edges(y), edges(x), strict=True))
        # unit variance over the batch, per channel: the fixed noise above has a meaning then
        return loss + 0.01 * ((z.mean((0, 2, 3)).square() + (z.var((0, 2, 3)) - 1).square()).mean())

    loop.run(step)


def polish(
    folder: Path, vae_folder: Path, cached: Path, *, seconds: float, batch: int = 24
) -> None:
    """Train the decoder alone, on the latents the denoiser learns from: they stay as they are."""
    from denoiser import cache, stage

    vae = stage(build(), vae_folder, "vae")
    for part in (vae.decoder, vae.post_quant_conv):
        part.requires_grad_(True)
    loop = Loop(folder, {"vae": vae}, steps=10**9, lr=8e-4, seconds=seconds, ema=0.998)
    if loop.finished:
        return
    n = 4000 * sum(1 for _ in cached.glob("latents-*.safetensors"))
    _, latents = cache(cached, vae_folder, pictures=n)
    pictures = [many(4000, seed=1000 + k)[1] for k in range(n // 4000)]
    data = torch.from_numpy(np.concatenate(pictures)).permute(0, 3, 1, 2)
    vae.train()

    def step(i: int) -> Tensor:
        rng = torch.Generator().manual_seed(i)
        rows = torch.randint(len(data), (batch,), generator=rng)
        x, z = data[rows].float() / 127.5 - 1, latents[rows].float()
        with torch.autocast("cpu", torch.bfloat16):
            noisy = z + NOISE * torch.randn(z.shape, generator=rng)
            y = vae.decoder(vae.post_quant_conv(noisy)).float()
        loss = F.l1_loss(y, x) + F.mse_loss(y, x)
        return loss + sum(F.mse_loss(a, b) for a, b in zip(edges(y), edges(x), strict=True))

    loop.run(step)
