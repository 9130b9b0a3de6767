"""What a sanitizer costs at use: milliseconds a prompt, and its share of a picture.

    OMP_NUM_THREADS=1 python benchmarks/sanitizer_overhead.py

The networks are untrained: what they have learnt does not change what they cost. Two figures, each
the median of several rounds in which both sides take turns, so that a busy machine disturbs both:

- Emoji World, batches of pictures: `edited` of a guarded model against `edited` of one without
  guards, as a share of painting the same batch in 20 steps;
- tiny SD1 (77 tokens, 32 wide), one prompt: the same difference in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from safelight.guard.base import Guarded
from safelight.guard.sanitizer import Sanitizer
from safelight.guard.trained import Fitted
from safelight.models.base import TextToImage
from safelight.models.load import load

PROMPTS = ["a small knife beside a car on the beach", "a cat", "two frogs and a pistol at night"]


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--batch", type=int, action="append", help="repeatable [1 and 16]")
    ask.add_argument("--rounds", type=int, default=7)
    ask.add_argument("--steps", type=int, default=20)
    given = ask.parse_args()
    world, tiny = load("emoji-world"), load("tiny-sd1")
    for batch in given.batch or [1, 16]:
        emit(world, batch, given.rounds, given.steps)
    emit(tiny, 1, 10 * given.rounds, None)


@torch.no_grad()
def emit(model: TextToImage, batch: int, rounds: int, steps: int | None) -> None:
    """One line of JSON for one model and batch."""
    bare, guarded = Guarded(model), Guarded(model, [untrained(model)])
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(batch)]
    condition = model.encode(prompts)
    for target in (bare, guarded):  # warm up
        target.edited(condition)
    added, painted = [], []
    for _ in range(rounds):
        repeats = 20
        added.append(
            (seconds(lambda: guarded.edited(condition), repeats)
             - seconds(lambda: bare.edited(condition), repeats)) / batch
        )  # fmt: skip
        if steps:
            painted.append(
                seconds(lambda: bare.paint(condition, list(range(batch)), steps=steps)) / batch
            )
    row = {
        "model": model.name,
        "batch": batch,
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in guarded.guards[0].network_.parameters()),
        "added_ms_per_prompt": round(1000 * statistics.median(added), 3),
        "least": round(1000 * min(added), 3),
        "most": round(1000 * max(added), 3),
    }
    if steps:
        share = [a / b for a, b in zip(added, painted, strict=True)]
        row |= {
            "steps": steps,
            "ms_per_picture": round(1000 * statistics.median(painted), 1),
            "share_of_a_picture": round(statistics.median(share), 5),
            "shares": [round(x, 5) for x in share],
        }
    print(json.dumps(row), flush=True)


def seconds(work: Callable[[], object], repeats: int = 1) -> float:
    """Mean seconds of a call."""
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - start) / repeats


def untrained(model: TextToImage) -> Sanitizer:
    """A sanitizer with random weights that is ready for a model."""
    guard = Sanitizer()
    weights = guard.network(model).state_dict()
    weights = {name: torch.randn_like(value) / 10 for name, value in weights.items()}
    base = {name: model.hashes()[name] for name in guard.reads(model)}
    return guard._with(Fitted(weights=weights, family=model.family, base=base, info={}))


if __name__ == "__main__":
    main()
