"""`safelight generate MODEL PROMPT...`: pictures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safelight.cli.console import Json, emit, say, working
from safelight.cli.patches import load_patches
from safelight.errors import BadInput

if TYPE_CHECKING:
    from safelight.flow import Outcome


def generate(
    model: Annotated[str, typer.Argument(help="A built-in name, a diffusers folder or a hub id.")],
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to paint.")],
    patch: Annotated[list[Path] | None, typer.Option(help="A patch folder, repeatable.")] = None,
    guard: Annotated[
        list[str] | None, typer.Option(help="A guard, NAME or NAME:key=value, repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the first picture; the next uses seed + 1.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", min=1)] = None,
    guidance: Annotated[float | None, typer.Option(help="Strength of guidance.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to put them.")] = Path(
        "pictures"
    ),
    json: Json = False,
) -> None:
    """Paint pictures, with or without patches and guards."""
    for i, text in enumerate(prompts, start=1):
        if not text.strip():
            raise BadInput(f"prompt {i} is empty; say what to paint.")
    with working("loading torch"):
        from safelight.cli.guards import guards
        from safelight.guard.base import Guarded
        from safelight.models.load import load
        from safelight.models.patch import worn

        patches = load_patches(patch or [])
    with working(f"loading {model}"):
        handle = load(model)
        target = Guarded(handle, guards(guard or [])) if guard else handle
    asked: dict[str, Any] = {"steps": steps, "guidance": guidance}
    asked = {key: value for key, value in asked.items() if value is not None}
    with working("painting"), worn(handle, patches):
        outcomes = target(prompts, seed=seed, **asked)
    paths = [save(outcome, output, i) for i, outcome in enumerate(outcomes)]
    if json:
        emit([_row(outcome, path) for outcome, path in zip(outcomes, paths, strict=True)])
        return
    for outcome, path in zip(outcomes, paths, strict=True):
        why = "; ".join(v.why or v.by for v in outcome.verdicts if v.flagged is not False)
        say(f"[green]{path}[/]" if path else f"[yellow]refused[/] {outcome.prompt!r}: {why}")


def save(outcome: Outcome, folder: Path, number: int) -> Path | None:
    """One picture as PNG; None if it was refused."""
    if outcome.image is None:
        return None
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", outcome.prompt.lower()).strip("-")[:40]
    path = folder / f"{number:03d}-{slug}-{outcome.seed}.png"
    pixels = (outcome.image.float().clamp(0, 1) * 255).round().byte()
    Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(path)
    return path


def _row(outcome: Outcome, path: Path | None) -> dict[str, object]:
    return {
        "prompt": outcome.prompt,
        "seed": outcome.seed,
        "image": str(path) if path else None,
        "verdicts": [vars(verdict) for verdict in outcome.verdicts],
    }
