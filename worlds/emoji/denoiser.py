"""Stage 4: the denoiser, v-prediction on cached 8 x 8 x 4 latents, text states made on the fly.

Captions are drawn anew for every picture of every batch; one in ten is empty (for guidance) and the
text states get a little noise, so that the denoiser reads meaning rather than the exact vector.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from autoencoder import build as build_vae
from captions import caption, text
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from language import LENGTH, Student, build_encoder, encode, train_tokenizer
from safetensors.torch import load_file, save_file
from scenes import Scene, many
from torch import Tensor
from training import Loop

EMPTY = 0.1
STATE_NOISE = 0.08  # relative to the spread of the text states


def build() -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(160, 192),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=256,
        attention_head_dim=8,
        norm_num_groups=16,
    )
    unet.set_attn_processor(AttnProcessor())  # bf16 SDPA has a very slow backward on CPUs
    return unet


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def stage(module: torch.nn.Module, folder: Path, prefix: str) -> torch.nn.Module:
    """A module with the averaged weights of a finished stage."""
    tensors = load_file(folder / "state.safetensors")
    lead = f"e.{prefix}."
    module.load_state_dict(
        {k[len(lead) :]: v for k, v in tensors.items() if k.startswith(lead)}, strict=False
    )
    return module.eval().requires_grad_(False)


@torch.no_grad()
def cache(
    folder: Path, vae_folder: Path, *, pictures: int, seed: int = 1000, chunk: int = 4000
) -> tuple[list[Scene], Tensor]:
    """Scenes and their latents (unit variance), made once and kept on disk in chunks."""
    folder.mkdir(parents=True, exist_ok=True)
    scenes: list[Scene] = []
    parts = []
    vae = None
    for k in range(pictures // chunk):
        path = folder / f"latents-{seed + k}.safetensors"
        if path.exists():
            rows = json.loads(path.with_suffix(".json").read_text())
            scenes += [Scene(tuple(o), *rest) for o, *rest in rows]
            parts.append(load_file(path)["z"])
            continue
        vae = vae or stage(build_vae(), vae_folder, "vae")
        new, data = many(chunk, seed=seed + k)
        x = torch.from_numpy(data).permute(0, 3, 1, 2)
        z = torch.cat([_encode(vae, b) for b in x.split(100)])
        save_file({"z": z.half().contiguous()}, path)
        path.with_suffix(".json").write_text(
            json.dumps([[list(s.objects), s.place, s.background, s.style] for s in new])
        )
        scenes += new
        parts.append(z.half())
    return scenes, torch.cat(parts)


def _encode(vae: torch.nn.Module, x: Tensor) -> Tensor:
    x = x.float() / 127.5 - 1
    with torch.autocast("cpu", torch.bfloat16):
        return vae.quant_conv(vae.encoder(x))[:, :4].float()


def train(
    folder: Path,
    vae_folder: Path,
    text_folder: Path,
    *,
    seconds: float,
    pictures: int,
    batch: int = 64,
) -> None:
    unet = build()
    loop = Loop(
        folder, {"unet": unet}, steps=10**9, lr=8e-4, seconds=seconds, ema=0.999, warmup=300
    )
    if loop.finished:
        return
    tokenizer = train_tokenizer(text_folder, [])
    tokenizer._tokenizer.no_padding()
    tokenizer._tokenizer.no_truncation()
    student = stage(Student(build_encoder(tokenizer)), text_folder, "student")
    scenes, latents = cache(folder, vae_folder, pictures=pictures)
    mean, std = latents[:20000].float().mean(), latents[:20000].float().std()
    scale = {"scaling_factor": float(1 / std), "shift": float(mean)}
    (folder / "scale.json").write_text(json.dumps(scale))
    alphas = scheduler().alphas_cumprod

    def states_of(said: list[str], rng: torch.Generator) -> Tensor:
        ids, enc = encode(tokenizer, said, LENGTH)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            states = student.encoder(ids).last_hidden_state.float()
        return states + STATE_NOISE * states.std() * torch.randn(states.shape, generator=rng)

    def step(i: int) -> Tensor:
        rng = torch.Generator().manual_seed(i)
        numbers = np.random.default_rng(i)
        rows = torch.randint(len(latents), (batch,), generator=rng)
        z = latents[rows].float() / std
        said = [
            "" if numbers.random() < EMPTY else text(caption(scenes[r], numbers))
            for r in rows.tolist()
        ]
        states = states_of(said, rng)
        t = torch.randint(1000, (batch,), generator=rng)
        eps = torch.randn(z.shape, generator=rng)
        a = alphas[t].view(-1, 1, 1, 1)
        z_t = a.sqrt() * z + (1 - a).sqrt() * eps
        v = a.sqrt() * eps - (1 - a).sqrt() * z
        with torch.autocast("cpu", torch.bfloat16):
            out = unet(z_t, t, states).sample.float()
        return (out - v).square().mean()

    loop.run(step)
