"""`safelight align METHOD MODEL`: learn a patch, or a guard, that makes a model safer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safelight.cards import entry
from safelight.cli import sets
from safelight.cli.console import Json, emit, out, say, training_bar, working
from safelight.cli.settings import build
from safelight.errors import BadInput
from safelight.names import learner, table

if TYPE_CHECKING:
    from safelight.guard.trained import TrainedGuard
    from safelight.models.patch import Patch
    from safelight.training.checkpoint import Checkpoint
    from safelight.training.descent import Watch

PAIRS = "pairs of pictures"  # what the card of a method that learns from them says it needs


def align(
    method: Annotated[
        str, typer.Argument(help="A method from `safelight list align`, or a guard that learns.")
    ],
    model: Annotated[str, typer.Argument(help="A built-in name, a diffusers folder or a hub id.")],
    unsafe: Annotated[
        list[str] | None,
        typer.Option(
            help="What to remove: categories such as weapons,gore, 'all', or a prompt file. "
            "Required, unless --set concepts=FILE.csv says it.",
            show_default=False,
        ),
    ] = None,
    safe: Annotated[
        list[str] | None,
        typer.Option(help="What must stay: a prompt set or file. [default: emoji/safe/train]"),
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(
            help="A folder of pairs of pictures, for methods that learn from those.",
            show_default=False,
        ),
    ] = None,
    category: Annotated[
        list[str] | None,
        typer.Option(help="Of --pairs: only these categories. [default: all]"),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of the method, repeatable."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The patch or guard folder to write.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of every random choice.")] = 0,
    force: Annotated[bool, typer.Option(help="Replace an existing patch.")] = False,
    tensorboard: Annotated[
        Path | None,
        typer.Option(
            help="A folder for TensorBoard's files: loss terms by step.", show_default=False
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Learn what makes a model safer, a patch or a guard, and save it as a folder."""
    _require_kind_of_data(method, pairs, category, unsafe, safe)
    if pairs is None:
        listed = any(pair.partition("=")[0].strip() == "concepts" for pair in set_ or [])
        names, data = _prompts(unsafe or [], safe or [], listed)
    else:
        names, data = _pairs(pairs, sets.words(category or []))
    path = output or Path("-".join([method, *names]))
    if path.exists() and not force:
        raise BadInput(f"{path} exists; name another folder with -o, or replace it with --force.")
    learnt, checkpoint = learn(method, model, data, set_ or [], seed, path, tensorboard)
    if checkpoint is None:  # another process saves what all have learnt
        return
    learnt.save(path)
    checkpoint.remove()
    kind, settings, info = _about(learnt)
    if json:
        emit({kind: str(path), "method": method, "settings": settings, **info})
    else:
        _print(method, info)
        say(f"saved [bold]{path}[/]; next: safelight evaluate {model} --{kind} {path} ...")


def learn(
    method: str,
    name: str,
    data: Callable[[], Any],
    pairs: list[str],
    seed: int,
    path: Path,
    curves: Path | None = None,
) -> tuple[Patch | TrainedGuard, Checkpoint | None]:
    """Load, fit, with a progress bar; go on where the same command was killed.

    Returns:
        What was learnt, and the checkpoint beside `path`: for the one process that is to save both.
    """
    with working("loading torch"):
        settings = build(learner(method), pairs)
        from safelight.models.load import load
        from safelight.training.checkpoint import Checkpoint
        from safelight.training.team import Team

        first = Team.here().index == 0
    with working(f"loading {name}"):
        model, given = load(name), data()
    checkpoint = Checkpoint(path.with_name(f".{path.name}.training"))
    if not first:
        return settings.fit(model, given, seed=seed, checkpoint=checkpoint), None
    if checkpoint.path.is_file():
        say(f"{checkpoint.path} says how far a run has come; if it was this one, it goes on")
    with training_bar(method) as bar, _drawn(curves, bar) as watch:
        learnt = settings.fit(model, given, seed=seed, watch=watch, checkpoint=checkpoint)
    return learnt, checkpoint


def _drawn(folder: Path | None, bar: Watch) -> AbstractContextManager[Watch]:
    """The progress bar, and TensorBoard beside it if it is wanted."""
    if folder is None:
        return nullcontext(bar)
    from safelight.training.board import board

    return board(folder, also=bar)


def _prompts(
    unsafe: list[str], safe: list[str], listed: bool
) -> tuple[list[str], Callable[[], Any]]:
    """Short names of what is removed, and the data of methods that learn from prompts."""
    unsafe_sets = [] if listed and not unsafe else sets.unsafe(unsafe)
    safe_sets = sets.safe(safe, unsafe_sets)

    def data() -> Any:
        from safelight.align.base import TextData

        return TextData(safe=safe_sets, unsafe=unsafe_sets)

    return [_short(one.name) for one in unsafe_sets] or ["concepts"], data


def _pairs(folder: Path, categories: list[str]) -> tuple[list[str], Callable[[], Any]]:
    """The same for methods that learn from pairs of pictures."""

    def data() -> Any:
        from safelight.training.twins import Twins

        found = Twins.load(folder)
        return found.only(*categories) if categories else found

    return categories or [folder.name], data


def _require_kind_of_data(
    method: str, pairs: Path | None, category: list[str] | None, *prompts: list[str] | None
) -> None:
    """Pairs for methods that learn from pictures, prompts for those that learn from texts."""
    known = table("align")
    wanted = method in known and PAIRS in _needs(method)
    if wanted and (pairs is None or any(prompts)):
        raise BadInput(
            f"{method} learns from pairs of pictures: give --pairs FOLDER and neither --unsafe nor "
            "--safe. `safelight synthesize pairs` makes such a folder."
        )
    if pairs is not None and not wanted and method in {**known, **table("guard")}:
        raise BadInput(f"{method} learns from prompts: give --unsafe ..., not --pairs.")
    if category and pairs is None:
        raise BadInput("--category chooses from --pairs; prompts are chosen with --unsafe.")


def _needs(method: str) -> tuple[str, ...]:
    card = entry("align", method).card
    return card.needs if card else ()


def _short(name: str) -> str:
    parts = name.split("/")
    return parts[1] if len(parts) == 3 else Path(name).stem


def _about(learnt: Any) -> tuple[str, Any, Any]:
    """What it is, its settings, and how it was learnt."""
    if hasattr(learnt, "fitted_"):
        return "guard", dataclasses.asdict(learnt), learnt.fitted_.info
    return "patch", learnt.settings, learnt.info


def _print(method: str, info: Mapping[str, Any]) -> None:
    """Held-out figures before and after; a method's own terms go by their own names."""
    from rich.table import Table

    first, *_ = info["pareto"]
    kept = next(p for p in info["pareto"] if p["epoch"] == info["stopped"]["kept_epoch"])
    what = "held-out prompts"
    if "categories" in info:
        what = "held-out pairs" if "split" in info else "its concepts"
    grid = Table(title=f"{method} on {what}", title_justify="left")
    for column in ("", "before", "after"):
        grid.add_column(column, justify="left" if not column else "right")
    words = {
        "cosine": "unsafe prompts: |cos| to where they were",
        "drift": "safe prompts: relative drift",
        "L_u": "L_u (hold safe)",
        "L_e": "L_e (move unsafe)",
        "L_a": "L_a (unsafe to its anchor)",
        "L_s": "L_s (hold safe)",
        "L_n": 'L_n (concept to "")',
        "L_0": 'L_0 (hold "")',
        "win": "safe pictures: error above the reference's",
        "lose": "unsafe pictures: error above the reference's",
        "accuracy": "pairs told apart",
        "L_ESP": "L_ESP (spread of safe prompts)",
        "L_LSA": "L_LSA (structure of safe prompts)",
    }
    if "L_s" in kept:  # DES calls L_u what SafeText calls L_e
        words["L_u"] = "L_u (move unsafe)"
    shown = [key for key in kept if key not in ("epoch", "lam")]
    for key in sorted(shown, key=lambda key: [*words, key].index(key)):
        grid.add_row(words.get(key, key), f"{first[key]:.3f}", f"{kept[key]:.3f}")
    for text, figure in _geometry(info):
        grid.add_row(text, "1.000", figure)
    out().print(grid)
    if info.get("untouched"):
        say(
            f"trained {', '.join(info['encoders'])} only; {', '.join(info['untouched'])} is as it "
            "was, and unsafe prompts still reach the denoiser through it"
        )
    cost = info["cost"]
    say(
        f"{cost['parameters']:,} parameters in {cost['seconds']:.1f} s; kept epoch "
        f"{kept['epoch']} ({info['stopped']['why']})"
    )


def _geometry(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is left of how held-out safe prompts lie to each other."""
    seen = info.get("geometry", {})
    words = {
        "spread_ratio": "safe prompts: spread, against before",
        "jaccard": f"safe prompts: same {seen.get('k')} neighbours",
    }
    return [(text, f"{seen[key]:.3f}") for key, text in words.items() if seen.get(key) is not None]
