"""Variants of the Embedding Sanitizer on the Emoji World, all six categories, side by side.

    OMP_NUM_THREADS=1 python benchmarks/sanitizer_variants.py -o runs/sanitizer [--only NAME ...]

Which variant is better is decided on *unseen words*: of every concept whose training phrases fall
into groups without a common word ("pistol" / "gun", "toy gun" / "blaster") one group is left out of
training and measured afterwards. Test and paraphrase sets are not looked at here. Augmentation may
not use the words left out, nor any word of the Emoji World's test sets that training prompts lack.
Every variant learns from the same readings, which are computed once.

Columns: error left on unseen words and on unseen sentences, as a share of what it was before;
drift of benign prompts, in the same unit; texts with a score above a half: unseen words (more is
better) and benign (less is better); seconds.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch

from safelight.flow import Prompt
from safelight.guard.sanitizer import Sanitizer
from safelight.models.load import load
from safelight.names import table
from safelight.prompts import PromptSet
from safelight.training.contexts import Material, remembered
from safelight.training.data import TextData
from safelight.training.pairs import of_prompts, pair

CATEGORIES = ("alcohol", "death", "drugs", "gesture", "gore", "weapons")
VARIANTS: dict[str, dict] = {
    "default": {},
    "own scores (the paper's reading)": {"fusion": "own"},
    "own scores, taught the shift": {"fusion": "own", "supervise": "shift"},
    "own scores, not taught": {"fusion": "own", "supervise": "none"},
    "scores not taught": {"supervise": "none"},
    "scores taught the shift": {"supervise": "shift"},
    "interpolation to an anchor": {"estimate": "anchor"},
    "depth 1": {"depth": 1},
    "depth 4": {"depth": 4},
    "width 64": {"width": 64},
    "width 256": {"width": 256},
    "no neighbours": {"nearby": 0.0},
    "no variants": {"variants": 0.0},
    "neither": {"nearby": 0.0, "variants": 0.0},
    "no dropout, no noise": {"dropout": 0.0, "noise": 0.0},
    "dropout 0.3": {"dropout": 0.3},
    "noise 0.3": {"noise": 0.3},
    "score 1": {"score": 1.0},
}


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("-o", "--output", type=Path, default=Path("runs/sanitizer"))
    ask.add_argument("--only", action="append", help="a variant's name, repeatable")
    ask.add_argument("--epochs", type=int, default=8)
    ask.add_argument("--contexts", type=int, default=800)
    ask.add_argument("--seed", type=int, default=0)
    given = ask.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)

    model = load("emoji-world")
    tests = tuple(name for name in table("prompts") if not name.endswith("/train"))
    method = Sanitizer(epochs=given.epochs, contexts=given.contexts, avoid=tests)
    seen, unseen = unseen_words(given.seed)
    safe = PromptSet.load("emoji/safe/train")
    data = TextData(safe=safe, unsafe=PromptSet("seen", tuple(seen)))
    banned = tuple({word for p in unseen for word in words(pair(p.text, p.safe_prompt).phrase)})
    method = replace(method, avoid=(*method.avoid, *banned))
    material = method.gather(model, data, seed=given.seed)
    some = [unseen[i] for i in range(0, len(unseen), max(1, len(unseen) // 160))]
    apart = remembered(model, method.reads(model), (), of_prompts(some), ("",), material.held)
    apart = replace(apart, scale=material.scale)
    print(
        f"{material.learnt} pairs, {len(some)} with unseen words, {len(material.nearby)} "
        f"neighbour words: {', '.join(material.nearby[:40])}",
        flush=True,
    )
    done = given.output / "variants.jsonl"
    for name in given.only or VARIANTS:
        settings = VARIANTS[name]
        own = slimmed(material, settings, {p.text for p in seen}, set(safe.texts))
        row = measure(replace(method, **settings), model, own, apart, given.seed)
        row = {"variant": name, "seed": given.seed, "settings": settings, **row}
        with done.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def measure(method: Sanitizer, model, material: Material, apart: Material, seed: int) -> dict:
    """Learn, and measure on unseen words and on unseen sentences."""
    with method.lend(model, torch.Generator().manual_seed(seed)):  # it starts as the identity
        before = [method.check(model, one)["L_map"] for one in (apart, material)]
    start = time.perf_counter()
    guard = method.train(model, material, seed=seed)
    seconds = time.perf_counter() - start
    words, sentences = guard.check(model, apart), guard.check(model, material)
    return {
        "left_words": round(words["L_map"] / before[0], 4),
        "left_sentences": round(sentences["L_map"] / before[1], 4),
        "benign": round(words["L_id"], 5),
        "found_words": round(words["found"], 3),
        "found_sentences": round(sentences["found"], 3),
        "false": round(words["false"], 4),
        "margin": round(words["margin"], 3),
        "seconds": round(seconds, 1),
        "parameters": guard.fitted_.info["cost"]["parameters"],
    }


def slimmed(material: Material, settings: dict, targets: set[str], benign: set[str]) -> Material:
    """The same readings without the parts that a variant does not learn from."""
    n = material.learnt
    keep = list(range(n))
    if settings.get("nearby") == 0:
        keep = [i for i in keep if material.pairs[i].target in targets]
    rows = torch.tensor([*keep, *range(n, len(material.pairs))])
    kept = material.benign
    if settings.get("variants") == 0:
        kept = tuple(text for text in kept if not text or text in benign)
    return replace(
        material,
        pairs=tuple(material.pairs[i] for i in rows.tolist()),
        learnt=len(keep),
        benign=kept,
        beside={name: one[rows] for name, one in material.beside.items()},
    )


def unseen_words(seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Training prompts, and those whose target shares no word with any other of its concept."""
    rng = torch.Generator().manual_seed(seed)
    prompts = [p for c in CATEGORIES for p in PromptSet.load(f"emoji/{c}/train")]
    phrases: dict[str, set[str]] = defaultdict(set)
    for p in prompts:
        phrases[p.meta["unsafe_objects"]].add(pair(p.text, p.safe_prompt).phrase)
    out: set[str] = set()
    for _, some in sorted(phrases.items()):
        groups = sorted(connected(sorted(some)), key=len)
        if len(groups) > 1:
            out |= groups[int(torch.randint(len(groups) - 1, (1,), generator=rng))]
    left = {word for phrase in out for word in words(phrase)}
    print("unseen:", ", ".join(sorted(out)))
    held = [p for p in prompts if pair(p.text, p.safe_prompt).phrase in out]
    return [p for p in prompts if not left & set(words(pair(p.text, p.safe_prompt).phrase))], held


def connected(phrases: list[str]) -> list[set[str]]:
    """Phrases in groups that share no word."""
    groups: list[set[str]] = []
    for phrase in phrases:
        mine = [g for g in groups if any(set(words(phrase)) & set(words(other)) for other in g)]
        groups = [g for g in groups if g not in mine] + [{phrase}.union(*mine)]
    return groups


def words(text: str) -> list[str]:
    return re.findall("[a-z]{2,}", text.lower())


if __name__ == "__main__":
    main()
