"""`safelight report RUN...`: one self-contained page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safelight.cli.console import Json, emit, say, working
from safelight.errors import NotFound

if TYPE_CHECKING:
    from safelight.report import Report


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, or one bench's folder.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("report.html"),
    json: Json = False,
) -> None:
    """Tables, pictures and curves of one or several runs as one HTML file."""
    from safelight.report import Leaderboard

    page: Leaderboard | Report
    if len(runs) == 1 and (runs[0] / "leaderboard.json").is_file():
        page = Leaderboard(runs[0])
    else:
        page = _of_runs(runs)
    with working("writing the report"):
        output.parent.mkdir(parents=True, exist_ok=True)
        page.html(output)
    if json:
        emit({"report": str(output), "runs": [str(run) for run in runs]})
    else:
        say(f"wrote [bold]{output}[/]")


def _of_runs(runs: list[Path]) -> Report:
    from safelight.report import Report

    for run in runs:
        if not (run / "run.json").is_file():
            raise NotFound(f"{run} is not a run folder; `safelight evaluate` makes one.")
    return Report(runs)
