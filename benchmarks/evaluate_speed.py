"""How fast `evaluate` is against the bare denoiser and decoder: pictures per second, as a ratio.

    python benchmarks/evaluate_speed.py emoji-world --judge emoji --judge emoji-b

Both sides paint the same prompts from the same noise with the same batch, steps and guidance, in
turns so that a busy machine disturbs both alike. The bare side encodes nothing and keeps nothing;
the other side is the whole call, from hashing the weights to the last figure. `cpu_ratio` compares
CPU seconds instead of the clock: it counts as a cost what a second core does at the same time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from safelight.bench.run import evaluate, noise_seed
from safelight.models.base import Sampling, TextToImage
from safelight.models.load import load
from safelight.names import find
from safelight.prompts import PromptSet


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("model", help="a built-in name, a diffusers folder or a hub id")
    ask.add_argument("--judge", action="append", help="repeatable [emoji-b]")
    ask.add_argument("--prompts", help="a prompt set or file [made up here]")
    ask.add_argument("--pictures", type=int, default=64)
    ask.add_argument("--batch", type=int, default=16)
    ask.add_argument("--steps", type=int)
    ask.add_argument("--repeats", type=int, default=3)
    ask.add_argument("--threads", type=int, help="torch threads [torch's own]")
    given = ask.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)

    model = load(given.model)
    judges = [find("judge", name)() for name in given.judge or ["emoji-b"]]
    sampling = replace(model.sampling, steps=given.steps or model.sampling.steps)
    prompts = PromptSet.load(given.prompts) if given.prompts else made_up(given.pictures)
    prompts = prompts.take(given.pictures)

    bare(model, prompts.take(given.batch), sampling, given.batch)  # warm up
    for judge in judges:
        judge(torch.rand(given.batch, 3, *sampling.size), ["a cat"] * given.batch)
    rounds, work = [], []
    for _ in range(given.repeats):
        before = time.process_time()
        alone = bare(model, prompts, sampling, given.batch)
        between = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            evaluate(
                model,
                [prompts],
                judges=judges,
                out=Path(folder) / "run",
                sampling=sampling,
                batch=given.batch,
                progress=False,
            )
            rounds.append((alone, len(prompts) / (time.perf_counter() - start)))
            work.append((between - before) / (time.process_time() - between))
    ratios = [whole / alone for alone, whole in rounds]
    print(
        json.dumps(
            {
                "model": model.name,
                "device": str(model.device),
                "threads": torch.get_num_threads(),
                "pictures": len(prompts),
                "batch": given.batch,
                "steps": sampling.steps,
                "judges": [judge.name for judge in judges],
                "bare_per_second": round(statistics.median(a for a, _ in rounds), 3),
                "evaluate_per_second": round(statistics.median(b for _, b in rounds), 3),
                "ratio": round(statistics.median(ratios), 3),
                "ratios": [round(ratio, 3) for ratio in ratios],
                "cpu_ratio": round(statistics.median(work), 3),
            }
        )
    )


def made_up(n: int) -> PromptSet:
    return PromptSet.of([f"a cat and a bomb, take {i}" for i in range(n)], "made up")


@torch.no_grad()
def bare(model: TextToImage, prompts: PromptSet, sampling: Sampling, batch: int) -> float:
    """Pictures per second of denoiser and decoder alone; the text is encoded beforehand."""
    parts = [prompts.prompts[i : i + batch] for i in range(0, len(prompts), batch)]
    conditions = [model.encode([prompt.text for prompt in part]) for part in parts]
    negative = model.empty(1) if model.guides(sampling.guidance) else None
    start = time.perf_counter()
    for part, condition in zip(parts, conditions, strict=True):
        z = model.sample(
            condition,
            negative=negative,
            seed=[noise_seed(prompt, 0) for prompt in part],
            steps=sampling.steps,
            guidance=sampling.guidance,
            size=sampling.size,
        )
        model.decode(z).cpu()
    return len(prompts) / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
