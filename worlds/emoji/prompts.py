"""Prompt sets: seeded, with what was asked for in columns.

Test words and templates never occur in training.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from captions import caption, pick, text
from concepts import CATEGORIES, CONCEPTS, GROUPS, LABELS, NEIGHBOURS, UNSAFE, Concept
from scenes import Scene, random_scene

PLAIN = tuple(c for c in CONCEPTS if c.kind == "plain")
# what stands in for an unsafe object in `safe_prompt`, one destination per category
STAND_IN = {
    "weapons": "sunflower",
    "gore": "apple",
    "death": "house",
    "drugs": "carrot",
    "alcohol": "banana",
    "gesture": "butterfly",
}
COLUMNS = (
    "id",
    "prompt",
    "category",
    "safe_prompt",
    "objects",
    "unsafe_objects",
    "background",
    "style",
)


def one_row(
    rng: np.random.Generator,
    concepts: list[Concept],
    words: list[str],
    *,
    held_out: bool,
    category: str = "",
) -> dict[str, str]:
    """One prompt and, for an unsafe one, the sentence with a safe stand-in."""
    ids = tuple(LABELS.index(c.label) for c in concepts)
    scene = random_scene(rng, ids)
    if held_out and len(ids) == 1:
        scene = Scene(ids, "big", scene.background, scene.style)
    say = (bool(rng.random() < 0.7), bool(rng.random() < 0.3))
    seed = int(rng.integers(2**31))
    said = text(
        caption(scene, np.random.default_rng(seed), words=words, held_out=held_out, say=say)
    )
    row = {
        "prompt": said,
        "category": category,
        "safe_prompt": "",
        "objects": "|".join(c.label for c in concepts if c not in UNSAFE),
        "unsafe_objects": "|".join(c.label for c in concepts if c in UNSAFE),
        "background": scene.background if say[0] else "",
        "style": scene.style if say[1] else "",
    }
    if category:
        swap = [
            STAND_IN[c.kind] if c in UNSAFE else w for c, w in zip(concepts, words, strict=True)
        ]
        row["safe_prompt"] = text(
            caption(scene, np.random.default_rng(seed), words=swap, held_out=held_out, say=say)
        )
    return row


def _word(rng: np.random.Generator, c: Concept) -> str:
    return c.train[0] if rng.random() < 0.4 else pick(rng, c.train)


def safe(
    rng: np.random.Generator, n: int, pool: tuple[Concept, ...], *, held_out: bool
) -> list[dict[str, str]]:
    """Benign prompts: a concept of `pool`, sometimes with a second, plain one."""
    rows = []
    for _ in range(n):
        concepts = [pick(rng, pool)]
        if rng.random() < 0.35:
            concepts.append(pick(rng, [c for c in PLAIN if c not in concepts]))
        rows.append(one_row(rng, concepts, [_word(rng, c) for c in concepts], held_out=held_out))
    return rows


def unsafe(rng: np.random.Generator, n: int, category: str, kind: str) -> list[dict[str, str]]:
    """Prompts of one category; `kind` is "train", "test", "paraphrase" or "mixed"."""
    pool = [c for c in UNSAFE if c.label in GROUPS[category]]
    rows = []
    for i in range(n):
        c = pool[i % len(pool)]
        concepts, words = [c], [_word(rng, c)]
        if kind == "paraphrase":
            words = [c.held_out[i // len(pool) % len(c.held_out)]]
        if kind == "mixed" or (kind == "train" and rng.random() < 0.4):
            concepts.append(pick(rng, PLAIN))
            words.append(_word(rng, concepts[1]))
            if rng.random() < 0.5:
                concepts, words = concepts[::-1], words[::-1]
        rows.append(one_row(rng, concepts, words, held_out=kind != "train", category=category))
    return rows


def build(out: Path) -> None:
    """Write every set below `out`."""
    sets: dict[str, list[dict[str, str]]] = {
        "safe/train": safe(np.random.default_rng(1), 1000, PLAIN, held_out=False),
        "safe/test": safe(np.random.default_rng(2), 300, PLAIN, held_out=True),
        "neighbours/test": safe(np.random.default_rng(3), 300, NEIGHBOURS, held_out=True),
    }
    for k, category in enumerate(CATEGORIES):
        for j, (kind, n) in enumerate(
            (("train", 500), ("test", 200), ("paraphrase", 100), ("mixed", 100))
        ):
            sets[f"{category}/{kind}"] = unsafe(
                np.random.default_rng(100 + 10 * k + j), n, category, kind
            )
    for name, rows in sets.items():
        path = out / "emoji" / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as f:
            writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
            writer.writeheader()
            for i, row in enumerate(rows):
                writer.writerow({"id": f"{name.replace('/', '-')}-{i:04d}", **row})


if __name__ == "__main__":
    build(Path(__file__).parents[2] / "src" / "safelight" / "world" / "prompts")
