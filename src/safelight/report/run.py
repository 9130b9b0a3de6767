"""A run folder as the report reads it: settings, rows, figures and cost; nothing is recomputed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safelight.bench import records
from safelight.errors import BadInput, NotFound
from safelight.flow import Record
from safelight.metric.base import BASE, PROTECTED, Profile

Row = Mapping[str, Any]
REPLAY = "replay"


@dataclass(frozen=True, eq=False)
class Run:
    """What one run folder holds.

    Args:
        folder: Where it is.
        label: What the report calls it, unique among the runs of a report.
        settings: `run.json`.
        values: `values.json`.
        cost: `cost.json`; empty if the run has none.
        records: The rows of `records.jsonl` that are about the prompts as they are.
        attacks: Figures of the run's attacks.
        tokens: Token scores of a few prompts, where a guard has them.
    """

    folder: Path
    label: str
    settings: Row
    values: Sequence[Row]
    cost: Row
    records: Sequence[Record]
    attacks: Sequence[Row] = ()
    tokens: Sequence[Row] = ()

    @property
    def patches(self) -> Sequence[Row]:
        return self.settings.get("patches", ())

    @property
    def guards(self) -> Sequence[Row]:
        return self.settings.get("guards", ())

    @property
    def sets(self) -> Sequence[Row]:
        """The prompt sets, in the order in which they were run."""
        return self.settings["prompts"]

    @cached_property
    def judges(self) -> Mapping[str, Profile]:
        """How to read each judge's scores."""
        return {judge["name"]: Profile.of(judge) for judge in self.settings["judges"]}

    @cached_property
    def protects(self) -> bool:
        """Whether there is anything beside the untouched model."""
        return any(record.arm == PROTECTED for record in self.records)

    @cached_property
    def _index(self) -> Mapping[tuple[str, str, str, str], Row]:
        found: dict[tuple[str, str, str, str], Row] = {}
        for row in self.values:
            judges = [row["judge"]] if row["judge"] else list(self.judges)
            for judge in judges:
                key = (row["metric"], row["prompts"], row.get("arm", PROTECTED), judge)
                found.setdefault(key, row)
        return found

    def value(self, metric: str, prompts: str, judge: str, arm: str = PROTECTED) -> Row | None:
        """One figure, or None where the run does not have it."""
        return self._index.get((metric, prompts, arm, judge))

    def has(self, metric: str, prompts: str) -> bool:
        """Whether any judge gave this figure for this prompt set."""
        return any(key[0] == metric and key[1] == prompts for key in self._index)


def read_all(folders: Sequence[Path]) -> tuple[Run, ...]:
    """Several run folders, each with a label of its own.

    Raises:
        NotFound: There is no run in a folder, or no folder was given.
        BadInput: A run has not finished, or one of its files is damaged.
    """
    folders = [Path(folder) for folder in folders]
    if not folders:
        raise NotFound("a report needs at least one run folder; `safelight evaluate` makes one.")
    parts = [_read(folder) for folder in folders]
    labels = label_all([settings for settings, *_ in parts], folders)
    return tuple(
        Run(folder, label, *part)
        for folder, label, part in zip(folders, labels, parts, strict=True)
    )


def _read(folder: Path) -> tuple[Any, ...]:
    """Everything after the label, in the order of `Run`."""
    if not (folder / "run.json").is_file():
        raise NotFound(f"{folder} is not a run folder: it has no run.json.")
    if not (folder / "values.json").is_file():
        raise BadInput(
            f"the run in {folder} has not finished: it has no values.json. "
            "Give the same command again; it goes on where it stopped."
        )
    cost = _json(folder / "cost.json") if (folder / "cost.json").is_file() else {}
    values = _json(folder / "values.json")
    plain = [row for row in values if row.get("attack", REPLAY) == REPLAY]
    attacks = [row for row in values if row.get("attack", REPLAY) != REPLAY]
    painted = [record for record in records.read(folder) if record.attack == REPLAY]
    tokens = _json(folder / "tokens.json") if (folder / "tokens.json").is_file() else ()
    return _json(folder / "run.json"), plain, cost, painted, attacks, tokens


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is damaged: {error}.") from None


def label_all(settings: Sequence[Row], folders: Sequence[Path]) -> list[str]:
    """Names for people: the methods, then what tells runs apart, then the folder's name."""
    from safelight.report.words import method_title

    plain = [
        " + ".join(
            [method_title(patch["method"]) for patch in one.get("patches", ())]
            + [guard.get("title", guard["name"]) for guard in one.get("guards", ())]
        )
        or "Untouched model"
        for one in settings
    ]
    told = [
        name + _difference(i, settings) if plain.count(name) > 1 else name
        for i, name in enumerate(plain)
    ]
    return [
        f"{name} ({folder.name})" if told.count(name) > 1 else name
        for name, folder in zip(told, folders, strict=True)
    ]


def _difference(i: int, settings: Sequence[Row]) -> str:
    """The settings in which this run's patches differ from those of other runs, zeros left out."""
    flat = [_flat(one) for one in settings]
    mine = flat[i]
    differ = {key for other in flat for key in mine if key in other and other[key] != mine[key]}
    words = [f"{key} {mine[key]:g}" if isinstance(mine[key], int | float) else f"{key} {mine[key]}"
             for key in mine if key in differ and mine[key]]  # fmt: skip
    return f", {', '.join(words)}" if words else ""


def _flat(settings: Row) -> dict[str, Any]:
    patches = settings.get("patches", ())
    return {key: value for patch in patches for key, value in patch["settings"].items()}


__all__ = ["BASE", "PROTECTED", "Row", "Run", "label_all", "read_all"]
