"""`safelight export MODEL --patch P -o DIR`: a plain diffusers folder, or a LoRA file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safelight.cli.console import Json, emit, say, working
from safelight.cli.patches import load_patches


def export(
    model: Annotated[str, typer.Argument(help="A built-in name, a diffusers folder or a hub id.")],
    patch: Annotated[list[Path], typer.Option(help="A patch folder, repeatable.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A folder, or a .safetensors file for a LoRA.")
    ],
    json: Json = False,
) -> None:
    """Write the patched model as a diffusers folder, or low-rank patches as a LoRA file."""
    with working("loading torch"):
        patches = load_patches(patch)
        from safelight.models.export import export as export_folder
        from safelight.models.export import export_lora
        from safelight.models.load import load
    write = export_lora if output.suffix == ".safetensors" else export_folder
    with working(f"writing {output}"):
        write(load(model), patches, output)
    if json:
        emit({"export": str(output), "patches": [str(path) for path in patch]})
    else:
        say(f"wrote [bold]{output}[/]")
