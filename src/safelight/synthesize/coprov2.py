"""CoProV2 as its authors publish it: a table `prompt,image,category`, and one folder of pictures.

    u_IDX   the unsafe prompt IDX, and the name of its picture
    s_IDX   its minimal rewriting

Some rows stand there twice (the first counts), "Harassment" is misspelt, and every base model has
pictures of its own. Source: arXiv:2412.10493, files `data/CoProv2_train.csv`, `CoProv2-SD15`,
`CoProv2-SDXL`.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from safelight.errors import BadInput, NotFound
from safelight.flow import Prompt
from safelight.synthesize.base import Source, Topic, about_minors, csv_rows
from safelight.training.twins import Twin, Twins

log = logging.getLogger(__name__)

IMAGE = re.compile(r"([us])_(.+?)(?:\.(?:png|jpe?g|webp))?")
SPELT = {"Harrasment": "Harassment"}
SUFFIXES = ("", ".png", ".jpg", ".jpeg", ".webp")

Rows = dict[str, dict[str, str]]


def read_coprov2(table: Path | str, pictures: Path | str | None = None) -> Twins:
    """The pairs of the published table that pass the minors filter, with their pictures.

    Args:
        table: The CSV file.
        pictures: The folder of pictures; None for prompts alone.

    Raises:
        NotFound: No such file or folder, or a picture is missing.
        BadInput: A row of another form, or no pair at all.
    """
    folder = None if pictures is None else Path(pictures)
    if folder is not None and not folder.is_dir():
        raise NotFound(f"no folder of pictures at {folder}.")
    kept, dropped = _pairs(Path(table), folder)
    log.info("%s: %d pairs, %d dropped by the minors filter", table, len(kept), dropped)
    return Twins(Path(table).stem, kept, folder)


def of_coprov2(table: Path) -> Source:
    """Its prompts as topics, one per category, to be painted by another model."""
    rows, dropped = _pairs(table, None)
    groups: dict[str, list[Prompt]] = {}
    for twin in rows:
        groups.setdefault(twin.category, []).append(_prompt(twin))
    topics = tuple(Topic(name, "", prompts=tuple(some)) for name, some in groups.items())
    return Source(table.stem, Twins(table.stem, rows).sha256, topics, dropped)


def _pairs(table: Path, folder: Path | None) -> tuple[tuple[Twin, ...], int]:
    """The pairs that pass the minors filter, and how many do not."""
    unsafe, safe = _sides(table)
    alone = len(unsafe.keys() ^ safe.keys())
    if alone:
        log.warning("%s: %d rows have no other side and are left out", table.name, alone)
    found = [
        Twin(
            id=name,
            category=_category(row["category"]),
            unsafe_prompt=row["prompt"].strip(),
            safe_prompt=safe[name]["prompt"].strip(),
            unsafe=_picture(row["image"], folder),
            safe=_picture(safe[name]["image"], folder),
        )
        for name, row in unsafe.items()
        if name in safe
    ]
    if not found:
        raise BadInput(f"{table.name} holds no pair: no u_ID has a row s_ID.")
    kept = tuple(one for one in found if not about_minors(_prompt(one)))
    return kept, len(found) - len(kept)


def _prompt(one: Twin) -> Prompt:
    return Prompt(
        id=one.id, text=one.unsafe_prompt, category=one.category, safe_prompt=one.safe_prompt
    )


def _sides(table: Path) -> tuple[Rows, Rows]:
    """The unsafe and the safe rows, by what both sides of a pair are called."""
    found: dict[str, Rows] = {"u": {}, "s": {}}
    for number, row in enumerate(csv_rows(table, "prompt", "image", "category"), start=2):
        seen = IMAGE.fullmatch(Path(row["image"].strip()).name)
        if seen is None or not row["prompt"].strip():
            raise BadInput(
                f"{table.name}, line {number}: expected a prompt and an image u_ID or s_ID, not "
                f"{row['image'][:40]!r}."
            )
        found[seen[1]].setdefault(seen[2], row)
    return found["u"], found["s"]


def _category(text: str) -> str:
    return SPELT.get(text.strip(), text.strip())


def _picture(image: str, folder: Path | None) -> str:
    """A picture's file in the folder; "" where there is no folder."""
    if folder is None:
        return ""
    name = Path(image.strip()).name
    for suffix in SUFFIXES:
        if (folder / f"{name}{suffix}").is_file():
            return f"{name}{suffix}"
    raise NotFound(f"{folder} has no picture {name}; is the download complete?")
