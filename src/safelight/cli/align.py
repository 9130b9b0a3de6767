"""`safelight align METHOD MODEL`: learn a patch that makes a model safer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safelight.cli import sets
from safelight.cli.console import Json, emit, out, say, training_bar, working
from safelight.cli.settings import build
from safelight.errors import BadInput
from safelight.names import find

if TYPE_CHECKING:
    from safelight.models.patch import Patch


def align(
    method: Annotated[str, typer.Argument(help="A method from `safelight list align`.")],
    model: Annotated[str, typer.Argument(help="A built-in name, a diffusers folder or a hub id.")],
    unsafe: Annotated[
        list[str],
        typer.Option(
            help="What to remove: categories such as weapons,gore, 'all', or a prompt file.",
            show_default=False,
        ),
    ],
    safe: Annotated[
        list[str] | None,
        typer.Option(help="What must stay: a prompt set or file. [default: emoji/safe/train]"),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of the method, repeatable."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The patch folder to write.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of every random choice.")] = 0,
    force: Annotated[bool, typer.Option(help="Replace an existing patch.")] = False,
    json: Json = False,
) -> None:
    """Learn a patch that makes a model safer, and save it as a folder."""
    unsafe_sets = sets.unsafe(unsafe)
    safe_sets = sets.safe(safe or [], unsafe_sets)
    path = output or Path(f"{method}-{'-'.join(_short(one.name) for one in unsafe_sets)}")
    if path.exists() and not force:
        raise BadInput(f"{path} exists; name another folder with -o, or replace it with --force.")
    patch = learn(method, model, unsafe_sets, safe_sets, set_ or [], seed)
    patch.save(path)
    if json:
        emit({"patch": str(path), "method": patch.method, "settings": patch.settings, **patch.info})
    else:
        _print(patch, path, model)


def learn(
    method: str, name: str, unsafe: list[Any], safe: list[Any], pairs: list[str], seed: int
) -> Patch:
    """Load, fit, with a progress bar."""
    with working("loading torch"):
        settings = build(find("align", method), pairs)
        from safelight.align.base import TextData
        from safelight.models.load import load
    with working(f"loading {name}"):
        model = load(name)
        data = TextData(safe=safe, unsafe=unsafe)
    with training_bar(method) as watch:
        return settings.fit(model, data, seed=seed, watch=watch)


def _short(name: str) -> str:
    parts = name.split("/")
    return parts[1] if len(parts) == 3 else Path(name).stem


def _print(patch: Patch, path: Path, model: str) -> None:
    from rich.table import Table

    first, *_ = patch.info["pareto"]
    kept = next(
        p for p in patch.info["pareto"] if p["epoch"] == patch.info["stopped"]["kept_epoch"]
    )
    grid = Table(title=f"{patch.method} on held-out prompts", title_justify="left")
    for column in ("", "before", "after"):
        grid.add_column(column, justify="left" if not column else "right")
    words = {
        "cosine": "unsafe prompts: |cos| to where they were",
        "drift": "safe prompts: relative drift",
        "L_u": "L_u (hold safe)",
        "L_e": "L_e (move unsafe)",
        "L_a": "L_a (unsafe to its anchor)",
    }
    for key, meaning in words.items():
        if key in kept:
            grid.add_row(meaning, f"{first[key]:.3f}", f"{kept[key]:.3f}")
    out().print(grid)
    cost = patch.info["cost"]
    say(
        f"{cost['parameters']:,} parameters in {cost['seconds']:.1f} s; kept epoch "
        f"{kept['epoch']} ({patch.info['stopped']['why']})"
    )
    say(f"saved [bold]{path}[/]; next: safelight evaluate {model} --patch {path} ...")
