"""`safelight report RUN...`: one self-contained page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safelight.cli.console import Json, emit, say, working
from safelight.errors import NotFound


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("report.html"),
    json: Json = False,
) -> None:
    """Tables, pictures and curves of one or several runs as one HTML file."""
    for run in runs:
        if not (run / "run.json").is_file():
            raise NotFound(f"{run} is not a run folder; `safelight evaluate` makes one.")
    from safelight.report import Report

    with working("writing the report"):
        output.parent.mkdir(parents=True, exist_ok=True)
        Report(runs).html(output)
    if json:
        emit({"report": str(output), "runs": [str(run) for run in runs]})
    else:
        say(f"wrote [bold]{output}[/]")
