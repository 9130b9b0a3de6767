"""Guards and judges on the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safelight.cli.settings import build, split
from safelight.names import find, table

JUDGE = "emoji"


def guards(specs: Sequence[str]) -> list[Any]:
    """Guards from "name" or "name:key=value", or "folder:key=value" for those that have learnt.

    A guard that needs a judge gets `judge=NAME`.
    """
    return [_guard(spec) for spec in specs]


def _guard(spec: str) -> Any:
    name, pairs = split(spec)
    if name not in table("guard") and Path(name).is_dir():
        return _learnt(name, pairs)
    method = find("guard", name)
    given = {}
    if "judge" in {field.name for field in dataclasses.fields(method)}:
        chosen = [pair for pair in pairs if pair.startswith("judge=")]
        pairs = [pair for pair in pairs if pair not in chosen]
        given["judge"] = judge(chosen[-1].removeprefix("judge=") if chosen else JUDGE)
    return build(method, pairs, **given)


def _learnt(folder: str, pairs: Sequence[str]) -> Any:
    """A guard from its folder, with other settings where they are given."""
    from safelight.guard.trained import load_guard

    guard = load_guard(folder)
    named = build(type(guard), pairs, **dataclasses.asdict(guard))
    changed = {pair.partition("=")[0].strip() for pair in pairs}
    return load_guard(folder, **{key: getattr(named, key) for key in changed})


def judge(spec: str) -> Any:
    """A judge from "name" or "name:key=value,key=value"."""
    name, pairs = split(spec)
    return build(find("judge", name), pairs)
