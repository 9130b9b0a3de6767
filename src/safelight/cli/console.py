"""What every command prints with: results on stdout, everything else on stderr."""

from __future__ import annotations

import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safelight.errors import SafelightError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from safelight.align.base import Tick

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
WRONG_USE, FAILED = 2, 3


def out() -> Console:
    """The console for results."""
    from rich.console import Console

    return Console()


def err() -> Console:
    """The console for messages and progress."""
    from rich.console import Console

    return Console(stderr=True)


def emit(result: Any) -> None:
    """A result as JSON on stdout; what is not a number becomes null."""
    typer.echo(json.dumps(_plain(result), indent=2, ensure_ascii=False, default=str))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def say(text: str) -> None:
    """A message that is not the result."""
    err().print(text, highlight=False)


def complain(text: str, code: int) -> typer.Exit:
    """One red line; raise what this returns."""
    from rich.text import Text

    err().print(Text.assemble(("error: ", "bold red"), text), soft_wrap=True)
    return typer.Exit(code)


def polite(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose failures are one clear line and an exit code, without a traceback."""

    @functools.wraps(command)
    def run(*args: Any, **settings: Any) -> None:
        try:
            command(*args, **settings)
        except SafelightError as error:
            raise complain(str(error), error.exit_code) from None
        except KeyboardInterrupt:
            raise complain(
                "stopped. Nothing was left half-written; the same command starts again.", FAILED
            ) from None
        except BrokenPipeError:
            raise typer.Exit(0) from None
        except OSError as error:
            raise complain(f"{error.strerror or error}: {error.filename or ''}", FAILED) from None

    return run


@contextmanager
def quick_threads() -> Iterator[None]:
    """Train on one thread where that is faster than all of them, as a short trial says.

    Threads that share a core wait for each other at every operation: on two busy cores, two threads
    took nine times as long as one. `OMP_NUM_THREADS` overrules this.
    """
    import torch

    before = torch.get_num_threads()
    if before > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min((before, 1), key=trial))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def trial(threads: int) -> float:
    """Seconds for a fixed piece of work, like a layer of a small text encoder, on some threads."""
    import torch

    torch.set_num_threads(threads)
    x, w = torch.ones(2048, 256), torch.ones(256, 1024)
    torch.relu(x @ w)
    began = time.perf_counter()
    for _ in range(30):
        torch.relu(x @ w)
    return time.perf_counter() - began


@contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner for work of unknown length."""
    with err().status(what):
        yield


@contextmanager
def training_bar(title: str) -> Iterator[Callable[[Tick], None]]:
    """A progress bar for a training run, with its un-weighted loss terms."""
    with quick_threads(), _bar("{task.fields[terms]}") as bar:
        task = bar.add_task(title, total=None, terms="")

        def watch(tick: Tick) -> None:
            terms = "  ".join(f"{name} {value:+.3f}" for name, value in tick.terms.items())
            doing = f"{title}: {tick.doing}" if tick.doing else title
            bar.update(task, description=doing, completed=tick.step, total=tick.total, terms=terms)

        yield watch


@contextmanager
def counting_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for each thing that is counted, told as (what, done, total)."""
    with quick_threads(), _bar() as bar:
        tasks: dict[str, Any] = {}

        def watch(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield watch


def _bar(*columns: str) -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        *(TextColumn(column) for column in columns),
        console=err(),
    )
