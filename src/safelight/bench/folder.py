"""The run folder: read, begun, gone on with, or given another run's base pictures.

A folder holds one run. A second call may go on in it only if it asks for the same; what it must
agree on is `settings.SAME`. Pictures of the untouched model may come from another run's folder if
that one's model, noise and judges are the same.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from safelight.bench import records as rows
from safelight.bench import settings as written
from safelight.errors import BadInput, NotFound, WorkFailed
from safelight.flow import Record, Value
from safelight.metric.base import BASE

REPLAY = "replay"  # the prompts as they are
Key = tuple[str, str, str, str, int]  # arm, attack, prompt set, prompt id, seed


@dataclass(frozen=True)
class Run(os.PathLike):
    """A run folder, read."""

    folder: Path

    def __fspath__(self) -> str:
        return str(self.folder)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """`run.json`."""
        return read_json(self.folder / "run.json")

    @cached_property
    def records(self) -> list[Record]:
        """One per picture and arm."""
        return rows.read(self.folder)

    @cached_property
    def values(self) -> list[dict[str, Any]]:
        """`values.json`."""
        return read_json(self.folder / "values.json")

    @cached_property
    def cost(self) -> dict[str, Any]:
        """`cost.json`."""
        return read_json(self.folder / "cost.json")

    def value(self, metric: str, **where: str) -> Value:
        """One figure.

        Args:
            metric: Its name, e.g. "nrr".
            **where: Fields that single it out, e.g. `prompts`, `judge`, `arm`.

        Raises:
            NotFound: No such figure, or several.
        """
        found = [
            row
            for row in self.values
            if row["metric"] == metric and all(row[key] == value for key, value in where.items())
        ]
        if len(found) != 1:
            raise NotFound(f"{len(found)} figures named {metric!r} with {where}; expected one.")
        numbers = (found[0][key] for key in ("value", "low", "high"))
        value, low, high = (float("nan") if x is None else x for x in numbers)
        return Value(value, low, high, found[0]["n"], found[0]["skipped"])


def key_of(record: Record) -> Key:
    """What tells a row from the others of its run."""
    return record.arm, record.attack, record.prompts, record.prompt_id, record.seed


def begin(out: Path, settings: Mapping[str, Any]) -> None:
    """Write `run.json`, or check that the one there is of the same run."""
    path = out / "run.json"
    if path.exists():
        other = written.differing(read_json(path), _as_json(settings), written.SAME)
        if other:
            raise BadInput(
                f"{out} holds a run with other settings (different: {', '.join(other)}). "
                "Name another folder, or delete this one."
            )
        rows.heal(out)
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out} is not empty and holds no run; name another folder.")
    out.mkdir(parents=True, exist_ok=True)
    rows.write_json(path, settings)


def reuse(base: Path, out: Path, settings: Mapping[str, Any], *, store: bool) -> None:
    """Take over another run's rows and pictures of the untouched model, where prompts agree."""
    if not (base / "run.json").exists():
        raise NotFound(f"{base} is not a run folder; `base` must be one that evaluate has made.")
    other = read_json(base / "run.json")
    new = _as_json(settings)
    _same_base(base, other, new)
    names = {one["sha256"]: one["name"] for one in new["prompts"]}
    names = {
        one["name"]: names[one["sha256"]] for one in other["prompts"] if one["sha256"] in names
    }
    judges = {judge["name"] for judge in new["judges"]}
    have = {key_of(record) for record in rows.read(out)}
    taken = []
    for record in rows.read(base):
        if record.arm != BASE or record.attack != REPLAY or record.prompts not in names:
            continue
        verdicts = tuple(verdict for verdict in record.verdicts if verdict.by in judges)
        record = replace(record, prompts=names[record.prompts], verdicts=verdicts)
        if key_of(record) in have:
            continue
        if record.image is not None and store:
            _link(base / record.image, out / record.image)
        taken.append(record)
    rows.append(out, taken)


def _same_base(base: Path, other: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Refuse a run whose untouched model was not painted and judged as ours will be."""
    wrong = written.differing(other, new, ("format", "sampling", "seeds", "features"))
    wrong += [
        f"model {key}"
        for key in written.differing(other["model"], new["model"], ("hashes", "dtype"))
    ]
    theirs = {judge["name"]: judge for judge in other["judges"]}
    wrong += [f"judge {j['name']}" for j in new["judges"] if theirs.get(j["name"]) != j]
    if wrong:
        raise BadInput(
            f"{base} cannot serve as base (different: {', '.join(wrong)}). Evaluate with the same "
            "settings, or without a base."
        )


def _link(old: Path, new: Path) -> None:
    """The same picture in two folders, kept once where the disk can."""
    if new.exists() or not old.exists():
        return
    new.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(old, new)
    except OSError:  # another file system
        shutil.copyfile(old, new)


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(settings))


def read_json(path: Path) -> Any:
    """One of the folder's own files."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFound(f"no {path.name} in {path.parent}; the run is not finished.") from None
    except json.JSONDecodeError as error:
        raise BadInput(f"{path} is damaged: {error}. Delete the run folder.") from None


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """A disk that does not take what is written is an error with a way out."""
    try:
        yield
    except OSError as error:
        raise WorkFailed(
            f"could not write to {out}: {error.strerror or error}. What was finished is safe; "
            "make room and run the same command again to go on."
        ) from error
