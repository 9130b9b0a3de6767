"""What batching gives an attack: attacked prompts per second at batch 16 against batch 1.

    python benchmarks/attack_batching.py mma p4d
    python benchmarks/attack_batching.py mma:candidates=8 --threads 1

Both sides search the same prompts with the same settings, so with the same budget per prompt, in
turns so that a busy machine disturbs both alike; `spent` says what each side really used. No search
may stop early: there is no judge, or nothing counts as success. `cpu_ratio` compares CPU seconds
instead of the clock. Settings after a colon replace those below.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from safelight.attack.base import Attack, Target
from safelight.cli.attacks import attacks
from safelight.guard.base import Guarded
from safelight.guard.screen import Screen
from safelight.judge.base import Judge
from safelight.models.base import TextToImage
from safelight.models.load import load
from safelight.names import find
from safelight.prompts import PromptSet

# Seconds instead of hours; the proportions of the steps are those of the real searches.
CHEAP = {
    "ring_a_bell": "population=40,generations=5,most=20",
    "mma": "slots=12,candidates=48,steps=4,restarts=1",
    "sneaky_prompt": "delta=2,budget.queries=4",  # no reward is that high
    "p4d": "n=8,steps=8,every=4",
    "unlearn_diff_atk": "times=2,iterations=4",
    "cce": "count=8,steps=4",  # one vector for the whole batch
    "latent_inversion": "steps=1",
}


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("attack", nargs="*", help="NAME or NAME:key=value,... [all of the table]")
    ask.add_argument("--model", default="emoji-world")
    ask.add_argument("--prompts", default="emoji/weapons/test")
    ask.add_argument("--batch", type=int, default=16, help="prompts searched for together [16]")
    ask.add_argument("--alone", type=int, default=4, help="prompts of the side at batch 1 [4]")
    ask.add_argument("--steps", type=int, default=4, help="denoiser steps of asked pictures [4]")
    ask.add_argument("--repeats", type=int, default=3)
    ask.add_argument("--threads", type=int, default=1, help="torch threads [1]")
    given = ask.parse_args()
    torch.set_num_threads(given.threads)

    model = load(given.model)
    prompts = PromptSet.load(given.prompts).take(given.batch)
    sampling = {"steps": given.steps}
    for label, attack in attacks([cheap(spec) for spec in given.attack or CHEAP]).items():
        one = Case(attack, *scene(label.partition(":")[0], model), sampling)
        one(prompts.take(1), 1)  # warm up
        rounds = [
            (one(prompts.take(given.alone), 1), one(prompts, given.batch))
            for _ in range(given.repeats)
        ]
        print(
            json.dumps(
                {
                    "attack": label,
                    "model": model.name,
                    "device": str(model.device),
                    "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                    "threads": torch.get_num_threads(),
                    "batch": given.batch,
                    "alone_per_second": middle(a["per_second"] for a, _ in rounds),
                    "batched_per_second": middle(b["per_second"] for _, b in rounds),
                    "ratio": middle(b["per_second"] / a["per_second"] for a, b in rounds),
                    "ratios": [round(b["per_second"] / a["per_second"], 2) for a, b in rounds],
                    "cpu_ratio": middle(a["cpu_each"] / b["cpu_each"] for a, b in rounds),
                    "spent": {"alone": rounds[0][0]["spent"], "batched": rounds[0][1]["spent"]},
                }
            ),
            flush=True,
        )


@dataclass(frozen=True)
class Case:
    """An attack on a target, timed."""

    attack: Attack
    target: Target
    judge: Judge | None
    sampling: dict[str, Any]

    def __call__(self, prompts: PromptSet, batch: int) -> dict[str, Any]:
        """Prompts per second, CPU seconds per prompt, and the mean of what was spent."""
        clock, work = time.perf_counter(), time.process_time()
        found = self.attack(
            prompts, self.target, batch=batch, judge=self.judge, sampling=self.sampling
        )
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        clock, work = time.perf_counter() - clock, time.process_time() - work
        spent = {
            key: round(sum(float(prompt.meta[key]) for prompt in found) / len(found), 2)
            for key in ("queries", "steps")
        }
        return {
            "per_second": len(prompts) / clock,
            "cpu_each": work / len(prompts),
            "spent": spent,
        }


def scene(name: str, model: TextToImage) -> tuple[Target, Judge | None]:
    """What is attacked, and the attacker's judge: a filter for the attack on filters."""
    if name == "sneaky_prompt":
        return Guarded(model, [Screen(find("judge", "emoji-b")())]), find("judge", "emoji")()
    return Guarded(model), None


def cheap(spec: str) -> str:
    """An attack's settings here, with those that were given in their place."""
    name, _, own = spec.partition(":")
    keys = {pair.partition("=")[0] for pair in own.split(",")}
    kept = [pair for pair in CHEAP.get(name, "").split(",") if pair.partition("=")[0] not in keys]
    pairs = ",".join(pair for pair in (*kept, own) if pair)
    return f"{name}:{pairs}" if pairs else name


def middle(values: Any) -> float:
    return round(statistics.median(values), 3)


if __name__ == "__main__":
    main()
