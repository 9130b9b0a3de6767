"""`safelight export MODEL --patch P -o DIR`: a plain diffusers folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safelight.cli.console import Json, emit, say, working
from safelight.cli.patches import load_patches


def export(
    model: Annotated[str, typer.Argument(help="A built-in name, a diffusers folder or a hub id.")],
    patch: Annotated[list[Path], typer.Option(help="A patch folder, repeatable.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    json: Json = False,
) -> None:
    """Write the patched model as a diffusers folder that needs no Safelight."""
    with working("loading torch"):
        patches = load_patches(patch)
        from safelight.models import patch as patching
        from safelight.models.load import load
    with working(f"writing {output}"):
        patching.export(load(model), patches, output)
    if json:
        emit({"export": str(output), "patches": [str(path) for path in patch]})
    else:
        say(f"wrote [bold]{output}[/]")
