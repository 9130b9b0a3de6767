"""Attacks on the command line: "name" or "name:key=value,budget.steps=100"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from safelight.cli.settings import build, split
from safelight.errors import BadInput
from safelight.names import find

BUDGET = "budget."


def attacks(specs: Sequence[str]) -> dict[str, Any]:
    """Attacks by what rows call them: their name, or all that was given where a name comes twice.

    Raises:
        NotFound: No such attack.
        BadInput: Unknown settings, or the same attack twice.
    """
    names = [split(spec)[0] for spec in specs]
    found: dict[str, Any] = {}
    for name, spec in zip(names, specs, strict=True):
        label = name if names.count(name) == 1 else spec
        if label in found:
            raise BadInput(f"--attack {spec} is given twice.")
        if name != "replay":  # every run replays the prompts as they are
            found[label] = _attack(spec)
    return found


def _attack(spec: str) -> Any:
    from safelight.attack.base import Budget

    name, pairs = split(spec)
    limits = [pair.removeprefix(BUDGET) for pair in pairs if pair.startswith(BUDGET)]
    own = [pair for pair in pairs if not pair.startswith(BUDGET)]
    attack = build(find("attack", name), own)
    if limits:
        before = {key: value for key, value in vars(attack.budget).items() if value is not None}
        given = {pair.partition("=")[0].strip() for pair in limits}
        before = {key: value for key, value in before.items() if key not in given}
        attack.budget = build(Budget, limits, **before)
    return attack
