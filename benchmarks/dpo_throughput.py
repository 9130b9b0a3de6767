"""DPO's pairs per second with everything constant computed once, against encoding at every step.

    python benchmarks/dpo_throughput.py
    python benchmarks/dpo_throughput.py --model tiny-sdxl --batch 4 --steps 5

All sides take the same optimiser steps on the same pairs. "encoding" does at every step what a data
loader does: read two PNG files per pair, decode them, bring them to the model's size, run the
autoencoder and the text encoders. "cached" has latents and captions, "draws" what the reference
says as well (`draws` of `dpo`, where a row's times and noises come again). Making these is not
counted; they pay where a row comes up more often than it has draws. The sides take turns, so that a
busy machine disturbs all alike; ratios are to "encoding", `cpu_ratio` in CPU seconds instead of the
clock. The pictures are noise: it takes as long.
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

from safelight.align.dpo import DPO, Batch
from safelight.models.base import TextToImage
from safelight.models.load import load
from safelight.training.captions import Captions
from safelight.training.twins import Twin, Twins


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--model", default="emoji-world")
    ask.add_argument("--batch", type=int, default=16, help="pairs per step [16]")
    ask.add_argument("--steps", type=int, default=4, help="steps per round [4]")
    ask.add_argument("--repeats", type=int, default=5, help="rounds of each side [5]")
    ask.add_argument("--threads", type=int, default=1, help="torch threads [1]")
    ask.add_argument("--autocast", action="store_true", help="compute in bfloat16, all sides")
    ask.add_argument("--channels-last", action="store_true", help="memory layout, all sides")
    given = ask.parse_args()
    torch.set_num_threads(given.threads)

    model = load(given.model)
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
    found: dict[str, list[tuple[float, float]]] = {"draws": [], "cached": [], "encoding": []}
    with method.lend(model, rng) as loan:
        adam = method.optimiser(list(loan.parameters.values()), method.rate(model))

        def steps(prepared: Callable[[Batch], Batch]) -> tuple[float, float]:
            clock, work = time.perf_counter(), time.process_time()
            for batch in batches:
                adam.zero_grad(set_to_none=True)
                method.loss(model, prepared(batch), rng).total.backward()
                adam.step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return time.perf_counter() - clock, time.process_time() - work

        ways: dict[str, Callable[[Batch], Batch]] = {
            "draws": lambda batch: batch,
            "cached": lambda batch: replace(batch, e_ref=None),
            "encoding": lambda batch: encoded(batch, model, twins),
        }
        for way in ways.values():  # warm up
            steps(way)
        for _ in range(repeats):
            for side, way in ways.items():
                found[side].append(steps(way))
    return found


@torch.no_grad()
def encoded(batch: Batch, model: TextToImage, twins: Twins) -> Batch:
    """The batch with latents and captions made anew, from files."""
    rows = [twins.rows[i % len(twins)] for i in range(len(batch))]
    sides = [twins.images(rows, side, model.default_size) for side in ("safe", "unsafe")]
    z = model.encode_images(torch.cat(sides)).unflatten(0, (2, -1))
    told = Captions.of(model, batch.captions, len(batch))
    return replace(batch, z=z, told=told, e_ref=None)


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
