"""Guards and judges on the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from safelight.cli.settings import build, split
from safelight.names import find

JUDGE = "emoji"


def guards(specs: Sequence[str]) -> list[Any]:
    """Guards from "name" or "name:key=value"; a guard that needs a judge gets `judge=NAME`."""
    return [_guard(spec) for spec in specs]


def _guard(spec: str) -> Any:
    name, pairs = split(spec)
    method = find("guard", name)
    given = {}
    if "judge" in {field.name for field in dataclasses.fields(method)}:
        chosen = [pair for pair in pairs if pair.startswith("judge=")]
        pairs = [pair for pair in pairs if pair not in chosen]
        given["judge"] = judge(chosen[-1].removeprefix("judge=") if chosen else JUDGE)
    return build(method, pairs, **given)


def judge(spec: str) -> Any:
    """A judge from "name" or "name:key=value,key=value"."""
    name, pairs = split(spec)
    return build(find("judge", name), pairs)
