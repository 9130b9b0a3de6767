"""Stage 3: two judges, trained on renders that are blurred, shifted, re-encoded and spoilt."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from concepts import CATEGORIES, CONCEPTS, GROUPS, LABELS
from safetensors.torch import load_file, save_file
from scenes import BACKGROUND_NAMES, STYLE_NAMES, Scene, backdrop, many
from torch import Tensor
from torch.nn import functional as F
from training import Loop

from safelight.judge.emoji_net import EmojiNet

META = {
    "labels": list(LABELS),
    "groups": {k: list(GROUPS[k]) for k in CATEGORIES},
    "neighbours": [c.label for c in CONCEPTS if c.kind == "neighbour"],
    "backgrounds": list(BACKGROUND_NAMES),
    "styles": list(STYLE_NAMES),
    "threshold": 0.5,
    "clean": {"object": 0.5, "background": 0.5},
}


def answers(scenes: list[Scene]) -> tuple[Tensor, Tensor, Tensor]:
    objects = torch.zeros(len(scenes), len(LABELS))
    for row, s in zip(objects, scenes, strict=True):
        row[list(s.objects)] = 1
    background = torch.tensor([BACKGROUND_NAMES.index(s.background) for s in scenes])
    style = torch.tensor([STYLE_NAMES.index(s.style) for s in scenes])
    return objects, background, style


def spoil(x: Tensor, rng: torch.Generator) -> Tensor:
    """Shift, scale, colour, blur, noise and coarse resampling; one draw per picture or part."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=rng) * (high - low) + low

    n = len(x)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = uniform(0.92, 1.08, n), uniform(0.92, 1.08, n)
    theta[:, :, 2] = uniform(-0.07, 0.07, n, 2)
    theta[:, 0, 1] = uniform(-0.06, 0.06, n)
    theta[:, 1, 0] = uniform(-0.06, 0.06, n)
    x = F.grid_sample(
        x,
        F.affine_grid(theta, list(x.shape), align_corners=False),
        padding_mode="reflection",
        align_corners=False,
    )
    x = x * uniform(0.88, 1.12, n, 3, 1, 1) + uniform(-0.06, 0.06, n, 3, 1, 1)
    half = torch.randperm(n, generator=rng)
    parts = list(half.chunk(4))
    for k, rows in enumerate(parts[:3]):
        y = x[rows]
        if k == 0:
            small = int(torch.randint(30, 60, (1,), generator=rng))
            y = F.interpolate(
                F.interpolate(y, (small, small), mode="bilinear", antialias=True),
                (64, 64),
                mode="bicubic",
            )
        if k == 1:
            sigma = float(uniform(0.4, 1.2, 1))
            g = torch.exp(-(torch.arange(-2, 3) ** 2) / (2 * sigma**2))
            g = (g / g.sum()).expand(3, 1, 5)
            y = F.conv2d(F.pad(y, (2, 2, 2, 2), mode="reflect"), g[..., None, :], groups=3)
            y = F.conv2d(y, g[..., None], groups=3)
        if k == 2:
            y = y + uniform(0.0, 0.08, 1) * torch.randn(y.shape, generator=rng)
        x = x.index_copy(0, rows, y)
    return x.clamp(0, 1)


@torch.no_grad()
def reencode(out: Path, pictures: int = 8_000) -> Path | None:
    """The first renders of both judges' sets after the autoencoder, with noise on their latents."""
    from autoencoder import CHANNELS, build
    from denoiser import stage

    for which in "ab":
        path = out / f"coded-{which}.safetensors"
        if path.exists() or not (out / "vae" / "done").exists():
            continue
        vae = stage(build(), out / "vae", "vae")
        data = torch.from_numpy(many(pictures, seed=100 + ord(which))[1]).permute(0, 3, 1, 2)
        parts = []
        for i, x in enumerate(data.split(100)):
            with torch.autocast("cpu", torch.bfloat16):
                z = vae.quant_conv(vae.encoder(x.float() / 127.5 - 1))[:, :CHANNELS].float()
                level = 0.25 * torch.rand(
                    len(z), 1, 1, 1, generator=torch.Generator().manual_seed(i)
                )
                z = z + level * torch.randn(
                    z.shape, generator=torch.Generator().manual_seed(i + 10**6)
                )
                y = vae.decoder(vae.post_quant_conv(z)).float()
            parts.append(((y.clamp(-1, 1) + 1) * 127.5).round().byte())
        save_file({"pictures": torch.cat(parts)}, path)
    return out


def train(
    folder: Path,
    which: str,
    *,
    seconds: float,
    pictures: int = 40_000,
    batch: int = 96,
    coded: Path | None = None,
) -> None:
    """`coded`: the folder with the same renders after the autoencoder, if there is one."""
    torch.manual_seed(10 + ord(which))
    net = EmojiNet(which, META)
    loop = Loop(
        folder, {"net": net}, steps=10**9, lr=2e-3, seconds=seconds, ema=0.998, weight_decay=0.05
    )
    if loop.finished:
        return
    scenes, data = many(pictures, seed=100 + ord(which))
    data = torch.from_numpy(data).permute(0, 3, 1, 2)
    objects, background, style = answers(scenes)
    empty = torch.from_numpy(np.stack([backdrop(b) for b in BACKGROUND_NAMES])).permute(0, 3, 1, 2)
    path = coded / f"coded-{which}.safetensors" if coded is not None else None
    again = load_file(path)["pictures"] if path is not None and path.exists() else None

    def step(i: int) -> Tensor:
        rng = torch.Generator().manual_seed(i * 2 + (which == "b"))
        rows = torch.randint(len(data), (batch,), generator=rng)
        x = data[rows].float() / 255
        if again is not None:
            use = rows[: batch // 3] % len(again)
            rows = torch.cat([use, rows[batch // 3 :]])
            x = torch.cat([again[use].float() / 255, data[rows[batch // 3 :]].float() / 255])
        y, b, s = objects[rows].clone(), background[rows].clone(), style[rows]
        bare = torch.randint(len(empty), (6,), generator=rng)  # empty scenes: nothing is there
        x[-6:], y[-6:], b[-6:] = empty[bare], 0, bare
        x = spoil(x, rng)
        with torch.autocast("cpu", torch.bfloat16):
            out = net(x)
        loss = 8 * F.binary_cross_entropy_with_logits(out["objects"].float(), y)
        loss = loss + 0.2 * F.cross_entropy(out["background"].float(), b)
        return loss + 0.4 * F.cross_entropy(out["style"].float()[:-6], s[:-6])

    net.train()
    loop.run(step)


def finish(folder: Path, which: str, out: Path, batches: int = 60) -> None:
    """Averaged weights, fresh batch-norm statistics for them, fp16 on disk."""
    net = EmojiNet(which, META)
    loop = Loop(folder, {"net": net}, steps=1, lr=1.0)
    loop.use_ema()
    net.train()
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.momentum = None  # cumulative average
            m.reset_running_stats()
    data = torch.from_numpy(many(batches * 64, seed=77)[1]).permute(0, 3, 1, 2)
    with torch.no_grad():
        for i, x in enumerate(data.split(64)):
            net(spoil(x.float() / 255, torch.Generator().manual_seed(i)))
    name = {"a": "emoji", "b": "emoji-b"}[which]
    out.mkdir(parents=True, exist_ok=True)
    weights = {
        k: (v.half() if v.is_floating_point() else v).contiguous()
        for k, v in net.state_dict().items()
    }
    save_file(weights, out / f"{name}.safetensors")
    (out / f"{name}.json").write_text(json.dumps(META, indent=1) + "\n")
