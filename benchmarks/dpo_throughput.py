"""DPO's pairs per second with everything constant computed once, against encoding at every step.

    python benchmarks/dpo_throughput.py
    python benchmarks/dpo_throughput.py --model tiny-sdxl --batch 4 --steps 5
    python benchmarks/dpo_throughput.py --model sd15 --batch 1 --steps 1 --repeats 3 --threads 2
    python benchmarks/dpo_throughput.py --model sd15 --device cuda --dtype bfloat16

All sides take the same optimiser steps on the same pairs. "encoding" does at every step what a data
loader does: read two PNG files per pair, decode them, bring them to the model's size, run the
autoencoder and the text encoders. "cached" has latents and captions, "draws" what the reference
says as well (`draws` of `dpo`, where a row's times and noises come again). "example" is a step as
the research example of diffusers takes it (Stable Diffusion 1 only): the networks called directly,
and nothing kept from one step to the next. Making what is kept is not counted; it pays where a row
comes up more often than it has draws. The sides take turns, so that a busy machine disturbs all
alike; ratios are to "encoding", `cpu_ratio` in CPU seconds instead of the clock. The pictures are
noise: it takes as long. So are the weights of `sd15`, a model of the shape of Stable Diffusion 1.5
(512 pixels, 860 million weights in the denoiser).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import logsigmoid

from safelight.align.dpo import DPO
from safelight.models.base import TextToImage
from safelight.models.load import load
from safelight.training.captions import Captions
from safelight.training.preference import Batch
from safelight.training.twins import Twin, Twins
from safelight.training.weights import unadapted


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--model", default="emoji-world", help="a model, or sd15 [emoji-world]")
    ask.add_argument("--device", help="[the fastest there is]")
    ask.add_argument("--dtype", help="[the model's own]")
    ask.add_argument("--batch", type=int, default=16, help="pairs per step [16]")
    ask.add_argument("--steps", type=int, default=4, help="steps per round [4]")
    ask.add_argument("--repeats", type=int, default=5, help="rounds of each side [5]")
    ask.add_argument("--threads", type=int, default=1, help="torch threads [1]")
    ask.add_argument("--autocast", action="store_true", help="compute in bfloat16, all sides")
    ask.add_argument("--channels-last", action="store_true", help="memory layout, all sides")
    given = ask.parse_args()
    torch.set_num_threads(given.threads)

    source = sd15() if given.model == "sd15" else given.model
    model = load(source, device=given.device, dtype=given.dtype)
    if given.channels_last:
        for part in (model.denoiser, model.modules["vae"]):
            part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with tempfile.TemporaryDirectory() as folder:
        twins = noise(Path(folder), 2 * given.batch, model.default_size)
        settings = {"batch": given.batch, "iterations": given.steps, "autocast": given.autocast}
        method = DPO(**settings, epochs=1, validation=0.05, draws=1)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=given.autocast):
            rounds = measured(method, model, twins, given.repeats)
    per_second = {
        side: [given.steps * given.batch / clock for clock, _ in own]
        for side, own in rounds.items()
    }
    fast = {side: own for side, own in rounds.items() if side != "encoding"}
    slow = rounds["encoding"]
    print(
        json.dumps(
            {
                "model": model.name,
                "device": str(model.device),
                "dtype": str(model.dtype)[6:],
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                "threads": torch.get_num_threads(),
                "batch": given.batch,
                "autocast": given.autocast,
                "channels_last": given.channels_last,
                "pairs_per_second": {s: middle(own) for s, own in per_second.items()},
                "ratio": {side: middle(ratios(slow, own, 0)) for side, own in fast.items()},
                "ratios": {side: ratios(slow, own, 0) for side, own in fast.items()},
                "cpu_ratio": {side: middle(ratios(slow, own, 1)) for side, own in fast.items()},
                "peak_gpu_mb": peak(),
            }
        )
    )


def measured(
    method: DPO, model: TextToImage, twins: Twins, repeats: int
) -> dict[str, list[tuple[float, float]]]:
    """Seconds and CPU seconds of every round of all sides, in turns."""
    material = method.gather(model, twins, seed=0)
    rng = torch.Generator().manual_seed(0)
    batches = list(method.batches(material, 1, rng))
    with method.lend(model, rng) as loan:
        parameters = list(loan.parameters.values())
        adam = method.optimiser(parameters, method.rate(model))

        def round_of(loss: Callable[[Batch], Tensor]) -> tuple[float, float]:
            clock, work = time.perf_counter(), time.process_time()
            for batch in batches:
                adam.zero_grad(set_to_none=True)
                loss(batch).backward()
                torch.nn.utils.clip_grad_norm_(parameters, method.clip)
                adam.step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return time.perf_counter() - clock, time.process_time() - work

        def ours(batch: Batch) -> Tensor:
            return method.loss(model, batch, rng).total

        ways: dict[str, Callable[[Batch], Tensor]] = {
            "draws": ours,
            "cached": lambda batch: ours(replace(batch, e_ref=None)),
            "encoding": lambda batch: ours(encoded(batch, model, twins)),
        }
        if model.family == "sd1":
            ways["example"] = lambda batch: example(batch, model, twins, method.scale(model))
        for way in ways.values():  # warm up
            round_of(way)
        found: dict[str, list[tuple[float, float]]] = {side: [] for side in ways}
        for _ in range(repeats):
            for side, way in ways.items():
                found[side].append(round_of(way))
    return found


@torch.no_grad()
def encoded(batch: Batch, model: TextToImage, twins: Twins) -> Batch:
    """The batch with latents and captions made anew, from files."""
    z = model.encode_images(opened(batch, model, twins)).unflatten(0, (2, -1))
    told = Captions.of(model, batch.captions, len(batch))
    return replace(batch, z=z, told=told, e_ref=None)


def example(batch: Batch, model: TextToImage, twins: Twins, scale: float) -> Tensor:
    """The loss of one step, with the networks called as diffusers' research example calls them."""
    vae, unet, scheduler = model.modules["vae"], model.denoiser, model.scheduler
    (reader,), (tokenizer,) = model.text_encoders.values(), model.tokenizers.values()
    n, device = len(batch), model.device
    with torch.no_grad():
        pixels = 2 * opened(batch, model, twins).to(device, model.dtype) - 1
        z = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
        ids = tokenizer(
            list(batch.captions), padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        states = reader(ids.to(device))[0].repeat(2, 1, 1)
        eps = torch.randn_like(z[:n]).repeat(2, 1, 1, 1)
        t = torch.randint(scheduler.config.num_train_timesteps, (n,), device=device).repeat(2)
        z_t = scheduler.add_noise(z, eps, t)
        with unadapted(model):
            said = unet(z_t, t, states).sample
    r_w, r_l = (said.float() - eps.float()).square().mean((1, 2, 3)).chunk(2)
    m_w, m_l = (unet(z_t, t, states).sample.float() - eps.float()).square().mean((1, 2, 3)).chunk(2)
    return -logsigmoid(-scale * ((m_w - m_l) - (r_w - r_l))).mean()


def opened(batch: Batch, model: TextToImage, twins: Twins) -> Tensor:
    """Pictures of both sides, from files."""
    rows = [twins.rows[i % len(twins)] for i in range(len(batch))]
    sides = [twins.images(rows, side, model.default_size) for side in ("safe", "unsafe")]
    return torch.cat(sides)


def sd15() -> Any:
    """A pipeline of the shape of Stable Diffusion 1.5, with random weights."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from diffusers import UNet2DConditionModel as UNet
    from transformers import CLIPTextConfig, CLIPTextModel

    from safelight.models.tiny import clip_tokenizer

    blocks = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
    tokenizer = clip_tokenizer()
    return StableDiffusionPipeline(
        unet=UNet(sample_size=64, cross_attention_dim=768),
        vae=AutoencoderKL(
            **blocks,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            sample_size=512,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
                eos_token_id=tokenizer.eos_token_id,
            )
        ),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            clip_sample=False,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def noise(folder: Path, n: int, size: tuple[int, int]) -> Twins:
    """Pairs of PNG files of a model's size."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        names = [f"{i}-{side}.png" for side in ("safe", "unsafe")]
        for name in names:
            pixels: Any = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name)
        texts = (f"a small knife on a table, number {i}", f"a small tulip on a table, number {i}")
        rows.append(Twin(str(i), "weapons", *texts, unsafe=names[1], safe=names[0]))
    return Twins("noise", tuple(rows), folder)


def peak() -> float | None:
    return round(torch.cuda.max_memory_allocated() / 2**20) if torch.cuda.is_available() else None


def ratios(
    slow: list[tuple[float, float]], fast: list[tuple[float, float]], unit: int
) -> list[float]:
    """Of each round, in seconds (0) or CPU seconds (1)."""
    return [round(s[unit] / f[unit], 2) for s, f in zip(slow, fast, strict=True)]


def middle(values: list[float]) -> float:
    return round(statistics.median(values), 3)


if __name__ == "__main__":
    main()
