"""Guards and judges on the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safelight.cli.settings import build, split
from safelight.names import find

JUDGE = "emoji"


def guards(specs: Sequence[str]) -> list[Any]:
    """Guards from "name" or "name:key=value", or "folder:key=value" for those that have learnt.

    A guard that needs a judge gets `judge=NAME`.
    What follows `judge=NAME:` are the judge's own settings: a guard's come before.
    """
    return [_guard(spec) for spec in specs]


def _guard(spec: str) -> Any:
    name, pairs = split(spec)
    if Path(name, "guard.json").is_file():  # also where a folder is named like its method
        return _learnt(name, pairs)
    method = find("guard", name)
    given = {}
    if "judge" in {field.name for field in dataclasses.fields(method)}:
        pairs, chosen = _apart(pairs)
        given["judge"] = judge(chosen)
    return build(method, pairs, **given)


def _learnt(folder: str, pairs: Sequence[str]) -> Any:
    """A guard from its folder, with other settings where they are given."""
    from safelight.guard.trained import load_guard

    guard = load_guard(folder)
    named = build(type(guard), pairs, **dataclasses.asdict(guard))
    changed = {pair.partition("=")[0].strip() for pair in pairs}
    return load_guard(folder, **{key: getattr(named, key) for key in changed})


def _apart(pairs: Sequence[str]) -> tuple[list[str], str]:
    """A guard's own settings, and its judge with the judge's settings."""
    for at, pair in enumerate(pairs):
        if pair.startswith("judge="):
            end = len(pairs) if ":" in pair else at + 1
            chosen = ",".join(pairs[at:end]).removeprefix("judge=")
            return [*pairs[:at], *pairs[end:]], chosen
    return list(pairs), JUDGE


def judge(spec: str) -> Any:
    """A judge from "name" or "name:key=value,key=value"; `label=` calls it something else."""
    name, pairs = split(spec)
    labels = [pair.partition("=")[2].strip() for pair in pairs if pair.startswith("label=")]
    made = build(find("judge", name), [pair for pair in pairs if not pair.startswith("label=")])
    return made.called(labels[-1]) if labels else made
