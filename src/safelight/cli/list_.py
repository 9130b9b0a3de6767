"""`safelight list`: every name that other commands understand."""

from __future__ import annotations

from typing import Annotated

import typer

from safelight.cards import Entry, entries
from safelight.cli.console import Json, emit, out
from safelight.errors import NotFound, unknown

KINDS = {
    "models": "models",
    "align": "align",
    "guards": "guard",
    "attacks": "attack",
    "judges": "judge",
    "metrics": "metric",
    "writers": "synthesize",
    "prompts": "prompts",
}


def list_(
    kind: Annotated[
        str | None, typer.Argument(metavar=f"[{'|'.join(KINDS)}]", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Names of models, methods, judges, metrics and prompt sets, one line each."""
    if kind is not None and kind not in KINDS:
        raise NotFound(unknown("kind", kind, KINDS))
    chosen = [kind] if kind else list(KINDS)
    found = {plural: entries(KINDS[plural]) for plural in chosen}
    if json:
        emit([_row(one) for group in found.values() for one in group])
        return
    _print(found)


def _row(one: Entry) -> dict[str, str]:
    return {"name": one.name, "kind": one.kind, "summary": one.summary, "source": one.source}


def _print(found: dict[str, list[Entry]]) -> None:
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column()
    grid.add_column(style="dim", no_wrap=True)
    for plural, group in found.items():
        if group:
            grid.add_row(f"[bold]{plural}[/]")
            for one in group:
                grid.add_row(f"  [cyan]{one.name}[/]", one.summary, one.source)
    out().print(grid)
