"""The `safelight` command: one file per command, each a thin call of public functions.

Nothing here imports torch until a command needs a model, so that `--help`, `list` and `show` answer
at once. Exit codes: 0 done, 1 a stated threshold was violated, 2 wrong use, 3 the work failed.
"""

from __future__ import annotations

from collections.abc import Callable

import typer

from safelight.cli import (
    align,
    bench,
    demo,
    doctor,
    evaluate,
    explain,
    export,
    generate,
    judge,
    list_,
    merge,
    report,
    show,
    synthesize,
)
from safelight.cli.console import polite

app = typer.Typer(
    name="safelight",
    help="Make open text-to-image models safe, and prove it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo.demo,
    "list": list_.list_,
    "show": show.show,
    "generate": generate.generate,
    "align": align.align,
    "merge": merge.merge,
    "evaluate": evaluate.evaluate,
    "bench": bench.bench,
    "report": report.report,
    "explain": explain.explain,
    "export": export.export,
    "doctor": doctor.doctor,
}
for name, command in COMMANDS.items():
    app.command(name)(polite(command))
app.add_typer(judge.app, name="judge")
app.add_typer(synthesize.app, name="synthesize")


@app.callback(invoke_without_command=True)
def _root(
    version: bool = typer.Option(False, "--version", help="Print the version and leave."),
) -> None:
    if version:
        from safelight import __version__

        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point of the `safelight` command."""
    app()
