"""`safelight merge MODEL EXPERT...`: several LoRA patches as one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safelight.cli import sets
from safelight.cli.console import Json, counting_bar, emit, out, say, working
from safelight.cli.patches import load_patches
from safelight.cli.settings import build
from safelight.errors import BadInput

if TYPE_CHECKING:
    from safelight.models.base import TextToImage
    from safelight.models.patch import Patch

HOW = "co_merge | cat | sum | svd | ties_svd | dare_ties_svd"


def merge(
    model: Annotated[str, typer.Argument(help="A built-in name, a diffusers folder or a hub id.")],
    experts: Annotated[
        list[Path],
        typer.Argument(
            metavar="EXPERT...", help="Patch folders, LoRA files or peft folders, for one model."
        ),
    ],
    how: Annotated[str, typer.Option(help=HOW)] = "co_merge",
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="Unsafe captions for co_merge: categories, prompt sets or files. "
            "[default: the experts' own categories]",
            show_default=False,
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of the way, repeatable."),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The patch folder to write.")
    ] = Path("merged"),
    seed: Annotated[int, typer.Option(help="Of every random choice.")] = 0,
    force: Annotated[bool, typer.Option(help="Replace an existing patch.")] = False,
    json: Json = False,
) -> None:
    """Make one patch of several experts: LoRA patches trained apart on one model."""
    if output.exists() and not force:
        raise BadInput(f"{output} exists; name another folder with -o, or replace it with --force.")
    with working("loading torch"):
        from safelight.align.merge import merge as merged
        from safelight.align.merge import way
        from safelight.models.load import load

        chosen = build(way(how), set_ or [])
    with working(f"loading {model}"):
        handle = load(model)
        patches = [_expert(path, handle) for path in experts]
    with counting_bar() if chosen.calibrates else working(how) as watch:
        patch = merged(
            handle,
            patches,
            chosen,
            prompts=_prompts(prompts or [], patches) if chosen.calibrates else (),
            seed=seed,
            progress=None if watch is None else partial(watch, how),
        )
    patch.save(output)
    if json:
        emit({"patch": str(output), "settings": patch.settings, **patch.info})
        return
    _print(experts, patch)
    say(f"saved [bold]{output}[/]; next: safelight evaluate {model} --patch {output} ...")


def _expert(path: Path, model: TextToImage) -> Patch:
    """A patch folder, or what `load_lora` reads."""
    if (path / "patch.json").is_file() or not path.exists():
        return load_patches([path])[0]
    from safelight.models.lora import load_lora

    return load_lora(model, path)


def _prompts(values: Sequence[str], experts: Sequence[Patch]) -> Sequence[Any]:
    """Those that were named, else those of the built-in categories that the experts remove."""
    own = {name for expert in experts for name in expert.info.get("categories", [])}
    known = sorted(own & set(sets.categories()))
    if not values and known != sorted(own):
        raise BadInput(
            f"there are no built-in prompts of {', '.join(sorted(own - set(known)))}: name unsafe "
            "captions with --prompts."
        )
    return sets.unsafe(values or known) if values or known else ()


def _print(paths: Sequence[Path], patch: Patch) -> None:
    """How many neurons each expert won; for ways without winners only the ranks."""
    from rich.table import Table

    told = patch.info["experts"]
    neurons = sum(one.get("won", 0) for one in told)
    grid = Table(title=f"{patch.settings['how']}: rank {patch.info['rank']}", title_justify="left")
    for column in ("expert", "removes", "rank", *(("neurons won", "share") if neurons else ())):
        grid.add_column(column, justify="left" if column in ("expert", "removes") else "right")
    for path, one in zip(paths, told, strict=True):
        won = [f"{one['won']:,}", f"{one['won'] / neurons:.1%}"] if neurons else []
        grid.add_row(str(path), ", ".join(one["categories"]) or "?", str(one["rank"]), *won)
    out().print(grid)
