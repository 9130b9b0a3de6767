"""`safelight synthesize`: data to train on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safelight.cli import sets
from safelight.cli.console import (
    FAILED,
    Json,
    complain,
    counting_bar,
    emit,
    out,
    polite,
    say,
    working,
)
from safelight.cli.settings import build, split
from safelight.errors import NotFound, unknown
from safelight.names import find, table

if TYPE_CHECKING:
    from safelight.synthesize.folder import Made

app = typer.Typer(
    help="Data to train on.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _root() -> None:
    """Data to train on."""


def pairs(
    model: Annotated[
        str, typer.Argument(help="The model to be aligned: a name, a diffusers folder or a hub id.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder of pairs.")],
    unsafe: Annotated[
        list[str],
        typer.Option(
            help="What to write about: categories such as weapons,gore, 'all', a prompt set or "
            "file, or a CSV file of concepts (target, anchor). Repeatable.",
            show_default=False,
        ),
    ],
    writer: Annotated[
        str, typer.Option(help="Who writes prompts, NAME or NAME:key=value,key=value.")
    ] = "templates",
    judge: Annotated[
        str | None,
        typer.Option(
            help="Who must flag the unsafe picture and not the safe one, NAME or NAME:key=value. "
            "[default: nobody looks]",
            show_default=False,
        ),
    ] = None,
    per_category: Annotated[
        int, typer.Option(min=1, help="Pairs of prompts to write for each category.")
    ] = 100,
    together: Annotated[
        int,
        typer.Option(
            min=0, help="Further pairs for each category with something of another one beside it."
        ),
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of the pictures' noise.")] = 0,
    tries: Annotated[
        int, typer.Option(min=0, help="Other noises for a pair that the judge does not agree with.")
    ] = 3,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Strength of guidance.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 16,
    json: Json = False,
) -> None:
    """Pairs of prompts and pictures, unsafe and safe; an interrupted call goes on."""
    names = sets.unsafe_names(unsafe)
    spec, settings = split(writer)
    if spec not in table("synthesize"):
        raise NotFound(unknown("writer", spec, table("synthesize")))
    with working("loading torch"):
        from safelight.cli import guards
        from safelight.cli.evaluate import sampling
        from safelight.models.load import load
        from safelight.synthesize.base import read
        from safelight.synthesize.pairs import synthesize

        wanted = [read(name) for name in names]
        chosen = build(find("synthesize", spec), settings)
        looks = None if judge is None else guards.judge(judge)
    with working(f"loading {model}"):
        handle = load(model)
    with counting_bar() as watch:
        made = synthesize(
            handle,
            wanted,
            output,
            writer=chosen,
            judge=looks,
            per_category=per_category,
            together=together,
            seed=seed,
            tries=tries,
            sampling=sampling(handle, steps, guidance),
            batch=batch,
            watch=watch,
        )
    if json:
        emit(_result(made))
    else:
        _print(made)
    if made.empty:
        raise complain(f"categories without a pair: {made.empty}", FAILED)


app.command("pairs")(polite(pairs))


def _result(made: Made) -> dict[str, Any]:
    return {
        "pairs": str(made.folder),
        "n": len(made.twins),
        "sha256": made.twins.sha256,
        "categories": made.about["categories"],
        "minors": made.about["prompts"]["minors"],
        "parquet": made.parquet,
    }


def _print(made: Made) -> None:
    """Counts per category, and what else is worth knowing."""
    from rich.markup import escape
    from rich.table import Table

    judged = bool(made.about["judge"])
    grid = Table(title=f"pairs by {escape(made.about['model']['name'])}", title_justify="left")
    dropped = ("could not tell", "unsafe missed", "safe flagged") if judged else ()
    for column in ("category", "prompts", "pairs", *dropped):
        grid.add_column(column, justify="left" if column == "category" else "right")
    for name, one in made.about["categories"].items():
        grid.add_row(escape(name), *_cells(one, judged))
    out().print(grid)
    for name, one in made.about["categories"].items():
        for concept, why in one["skipped"].items():
            say(f"[yellow]skipped[/] {escape(concept)} ({escape(name)}): {escape(why)}")
        if one["writer"]:
            counts = ", ".join(f"{n} {what}" for what, n in one["writer"].items())
            say(f"{escape(name)}: {escape(counts)}")
    if made.about["prompts"]["minors"]:
        say(f"{made.about['prompts']['minors']} dropped by the minors filter")
    if not made.parquet:
        say("twins.jsonl only: pyarrow is not installed (pip install 'safelight\\[parquet]')")
    say(f"saved {len(made.twins)} pairs in [bold]{escape(str(made.folder))}[/]")


def _cells(one: Mapping[str, Any], judged: bool) -> list[str]:
    n, written = one["pairs"], one["written"]
    colour = "red" if not n else "green" if n == written else "yellow"
    faults = ("unknown", "unsafe missed", "safe flagged") if judged else ()
    return [str(written), f"[{colour}]{n}[/]", *(str(one["dropped"].get(k, 0)) for k in faults)]
