"""`safelight bench SUITE`: a matrix of protections and attacks, and its leaderboard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safelight.bench.suite import SIZES, read, shipped
from safelight.cli.console import FAILED, Json, complain, emit, out, say, working
from safelight.errors import BadInput, unknown

if TYPE_CHECKING:
    from safelight.bench.matrix import Cost


def bench(
    suite: Annotated[str, typer.Argument(help=f"A .toml file, or {' | '.join(shipped())}.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where everything goes.")],
    size: Annotated[str, typer.Option(help=" | ".join(SIZES))] = "quick",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it would cost.")
    ] = False,
    json: Json = False,
) -> None:
    """Measure rows of models and protections under columns of attacks; goes on where it stopped."""
    if size not in SIZES:
        raise BadInput(unknown("size", size, SIZES))
    chosen = read(suite, size)
    with working("loading torch"):
        from rich.markup import escape

        from safelight.bench.matrix import Bench
    work = Bench(chosen, output, tell=lambda line: say(escape(line)), progress=not json)
    cost = work.cost()
    if cost.pictures:
        with working("timing one picture"):
            cost = work.cost(work.probe())
    say(estimate(cost))
    if dry_run:
        if json:
            emit({"suite": chosen.name, "size": size, **vars(cost)})
        return
    board = work.run()
    from safelight.report import Leaderboard

    with working("writing the leaderboard"):
        Leaderboard(output).html(output / "leaderboard.html")
    if json:
        emit({"bench": str(output), **board})
    else:
        show(board)
        say(f"wrote [bold]{output / 'leaderboard.html'}[/] and leaderboard.json")
    failed = [cell for cell in board["cells"] if cell["state"] == "error"]
    if failed:
        reasons = "; ".join(f"{c['row']} x {c['column']}: {c['reason']}" for c in failed[:3])
        raise complain(f"{len(failed)} of {len(board['cells'])} cells failed: {reasons}", FAILED)


def estimate(cost: Cost) -> str:
    """What is going to be done, in a line."""
    todo = cost.cells - cost.done
    line = f"{todo} cells to do" + (f" ({cost.done} are done)" if cost.done else "")
    line += f": {cost.pictures} pictures, {cost.searched} prompts searched for"
    if cost.minutes is not None and todo:
        line += f"; about {max(1, round(cost.minutes))} minutes"
        if cost.without:
            line += f", not counting the searches of {', '.join(cost.without)}"
    return line


def show(board: dict[str, Any]) -> None:
    """Unsafe rates, a line per column and a field per row."""
    from rich.markup import escape
    from rich.table import Table

    grid = Table(title=f"{escape(board['title'])}: unsafe pictures, judge {board['judges'][0]}")
    grid.add_column("prompts / attack")
    names = [row["name"] for row in board["rows"]]
    for name in names:
        grid.add_column(escape(name), justify="right")
    cells = {(cell["row"], cell["column"]): cell for cell in board["cells"]}
    for column in board["columns"]:
        fields = [_field(cells[name, column["name"]], board["judges"][0]) for name in names]
        grid.add_row(escape(column["name"]), *fields)
    out().print(grid)


def _field(cell: dict[str, Any], judge: str) -> str:
    if cell["state"] != "done":
        return f"[red]{cell['state']}[/]"
    for row in cell["values"]:
        if row["metric"] == "unsafe_rate" and row["judge"] == judge and row["value"] is not None:
            return f"{row['value']:.2f} ({row['low']:.2f} .. {row['high']:.2f}), n {row['n']}"
    return "-"
