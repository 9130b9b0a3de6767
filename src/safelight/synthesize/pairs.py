"""Pairs of pictures for preference training, in the manner of CoProV2 (arXiv:2412.10493).

    topics -> a writer's prompts (unsafe, safe) -> both painted by the model from one noise
           -> a judge that must flag the first and not the second -> a folder of `Twins`

With a judge, a pair that it does not agree with is painted again, both sides from another noise, up
to `tries` times, then dropped and counted; a judge that cannot tell does not agree. (DUO,
arXiv:2407.21035, filters its pairs so, but paints the safe side from the unsafe picture.)

The folder is written as the work goes on: `twins.json` before the first picture, then, batch by
batch, pictures and the rows that name them. A batch with a row missing is painted again whole, so
that a run that was killed comes out as it would have. Pictures are judged as they are stored.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from safelight.bench import settings as told
from safelight.bench.folder import writing
from safelight.bench.records import append_lines, put_image
from safelight.bench.run import png, stored
from safelight.errors import BadInput, WorkFailed
from safelight.flow import Prompt, Verdict
from safelight.judge.base import Judge
from safelight.models.base import Sampling, TextToImage
from safelight.prompts import PromptSet
from safelight.prompts.noise import noise_seed
from safelight.synthesize.base import (
    Script,
    Source,
    Topic,
    Watch,
    Writer,
    about_minors,
    by_category,
)
from safelight.synthesize.folder import (
    ANSWERS,
    DROPPED,
    ROWS,
    Made,
    agree,
    begin,
    finish,
    on_disk,
    troubles,
)
from safelight.synthesize.templates import Templates
from safelight.synthesize.together import together
from safelight.training.twins import FORMAT, Twin, as_line

NEXT = 1_000_000  # from one try's seed to the next: seeds made from ids are smaller


@torch.no_grad()
def synthesize(
    model: TextToImage,
    sources: Sequence[Source],
    out: Path | str,
    *,
    writer: Writer | None = None,
    judge: Judge | None = None,
    per_category: int = 100,
    together: int = 0,
    seed: int = 0,
    tries: int = 3,
    sampling: Sampling | None = None,
    batch: int = 16,
    watch: Watch = lambda what, done, total: None,
) -> Made:
    """Write prompts, paint both sides, judge; the same call goes on where one stopped.

    Args:
        model: The very model that is to be aligned.
        sources: What to write about, as `base.read` gives it.
        out: The folder: new, empty, or that of the call to go on with.
        writer: Of prompts; `Templates()` if None.
        judge: Who must flag the unsafe picture and not the safe one; all pairs are kept if None.
        per_category: Pairs of prompts that are written for each category.
        together: Further pairs of prompts for each category in which something unsafe of another
            one stands beside its own (`safelight.synthesize.together`).
        seed: Added to every pair's own noise.
        tries: Other noises for a pair that the judge does not agree with.
        sampling: Steps, guidance and size; the model's own if None.
        batch: Pictures painted at a time.
        watch: Told what is being done, how much of it is done, and of how much.

    Raises:
        BadInput: Wrong arguments, or `out` holds pairs with other settings.
        GuardFailed: The judge broke; what was finished before is on disk.
        WorkFailed: Not one pair could be made, or a writer or the disk failed; what was finished
            before is on disk.
    """
    out, writer = Path(out), writer or Templates()
    _check(per_category, together, tries, batch)
    topics = by_category(sources)
    if judge is not None:
        judge.require()
    studio = _Studio(model, judge, sampling or model.sampling, seed, tries if judge else 0)
    about = {
        "format": FORMAT,
        "model": told.of_model(model, model.hashes()),
        "writer": writer.about(),
        "judge": None if judge is None else told.of_judge(judge),
        "sampling": told.of_sampling(studio.sampling),
        "per_category": per_category,
        **({"together": together} if together else {}),
        "seed": seed,
        "tries": tries,
        "batch": batch,
        "sources": [{"name": one.name, "sha256": one.sha256} for one in sources],
        "versions": told.versions(),
    }
    with writing(out):
        begin(out, about)
    scripts = _scripts(writer, topics, per_category, out / ANSWERS, watch)
    rows, minors = _cast(scripts, together, seed)
    minors += sum(source.minors for source in sources)
    about |= {"prompts": _prompts(rows, minors), "categories": _written(scripts, rows)}
    with writing(out):
        agree(out, about)
    if not rows:
        raise WorkFailed(f"no pair of prompts could be written. {troubles(about)}")
    _paint(rows, studio, out, max(1, batch // 2), watch)
    with writing(out):
        return finish(out, about)


def _check(per_category: int, together: int, tries: int, batch: int) -> None:
    for name, value, least in (
        ("per_category", per_category, 1),
        ("together", together, 0),
        ("tries", tries, 0),
        ("batch", batch, 1),
    ):
        if value < least:
            raise BadInput(f"{name} must be at least {least}, not {value}.")


# Prompts


def _scripts(
    writer: Writer, topics: Mapping[str, Sequence[Topic]], n: int, store: Path, watch: Watch
) -> dict[str, Script]:
    """What is written for each category."""
    scripts: dict[str, Script] = {}
    total = n * len(topics)

    def tell(so_far: int) -> None:
        watch("prompts", n * len(scripts) + so_far, total)

    for category, some in topics.items():
        tell(0)
        scripts[category] = writer.write(some, n, store=store, watch=tell)
    tell(0)
    return scripts


def _cast(scripts: Mapping[str, Script], n: int, seed: int) -> tuple[list[Prompt], int]:
    """All rows that pass the minors filter, each with an id of its own, and how many do not.

    Args:
        n: Further rows for each category, with two kinds of harm.
        seed: Of which stand together.
    """
    rows = [row for script in scripts.values() for row in script.rows]
    rows += together(rows, n, torch.Generator().manual_seed(seed))
    kept = [row for row in rows if not about_minors(row)]
    seen: Counter[str] = Counter()
    named = []
    for row in kept:
        seen[row.id] += 1
        named.append(row if seen[row.id] == 1 else replace(row, id=f"{row.id}-{seen[row.id]}"))
    return named, len(rows) - len(kept)


def _prompts(rows: Sequence[Prompt], minors: int) -> dict[str, Any]:
    return {"n": len(rows), "sha256": PromptSet("rows", tuple(rows)).sha256, "minors": minors}


def _written(scripts: Mapping[str, Script], rows: Sequence[Prompt]) -> dict[str, dict[str, Any]]:
    """What was written for each category."""
    n = Counter(row.category for row in rows)
    return {
        name: {
            "written": n[name],
            "writer": dict(script.counts),
            "skipped": dict(script.skipped),
        }
        for name, script in scripts.items()
    }


# Pictures


@dataclass(frozen=True)
class _Take:
    """A pair that has been painted, and agreed with or not.

    Args:
        pixels: The unsafe and the safe picture.
        seed: Of their noise.
        fault: Why the judge does not agree; "" if it does.
        scores: The judge's, of either side.
    """

    pixels: UInt8[Tensor, "2 3 height width"]
    seed: int
    fault: str = ""
    scores: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Studio:
    """Who paints and who judges."""

    model: TextToImage
    judge: Judge | None
    sampling: Sampling
    seed: int
    tries: int

    def takes(self, rows: Sequence[Prompt]) -> list[_Take]:
        """The first take of every row that the judge agrees with, else the last."""
        found: dict[str, _Take] = {}
        left = list(rows)
        for number in range(1 + self.tries):
            found |= zip((row.id for row in left), self._all(left, number), strict=True)
            left = [row for row in left if found[row.id].fault]
            if not left:
                break
        return [found[row.id] for row in rows]

    def _all(self, rows: Sequence[Prompt], number: int) -> list[_Take]:
        """One take of every row, both sides from the same noise."""
        texts = [row.text for row in rows] + [row.safe_prompt or "" for row in rows]
        seeds = [noise_seed(row, self.seed) + number * NEXT for row in rows]
        outcomes = self.model(
            texts,
            seed=2 * seeds,
            steps=self.sampling.steps,
            guidance=self.sampling.guidance,
            size=self.sampling.size,
            batch=len(texts),
        )
        images = torch.stack([one.image for one in outcomes if one.image is not None])
        if not torch.isfinite(images).all():
            raise WorkFailed(f"{self.model.name} painted NaN; load it in another precision.")
        pixels = stored(images)
        pairs = list(torch.stack(pixels.chunk(2), 1).unbind())
        if self.judge is None:
            return [_Take(*pair) for pair in zip(pairs, seeds, strict=True)]
        said = self.judge(pixels.to(self.model.device).float() / 255, texts)
        sides = zip(said[: len(rows)], said[len(rows) :], strict=True)
        return [
            _Take(pair, seed, fault(*verdicts), _scores(*verdicts))
            for pair, seed, verdicts in zip(pairs, seeds, sides, strict=True)
        ]


def fault(unsafe: Verdict, safe: Verdict) -> str:
    """Why a pair cannot be learnt from, as a key of `folder.FAULTS`; "" if it can."""
    if unsafe.flagged is None or safe.flagged is None:
        return "unknown"
    if not unsafe.flagged:
        return "unsafe missed"
    return "safe flagged" if safe.flagged else ""


def _scores(unsafe: Verdict, safe: Verdict) -> dict[str, str]:
    return {"unsafe_score": f"{unsafe.score:.4f}", "safe_score": f"{safe.score:.4f}"}


def _paint(rows: Sequence[Prompt], studio: _Studio, out: Path, size: int, watch: Watch) -> None:
    """Every batch that is not on disk yet."""
    there, whole = on_disk(out)
    watch("pairs", 0, len(rows))
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        if any(row.id not in whole for row in part):
            takes = list(zip(part, studio.takes(part), strict=True))
            with writing(out):
                _store(out, takes, there)
        watch("pairs", start + len(part), len(rows))


def _store(out: Path, takes: Sequence[tuple[Prompt, _Take]], there: frozenset[str]) -> None:
    """Pictures first, then the rows that name them; rows that are there already stay."""
    twins = [_twin(row, take, out) for row, take in takes if not take.fault]
    new = [as_line(twin) for twin in twins if twin.id not in there]
    bad = [
        json.dumps(_dropped(row, take), ensure_ascii=False)
        for row, take in takes
        if take.fault and row.id not in there
    ]
    for name, lines in ((DROPPED, bad), (ROWS, new)):
        if lines:
            append_lines(out / name, lines)


def _twin(row: Prompt, take: _Take, out: Path) -> Twin:
    unsafe, safe = (put_image(out, png(pixels)) for pixels in take.pixels)
    return Twin(
        id=row.id,
        category=row.category,
        unsafe_prompt=row.text,
        safe_prompt=row.safe_prompt or "",
        unsafe=unsafe,
        safe=safe,
        seed=take.seed,
        meta={**row.meta, **take.scores},
    )


def _dropped(row: Prompt, take: _Take) -> dict[str, Any]:
    return {
        "id": row.id,
        "category": row.category,
        "unsafe_prompt": row.text,
        "safe_prompt": row.safe_prompt,
        "why": take.fault,
        **take.scores,
    }
