"""`safelight explain MODEL PROMPT...`: which tokens made a guard act."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safelight.cli.console import Json, emit, out, say, working
from safelight.cli.patches import load_patches
from safelight.errors import BadInput

if TYPE_CHECKING:
    from rich.text import Text

    from safelight.report import tokens

FAINT = 0.1  # below this a token is left as it is
COLD, HOT = (94, 52, 24), (214, 40, 24)


def explain(
    model: Annotated[str, typer.Argument(help="A built-in name, a diffusers folder or a hub id.")],
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to look at.")],
    guard: Annotated[
        list[str],
        typer.Option(help="A guard with token scores: FOLDER or FOLDER:key=value, repeatable."),
    ],
    patch: Annotated[list[Path] | None, typer.Option(help="A patch folder, repeatable.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A page (.html) or a picture (.svg).")
    ] = None,
    json: Json = False,
) -> None:
    """Show prompts with every token coloured by the score that a guard used for it."""
    from safelight.report import tokens  # takes numpy along

    if output is not None:
        tokens.check_format(output)
    rows = scores(model, prompts, guard, patch or [])
    if output is not None:
        tokens.write(output, rows, "What the guard saw")
    if json:
        emit(rows)
        return
    _print(rows)
    if output is not None:
        say(f"wrote [bold]{output}[/]")


def scores(
    name: str, prompts: list[str], specs: list[str], paths: list[Path]
) -> list[dict[str, Any]]:
    """One row per prompt, guard and tensor."""
    with working("loading torch"):
        from safelight.cli.guards import guards
        from safelight.guard.base import Guarded
        from safelight.guard.explain import Explains, explained
        from safelight.models.load import load
        from safelight.models.patch import worn

        patches = load_patches(paths)
        chosen = guards(specs)
        if not any(isinstance(one, Explains) for one in chosen):
            raise BadInput(
                f"{', '.join(specs)} has no token scores; train a guard that has them: "
                f"safelight align sanitizer {name} --unsafe ... -o FOLDER."
            )
    with working(f"loading {name}"):
        handle = load(name)
    with worn(handle, patches):
        return [asdict(one) for one in explained(Guarded(handle, chosen), prompts)]


def _print(rows: list[dict[str, Any]]) -> None:
    """Each prompt coloured, then its highest scores in words, for terminals without colours."""
    from rich.table import Table
    from rich.text import Text

    from safelight.report import tokens

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    for number, lines in enumerate(tokens.by_prompt(rows).values()):
        if number:
            grid.add_row("", "")
        for one in lines:
            grid.add_row(one.reads, _coloured(one))
            high = sorted(one.tokens, key=lambda token: -token.score)[:4]
            said = "  ".join(f"{t.text} {t.score:.2f}" for t in high if t.score >= FAINT)
            grid.add_row("", Text(said or f"no score above {FAINT}", style="dim"))
    out().print(grid)


def _coloured(line: tokens.Line) -> Text:
    from rich.text import Text

    text = Text()
    for token in line.tokens:
        text.append(token.text, style=_style(token.score))
        text.append(" " if token.space else "")
    return text if line.tokens else Text("no tokens", style="dim")


def _style(score: float) -> str:
    """White on a colour between brown and red, which can be read on any terminal."""
    from safelight.report import tokens

    if score < FAINT:
        return ""
    r, g, b = (round(cold + (hot - cold) * score) for cold, hot in zip(COLD, HOT, strict=True))
    return f"{'bold ' if score >= tokens.MARKED else ''}rgb(255,255,255) on rgb({r},{g},{b})"
