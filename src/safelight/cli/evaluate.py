"""`safelight evaluate MODEL`: paint, judge, measure; one run folder."""

from __future__ import annotations

import json as reader
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from safelight.cli import sets
from safelight.cli.console import Json, complain, emit, out, say, working
from safelight.cli.patches import load_patches
from safelight.errors import BadInput, unknown
from safelight.names import table

VIOLATED = 1


def evaluate(
    model: Annotated[str, typer.Argument(help="A built-in name, a diffusers folder or a hub id.")],
    prompts: Annotated[
        list[str], typer.Option(help="A prompt set or file, repeatable.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The run folder.")],
    patch: Annotated[list[Path] | None, typer.Option(help="A patch folder, repeatable.")] = None,
    guard: Annotated[
        list[str] | None, typer.Option(help="A guard, NAME or NAME:key=value, repeatable.")
    ] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(help="An attack, NAME or NAME:key=value,budget.steps=100, repeatable."),
    ] = None,
    attack_judge: Annotated[
        str, typer.Option(help="Who looks at pictures for attacks; must not also report.")
    ] = "emoji",
    transfer: Annotated[
        bool, typer.Option("--transfer", help="Attacks search on the untouched model.")
    ] = False,
    judge: Annotated[
        list[str] | None,
        typer.Option(help="Who looks at the pictures, NAME or NAME:key=value. [default: emoji-b]"),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds per prompt, such as 0-3.")] = "0",
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most this many prompts of each set.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="A run whose pictures of the untouched model to reuse.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Strength of guidance.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 16,
    fail_under: Annotated[
        list[str] | None,
        typer.Option(metavar="METRIC=VALUE", help="Leave with code 1 if a figure is lower."),
    ] = None,
    fail_over: Annotated[
        list[str] | None,
        typer.Option(metavar="METRIC=VALUE", help="Leave with code 1 if a figure is higher."),
    ] = None,
    json: Json = False,
) -> None:
    """Measure a model before and after patches and guards; an interrupted run resumes."""
    limits = [limit_of(text, False) for text in fail_under or []]
    limits += [limit_of(text, True) for text in fail_over or []]
    numbers = sets.seeds(seeds)
    for kind, names in (("judge", [*(judge or []), attack_judge]), ("attack", attack or [])):
        for name in names:
            name = name.partition(":")[0]
            if name not in table(kind):
                raise BadInput(unknown(kind, name, table(kind)))
    chosen = [sets.PromptSet.load(name) for name in sets.words(prompts)]
    if limit is not None:
        chosen = [one.take(limit) for one in chosen]
    with working("loading torch"):
        from safelight.bench.attacked import LOOKS
        from safelight.bench.run import evaluate as run
        from safelight.cli import attacks as searches
        from safelight.cli import guards as named
        from safelight.models.load import load

        patches = load_patches(patch or [])
    with working(f"loading {model}"):
        handle = load(model)
        judges = [named.judge(name) for name in judge or ["emoji-b"]]
        given_guards = named.guards(guard or [])
        given_attacks = searches.attacks(attack or [])
        looks = any(one.access in LOOKS for one in given_attacks.values())
    run(
        handle,
        chosen,
        patches=patches,
        guards=given_guards,
        judges=judges,
        out=output,
        seeds=numbers,
        base=base,
        sampling=sampling(handle, steps, guidance),
        batch=batch,
        attacks=given_attacks,
        attack_judge=named.judge(attack_judge) if looks else None,
        transfer=transfer,
    )
    values = read_values(output)
    if json:
        emit({"run": str(output), "values": values})
    else:
        print_values(values)
        say(f"run [bold]{output}[/]; next: safelight report {output}")
    broken = [text for one in limits for text in one.broken(values)]
    if broken:
        raise complain("; ".join(broken), VIOLATED)


def sampling(model: Any, steps: int | None, guidance: float | None) -> Any:
    """The model's own sampling with what the user asked for instead."""
    from dataclasses import replace

    asked = {"steps": steps, "guidance": guidance}
    return replace(model.sampling, **{k: v for k, v in asked.items() if v is not None})


def read_values(run: Path) -> list[dict[str, Any]]:
    """The figures of a run."""
    return reader.loads((run / "values.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Limit:
    """A threshold on a metric, of one prompt set or of all."""

    metric: str
    prompts: str
    value: float
    above: bool  # True: a higher figure violates it

    def broken(self, values: list[dict[str, Any]]) -> list[str]:
        """What violates it; a figure that could not be measured does."""
        rows = [row for row in values if self._meant(row)]
        if not rows:
            known = {row["metric"] for row in values}
            raise BadInput(unknown("metric", self.metric, known))
        measured = [row for row in rows if row["n"] and _number(row["value"])]
        if not measured:
            return [f"{self.metric} could not be measured on these prompts"]
        sign = "above" if self.above else "under"
        return [
            f"{self.metric} is {row['value']:.4g} on {row.get('prompts')} (n = {row['n']}), "
            f"{sign} {self.value:g}"
            for row in measured
            if (row["value"] > self.value if self.above else row["value"] < self.value)
        ]

    def _meant(self, row: dict[str, Any]) -> bool:
        protected = row.get("arm") != "base"
        return (
            protected and row["metric"] == self.metric and self.prompts in ("", row.get("prompts"))
        )


def limit_of(text: str, above: bool) -> Limit:
    """ "nrr=0.95" or "nrr@emoji/weapons/test=0.95"."""
    name, equals, number = text.rpartition("=")
    metric, _, prompts = name.partition("@")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not equals or not metric or math.isnan(value):
        raise BadInput(f"{text}: write a threshold as metric=value, for example nrr=0.95.")
    return Limit(metric, prompts, value, above)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def print_values(values: list[dict[str, Any]]) -> None:
    """One row per figure, a block per prompt set; the judge is named once if there is only one."""
    from rich.table import Table

    judges = {row["judge"] for row in values if row.get("judge")}
    judged: tuple[str, ...] = ("judge",) if len(judges) > 1 else ()
    if any(row.get("attack", "replay") != "replay" for row in values):
        judged = ("attack", *judged)
    grid = Table(title=None if len(judges) > 1 else f"judge {judges.pop()}" if judges else None)
    grid.add_column("metric", no_wrap=True)
    for column in ("arm", *judged):
        grid.add_column(column, no_wrap=True)
    grid.add_column("value", justify="right", no_wrap=True)
    grid.add_column("95 % interval", justify="right", no_wrap=True)
    grid.add_column("n", justify="right")
    grid.add_column("skipped", justify="right")
    block = None
    for row in values:
        if row.get("prompts") != block:
            block = row.get("prompts")
            grid.add_section()
            grid.add_row(f"[bold]{block}[/]")
        names = (str(row.get(key) or "") for key in ("arm", *judged))
        value, low, high = (
            f"{row[key]:.3f}" if _number(row[key]) else "-" for key in ("value", "low", "high")
        )
        skipped = str(row.get("skipped") or "")
        grid.add_row(row["metric"], *names, value, f"{low} .. {high}", str(row["n"]), skipped)
    out().print(grid)
