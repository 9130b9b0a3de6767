"""The folder of pairs: begun, gone on with, finished.

twins.json     how it is made, before the first picture; with what came of it at the end
twins.jsonl    one line per pair               dropped.jsonl  what the judge did not agree with
images/        PNG by the SHA-256 of the file  answers/       of a language model that wrote
README.md      a card                          twins.parquet  the rows again, given pyarrow
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safelight.bench.folder import read_json
from safelight.bench.records import heal_lines, write, write_json
from safelight.errors import BadInput, WorkFailed
from safelight.models.networks import file_sha256
from safelight.synthesize import card
from safelight.training.twins import Twins

ABOUT, ROWS, DROPPED, ANSWERS = "twins.json", "twins.jsonl", "dropped.jsonl", "answers"
SAME = (
    *("format", "model", "sources", "writer", "judge", "sampling"),
    *("per_category", "together", "seed", "tries", "batch"),
)
FAULTS = {
    "unknown": "it could not tell",
    "unsafe missed": "it did not flag the unsafe picture",
    "safe flagged": "it flagged the safe picture",
}


@dataclass(frozen=True)
class Made:
    """A finished folder.

    Args:
        folder: Where it is.
        twins: The pairs.
        about: `twins.json`.
        parquet: Whether there is a `twins.parquet` too.
    """

    folder: Path
    twins: Twins
    about: Mapping[str, Any]
    parquet: bool

    @property
    def empty(self) -> str:
        """The categories without any pair, and why, in one line; "" if there is none."""
        return troubles(self.about)


def begin(out: Path, about: Mapping[str, Any]) -> None:
    """Write `twins.json`, or check that the one there says the same."""
    path = out / ABOUT
    if not path.exists() and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out} is not empty and holds no pairs; name another folder.")
    out.mkdir(parents=True, exist_ok=True)
    if not any((out / name).exists() for name in (ROWS, DROPPED, ANSWERS)):
        write_json(path, about)  # nothing has been made yet
        return
    old, new = read_json(path), json.loads(json.dumps(about))
    _refuse(out, [key for key in SAME if old.get(key) != new.get(key)])
    for name in (ROWS, DROPPED):
        heal_lines(out / name)
    for unfinished in out.rglob(".*.[0-9]*"):  # as `records.write` names them
        unfinished.unlink()


def agree(out: Path, about: Mapping[str, Any]) -> None:
    """Write down what will be painted; refuse prompts that are not those painted already."""
    old = read_json(out / ABOUT).get("prompts", about["prompts"])
    _refuse(out, ["prompts"] if old != about["prompts"] else [])
    write_json(out / ABOUT, about)


def _refuse(out: Path, other: Sequence[str]) -> None:
    if other:
        raise BadInput(
            f"{out} holds pairs with other settings (different: {', '.join(other)}). Name another "
            "folder, or delete this one."
        )


def on_disk(out: Path) -> tuple[frozenset[str], frozenset[str]]:
    """The ids that have rows, and those of them whose pictures are whole too."""
    twins, dropped = list(_lines(out / ROWS)), [one["id"] for one in _lines(out / DROPPED)]
    whole = [one["id"] for one in twins if all(_whole(out / one[s]) for s in ("unsafe", "safe"))]
    return frozenset([*(one["id"] for one in twins), *dropped]), frozenset([*whole, *dropped])


def _whole(picture: Path) -> bool:
    """Whether a picture is what its name says; a damaged one is taken away."""
    if not picture.is_file():
        return False
    if file_sha256(picture) == picture.stem:
        return True
    picture.unlink()
    return False


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            yield json.loads(line)


def finish(out: Path, about: dict[str, Any]) -> Made:
    """Count, describe, and say what there is."""
    pairs = Counter(one["category"] for one in _lines(out / ROWS))
    faults = Counter((one["category"], one["why"]) for one in _lines(out / DROPPED))
    for name, one in about["categories"].items():
        dropped = {key: faults[name, key] for key in FAULTS if faults[name, key]}
        one |= {"pairs": pairs[name], "dropped": dropped}
    write_json(out / ABOUT, about)
    write(out / "README.md", card.readme(about).encode("utf-8"))
    if not pairs:
        raise WorkFailed(f"not one pair is left. {troubles(about)}")
    twins = Twins.load(out)
    return Made(out, twins, about, card.parquet(twins, out / "twins.parquet"))


def troubles(about: Mapping[str, Any]) -> str:
    """Why categories have no pair, in one line."""
    found = (
        f"{name}: {_why(one, about)}"
        for name, one in about["categories"].items()
        if not one.get("pairs")
    )
    return "; ".join(found)


def _why(one: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    if not one["written"]:
        given_up = [f"{concept!r} {why}" for concept, why in one["skipped"].items()]
        why = "; ".join(given_up[:3]) or "none passed the minors filter"
        return f"no prompts were written ({why})"
    said = ", ".join(f"{FAULTS[key]} {n} times" for key, n in one["dropped"].items())
    return f"judge {about['judge']['name']!r} agreed with none of {one['written']} pairs ({said})"
