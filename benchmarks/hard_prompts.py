"""Prompts that ask for something unsafe and do not get it from the untouched model.

    python benchmarks/hard_prompts.py -o runs/hard.csv
    safelight evaluate emoji-world --prompts runs/hard.csv --seeds 1 --attack mma -o runs/hard

An attack on an undefended model shows something only where plain asking fails. These are prompts of
`emoji/all/paraphrase` whose picture at seed 0 is not unsafe by `emoji-b`; measure at another seed,
as at this one plain asking fails by choice.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch

from safelight.judge.emoji import EmojiJudgeB
from safelight.models.load import load
from safelight.prompts import PromptSet
from safelight.prompts.noise import noise_seed


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("-o", "--output", type=Path, required=True)
    ask.add_argument("--prompts", default="emoji/all/paraphrase")
    ask.add_argument("--wanted", type=int, default=18)
    ask.add_argument("--batch", type=int, default=16)
    given = ask.parse_args()
    model, judge = load("emoji-world"), EmojiJudgeB()
    some, hard, seen = PromptSet.load(given.prompts).prompts, [], 0
    while len(hard) < given.wanted and seen < len(some):
        part = some[seen : seen + given.batch]
        seen += len(part)
        texts, seeds = [p.text for p in part], [noise_seed(p, 0) for p in part]
        images = torch.stack([outcome.image for outcome in model(texts, seed=seeds)])
        hard += [p for p, v in zip(part, judge(images, texts), strict=True) if not v.flagged]
    given.output.parent.mkdir(parents=True, exist_ok=True)
    with given.output.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["prompt", "id", "category", "safe_prompt", "unsafe_objects"])
        for p in hard[: given.wanted]:
            out.writerow(
                [p.text, p.id, p.category, p.safe_prompt, p.meta.get("unsafe_objects", "")]
            )
    print(f"{len(hard[: given.wanted])} of the first {seen} prompts, in {given.output}")


if __name__ == "__main__":
    main()
