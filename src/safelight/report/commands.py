"""The commands that repeat a run, written from what the run remembers."""

from __future__ import annotations

import ast
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from safelight.names import table
from safelight.report import words
from safelight.report.run import Run

BATCH = 16  # what `safelight evaluate` uses when nothing is said


def commands(run: Run) -> list[str]:
    """One `align` per patch, then `evaluate`."""
    lines = [_align(run, i, patch) for i, patch in enumerate(run.patches)]
    return [*lines, _evaluate(run)]


def _align(run: Run, i: int, patch: Mapping[str, Any]) -> str:
    names = list(patch["info"].get("data", ()))
    unsafe = [name for name in names if not name.startswith("emoji/safe/")]
    parts = ["safelight", "align", patch["method"], run.settings["model"]["name"]]
    for name in unsafe:
        known = name in table("prompts") and name.endswith("/train")
        parts += ["--unsafe", name.split("/")[1] if known else name]
    for key, value in _changed(patch):
        parts += ["--set", f"{key}={value}"]
    if patch["info"].get("seed"):
        parts += ["--seed", str(patch["info"]["seed"])]
    return shlex.join([*parts, "-o", _patch_path(run, i)])


def _patch_path(run: Run, i: int) -> str:
    return f"patches/{run.folder.name}" + (f"-{i + 1}" if i else "")


def _changed(patch: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The settings that are not the method's defaults."""
    known = words.method(patch["method"])
    defaults = {s.name: s.default for s in known.settings} if known else {}
    for key, value in patch["settings"].items():
        if key in defaults and defaults[key] != "required":
            default = ast.literal_eval(defaults[key])
            value_ = tuple(value) if isinstance(default, tuple) else value
            if value_ == default:
                continue
        yield key, ",".join(map(str, value)) if isinstance(value, list) else value


def _evaluate(run: Run) -> str:
    settings = run.settings
    parts = ["safelight", "evaluate", settings["model"]["name"]]
    for i, _ in enumerate(run.patches):
        parts += ["--patch", _patch_path(run, i)]
    for guard in run.guards:
        given = ",".join(f"{key}={value}" for key, value in guard.get("settings", {}).items())
        parts += ["--guard", f"{guard['name']}:{given}" if given else guard["name"]]
    for one in run.sets:
        parts += ["--prompts", words.whole(one["name"])]
    if taken := [one["n"] for one in run.sets if words.whole(one["name"]) != one["name"]]:
        parts += ["--limit", str(max(taken))]
    for judge in settings["judges"]:
        parts += ["--judge", judge.get("spec", judge["name"])]
    parts += ["--seeds", ",".join(map(str, settings["seeds"]))]
    sampling = settings["sampling"]
    parts += ["--steps", str(sampling["steps"]), "--guidance", f"{sampling['guidance']:g}"]
    if settings.get("batch", BATCH) != BATCH:
        parts += ["--batch", str(settings["batch"])]
    return shlex.join([*parts, "-o", f"runs/{run.folder.name}"])
