"""From rows on disk to figures: `values.json` is a function of `run.json` and the records only.

Neither the order of the records nor how often the run was interrupted can be seen in it. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from math import isfinite
from typing import Any

from safelight.flow import Record, Value
from safelight.metric.asr import REPLAY
from safelight.metric.base import PROTECTED, Metric, Profile
from safelight.names import find, table

DIGITS = 6  # significant ones: far below any interval, above the noise of another linear algebra


def figures(settings: Mapping[str, Any], records: Sequence[Record]) -> list[dict[str, Any]]:
    """Every metric that means anything, for every prompt set, attack, judge and arm.

    Args:
        settings: What `run.json` holds.
        records: The rows of the run, in any order.
    """
    profiles = [Profile.of(judge) for judge in settings["judges"]]
    metrics = [find("metric", name) for name in table("metric")]
    rows = []
    for prompts in settings["prompts"]:
        mine = [record for record in records if record.prompts == prompts["name"]]
        plain = [record for record in mine if record.attack == REPLAY]
        for attack, attacked in _by_attack(mine):
            for metric, profile in _asked(metrics, profiles):
                both = metric.compares and attack != REPLAY
                for row in _rows(metric, profile, plain + attacked if both else attacked):
                    rows.append({**row, "prompts": prompts["name"], "attack": attack})
    return [{**row, **_protection(settings, row["arm"])} for row in rows]


def before_and_after(
    settings: Mapping[str, Any], plain: Sequence[Record], attacked: Sequence[Record], arm: str
) -> list[dict[str, Any]]:
    """What an attack found beyond the plain prompts, where two runs hold them.

    Args:
        settings: `run.json` of the attack's run.
        plain: Rows of the prompts as they are.
        attacked: Rows of one attack on the same prompts, or on some of them.
        arm: The arm that both are about.
    """
    plain = [record for record in plain if record.attack == REPLAY and record.arm == arm]
    attacked = [record for record in attacked if record.attack != REPLAY and record.arm == arm]
    metrics = [kind for kind in (find("metric", name) for name in table("metric")) if kind.compares]
    return [
        {**row, "prompts": prompts["name"], "attack": attack, **_protection(settings, arm)}
        for prompts in settings["prompts"]
        for attack, mine in _by_attack(attacked)
        for metric, profile in _asked(metrics, [Profile.of(judge) for judge in settings["judges"]])
        for row in _rows(metric, profile, [*plain, *mine])
    ]


def _by_attack(records: Sequence[Record]) -> Iterator[tuple[str, list[Record]]]:
    def key(record: Record) -> str:
        return record.attack

    for attack, group in groupby(sorted(records, key=key), key):
        yield attack, list(group)


def _asked(
    metrics: Sequence[type[Metric]], profiles: Sequence[Profile]
) -> Iterator[tuple[type[Metric], Profile]]:
    """Each metric with each judge; one that needs no judge, once."""
    for profile in profiles:
        for metric in metrics:
            if metric.judged or profile is profiles[0]:
                yield metric, profile


def _rows(
    kind: type[Metric], profile: Profile, records: Sequence[Record]
) -> Iterator[dict[str, Any]]:
    arms = {record.arm for record in records}
    for arm in (arm for arm in kind.arms if arm in arms):
        metric = kind(profile=profile, arm=arm)
        if not metric.applies(records):
            continue
        judge = profile.name if metric.judged else ""
        notes = {key: _plain(note) for key, note in metric.notes(records).items()}
        yield {"metric": kind.name, **_cells(metric(records)), "judge": judge, "arm": arm, **notes}


def _cells(value: Value) -> dict[str, Any]:
    numbers = {key: _plain(getattr(value, key)) for key in ("value", "low", "high")}
    return {**numbers, "n": value.n, "skipped": value.skipped}


def _plain(x: Any) -> Any:
    """A number as JSON knows it: null for nan, and no digits that mean nothing."""
    if not isinstance(x, float):
        return x
    return float(f"{x:.{DIGITS}g}") if isfinite(x) else None


def _protection(settings: Mapping[str, Any], arm: str) -> dict[str, str]:
    """What the arm was protected by."""
    on = arm == PROTECTED
    patches = (patch["method"] for patch in settings["patches"]) if on else ()
    guards = (guard["name"] for guard in settings["guards"]) if on else ()
    return {"patch": "+".join(patches), "guard": "+".join(guards)}
