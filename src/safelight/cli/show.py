"""`safelight show NAME`: a method's card."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from safelight.cards import Entry, entry
from safelight.cli.console import Json, emit, out
from safelight.errors import NotFound, unknown
from safelight.names import KINDS, table


def show(
    name: Annotated[str, typer.Argument(help="A name from `safelight list`.")],
    json: Json = False,
) -> None:
    """A method's card: paper, needs, families, settings with defaults, its authors' claims."""
    one = find(name)
    if json:
        emit(asdict(one))
    else:
        _print(one)


def find(name: str) -> Entry:
    """The entry of a name of any kind."""
    known = {name: kind for kind in reversed(KINDS) for name in table(kind)}
    if name not in known:
        raise NotFound(unknown("method, model or prompt set", name, known))
    return entry(known[name], name)


def _print(one: Entry) -> None:
    from rich.markup import escape
    from rich.table import Table

    console = out()
    console.print(f"[bold cyan]{one.name}[/]  [dim]{one.kind}[/]")
    console.print(escape(one.summary), highlight=False)
    if one.card:
        facts = Table.grid(padding=(0, 2))
        facts.add_row("[dim]paper[/]", f"{one.card.title}, {one.card.source}")
        if one.card.needs:
            facts.add_row("[dim]needs[/]", ", ".join(one.card.needs))
        facts.add_row("[dim]families[/]", ", ".join(one.card.families))
        for what, figure in one.card.claims.items():
            facts.add_row("[dim]claims[/]", f"{escape(what)}: {figure}")
        console.print(facts)
    if one.settings:
        console.print("\n[bold]settings[/] [dim](--set name=value)[/]")
        grid = Table.grid(padding=(0, 2))
        for setting in one.settings:
            grid.add_row(
                f"  [cyan]{setting.name}[/]",
                escape(setting.default),
                f"{escape(setting.help)} [dim]{escape(setting.type)}[/]",
            )
        console.print(grid)
    if one.about:
        console.print(f"\n{escape(one.about)}", highlight=False)
