"""Names of everything that can be named: one plain table per kind, readable without torch.

Each kind's package keeps its own table (`safelight.align.TABLE`, ...), name -> "module:Class".
Outside packages add theirs by an entry point in the group `safelight.<kind>`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from safelight.errors import NotFound, unknown

KINDS = ("align", "guard", "attack", "judge", "metric", "synthesize", "prompts", "models")


def table(kind: str) -> Mapping[str, str]:
    """name -> "module:Class" for one kind, plugins included, in alphabetical order."""
    if kind not in KINDS:
        raise NotFound(unknown("kind", kind, KINDS))
    try:
        own = dict(import_module(f"safelight.{kind}").TABLE)
    except ModuleNotFoundError as error:
        if error.name != f"safelight.{kind}":
            raise
        own = {}
    plugins = {point.name: point.value for point in entry_points(group=f"safelight.{kind}")}
    return dict(sorted({**plugins, **own}.items()))


def learner(name: str) -> Any:
    """The class behind the name of something that can be trained: an alignment, or a guard.

    Raises:
        NotFound: No such name, or a guard that has nothing to learn.
    """
    known = {**table("guard"), **table("align")}
    if name not in known:
        raise NotFound(unknown("align", name, known))
    found = find("align" if name in table("align") else "guard", name)
    if not hasattr(found, "fit"):
        raise NotFound(f"{name} is a guard that learns nothing; give it with --guard {name}.")
    return found


def find(kind: str, name: str) -> Any:
    """The class behind a name.

    Raises:
        NotFound: No such name; the message suggests the nearest one.
    """
    known = table(kind)
    if name not in known:
        raise NotFound(unknown(kind, name, known))
    module, _, attribute = known[name].partition(":")
    return getattr(import_module(module), attribute)
