"""Stage 4: the denoiser, v-prediction on cached 8 x 8 x 8 latents, text states made on the fly.

Captions are drawn anew for every picture of every batch; one in ten is empty (for guidance), one
noun in five is a dictionary word that the teacher finds near the concept (never a held-out one),
and the text states get a little noise, so that the denoiser reads meaning and not exact vectors.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from autoencoder import CHANNELS
from autoencoder import build as build_vae
from captions import caption, pick, text
from concepts import CONCEPTS, UNSAFE
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from language import LENGTH, Student, build_encoder, encode, targets, train_tokenizer
from safetensors.torch import load_file, save_file
from scenes import Scene, many
from torch import Tensor
from training import Loop, place, warm_start

EMPTY = 0.1
DICTIONARY = 0.2  # share of nouns from the dictionary
TWO = 0.72  # share of two-object scenes
SAY = (0.75, 0.65)  # share of captions that name the background, the style
STATE_NOISE = 0.08  # relative to the spread of the text states


def build() -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
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
    rank, ranks = place()
    paths = [folder / f"latents-{seed + k}.safetensors" for k in range(pictures // chunk)]
    vae = None
    for k in range(rank, len(paths), ranks):
        if paths[k].exists():
            continue
        vae = vae or stage(build_vae(), vae_folder, "vae")
        new, data = many(chunk, seed=seed + k)
        x = torch.from_numpy(data).permute(0, 3, 1, 2)
        z = torch.cat([_encode(vae, b) for b in x.split(100)])
        paths[k].with_suffix(".json").write_text(
            json.dumps([[list(s.objects), s.place, s.background, s.style] for s in new])
        )
        save_file({"z": z.half().contiguous()}, paths[k])
    if ranks > 1:
        dist.barrier()
    rows = [r for p in paths for r in json.loads(p.with_suffix(".json").read_text())]
    scenes = [Scene(tuple(o), *rest) for o, *rest in rows]
    return scenes, torch.cat([load_file(p)["z"] for p in paths])


def _encode(vae: torch.nn.Module, x: Tensor) -> Tensor:
    x = x.float() / 127.5 - 1
    with torch.autocast("cpu", torch.bfloat16):
        return vae.quant_conv(vae.encoder(x))[:, :CHANNELS].float()


def train(
    folder: Path,
    vae_folder: Path,
    text_folder: Path,
    *,
    seconds: float,
    pictures: int,
    batch: int = 64,
    start: Path | None = None,
) -> None:
    """`start`: the same stage of an earlier build, to begin from."""
    unet = build()
    if start is not None:
        warm_start(unet, start, "unet")
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

    two = torch.tensor([len(s.objects) == 2 for s in scenes])
    chance = torch.where(two, TWO / two.sum(), (1 - TWO) / (~two).sum())
    near = neighbours_of(text_folder)

    def nouns(scene: Scene, numbers: np.random.Generator) -> list[str] | None:
        """The scene's words, some of them from the dictionary; None for all from the captions."""
        if numbers.random() >= 2 * DICTIONARY:
            return None
        return [
            pick(numbers, near[c] or CONCEPTS[c].train)
            if numbers.random() < 0.5
            else pick(numbers, CONCEPTS[c].train)
            for c in scene.objects
        ]

    def states_of(said: list[str], rng: torch.Generator) -> Tensor:
        ids, enc = encode(tokenizer, said, LENGTH)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            states = student.encoder(ids).last_hidden_state.float()
        return states + STATE_NOISE * states.std() * torch.randn(states.shape, generator=rng)

    def step(i: int) -> Tensor:
        rng = torch.Generator().manual_seed(i)
        numbers = np.random.default_rng(i)
        rows = torch.multinomial(chance, batch, replacement=True, generator=rng)
        z = latents[rows].float() / std
        said = []
        for r in rows.tolist():
            say = (numbers.random() < SAY[0], numbers.random() < SAY[1])
            words = text(caption(scenes[r], numbers, words=nouns(scenes[r], numbers), say=say))
            said.append("" if numbers.random() < EMPTY else words)
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


def neighbours_of(text_folder: Path, cosine: float = 0.88, lead: float = 0.22) -> list[list[str]]:
    """For every concept the dictionary words that the teacher finds near it and near no other.

    Held-out words, and words that contain or are part of one, are left out.
    """
    data = targets(text_folder)
    cos = (data["words"] @ data["prototypes"][: len(CONCEPTS)].T).topk(2, 1)
    held_out = {w for c in UNSAFE for w in c.held_out}
    out: list[list[str]] = [[] for _ in CONCEPTS]
    for word, (first, second), own in zip(
        data["lemmas"], cos.values.tolist(), cos.indices[:, 0].tolist(), strict=True
    ):
        clear = first > cosine and first - second > lead
        if clear and not any(h in word or word in h for h in held_out):
            out[own].append(word)
    return out
