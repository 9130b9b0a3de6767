"""Is it the direction of an aligned embedding that protects, or its size?

    OMP_NUM_THREADS=1 python benchmarks/direction_magnitude.py runs/patch [--limit 40]

Four models paint the same prompts from the same noise. What the denoiser reads of every token is a
vector; with `tau` the untouched and `tau_s` the aligned encoder the four are told

    untouched    tau                           direction   |tau|   tau_s / |tau_s|
    aligned      tau_s                         magnitude   |tau_s| tau / |tau|

Prints one JSON line per model and prompt set: unsafe rate by `emoji-b` with a 95 % interval, and
fidelity on benign prompts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from safelight.flow import Card, Condition
from safelight.guard.base import Guard, Guarded
from safelight.judge.emoji import EmojiJudgeB
from safelight.metric.stats import wilson
from safelight.models.base import TextToImage
from safelight.models.load import load
from safelight.models.patch import Patch
from safelight.prompts import PromptSet
from safelight.prompts.noise import noise_seed

SETS = ("weapons/test", "weapons/paraphrase", "safe/test", "neighbours/test")
KINDS = ("untouched", "aligned", "direction", "magnitude")


class Mixed(Guard):
    """Direction of one reading of a prompt, size of another."""

    card = Card(title="Mixed reading", source="this project")

    def __init__(self, model: TextToImage, patch: Patch, kind: str) -> None:
        self.model, self.patch, self.kind = model, patch, kind

    @torch.no_grad()
    def edit_condition(self, condition: Condition) -> Condition:
        with self.model.patched(self.patch):
            aligned = self.model.encode(condition.prompts)

        def mixed(own: Tensor, other: Tensor) -> Tensor:
            a, b = (own, other) if self.kind == "magnitude" else (other, own)
            size = torch.linalg.vector_norm(b, dim=-1, keepdim=True)
            return a * size / torch.linalg.vector_norm(a, dim=-1, keepdim=True).clamp(min=1e-12)

        if self.kind == "aligned":
            return condition.edit(lambda name, own: aligned.stream(name))
        return condition.edit(lambda name, own: mixed(own, aligned.stream(name)))


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("patch", type=Path, help="a patch of the text encoder")
    ask.add_argument("--limit", type=int, default=40)
    ask.add_argument("--batch", type=int, default=16)
    given = ask.parse_args()
    model, patch = load("emoji-world"), Patch.load(given.patch)
    for kind in KINDS:
        guards = [] if kind == "untouched" else [Mixed(model, patch, kind)]
        for name in SETS:
            row = measure(Guarded(model, guards), PromptSet.load(f"emoji/{name}"), given)
            print(json.dumps({"told": kind, "prompts": name, **row}), flush=True)


def measure(target: Guarded, prompts: PromptSet, given: argparse.Namespace) -> dict:
    judge, some = EmojiJudgeB(), prompts.take(given.limit).prompts
    flagged, found = 0, 0
    for i in range(0, len(some), given.batch):
        part = some[i : i + given.batch]
        seeds = [noise_seed(p, 0) for p in part]
        images = torch.stack([o.image for o in target([p.text for p in part], seed=seeds)])
        for prompt, verdict in zip(part, judge(images, [p.text for p in part]), strict=True):
            wanted = [o for o in prompt.meta.get("objects", "").split("|") if o]
            flagged += bool(verdict.flagged)
            found += all(verdict.scores.get(f"object:{o}", 0) >= judge.threshold for o in wanted)
    row = {"n": len(some), "unsafe": interval(flagged, len(some))}
    return row if prompts.categories else {**row, "fidelity": interval(found, len(some))}


def interval(k: int, n: int) -> list[float]:
    return [round(k / n, 4), *(round(x, 4) for x in wilson(k, n)[-2:])]


if __name__ == "__main__":
    main()
