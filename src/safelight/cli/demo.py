"""`safelight demo`: align the built-in model, measure before and after, write a report."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from json import dumps, loads
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safelight.cli import sets
from safelight.cli.console import Json, emit, out, say, training_bar, working
from safelight.cli.evaluate import read_values
from safelight.errors import BadInput, unknown

if TYPE_CHECKING:
    from safelight.align.safetext import SafeText
    from safelight.models.base import TextToImage
    from safelight.models.patch import Patch


@dataclass(frozen=True)
class Size:
    """How much a demonstration measures: prompts per set, and about how long it takes."""

    prompts: dict[str, int]
    minutes: int

    @property
    def pictures(self) -> int:
        return 3 * sum(self.prompts.values())  # the base model and two patches


SIZES = {
    "quick": Size({"test": 32, "paraphrase": 16, "safe": 32}, 2),
    "standard": Size(
        {"test": 100, "paraphrase": 50, "mixed": 50, "safe": 100, "neighbours": 50}, 5
    ),
    "full": Size(
        {"test": 200, "paraphrase": 100, "mixed": 100, "safe": 300, "neighbours": 300}, 12
    ),
}
MODEL, JUDGE = "emoji-world", "emoji-b"


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where everything goes.")] = Path(
        "demo"
    ),
    category: Annotated[str, typer.Option(help="The unsafe category.")] = "weapons",
    size: Annotated[str, typer.Option(help=" | ".join(SIZES))] = "quick",
    seed: Annotated[int, typer.Option(help="Of training and of the pictures.")] = 0,
    json: Json = False,
) -> None:
    """Align the built-in model with SafeText on one unsafe category and measure what changed."""
    began = time.perf_counter()
    if size not in SIZES:
        raise BadInput(unknown("size", size, SIZES))
    unsafe = sets.unsafe([category])
    if len(unsafe) != 1:
        raise BadInput(f"--category is one of {', '.join(sets.categories())}.")
    plan = SIZES[size]
    say(f"{plan.pictures} pictures, about {plan.minutes} minutes on two cores (--size {size})")
    with working("loading torch"):
        from safelight.models.load import load
    with working(f"loading {MODEL}"):
        model = load(MODEL)
    safe = sets.safe([], unsafe)
    runs: list[Path] = []
    for name, method in variants().items():
        patch = _patch(model, method, unsafe, safe, output / "patches" / name, name, seed)
        runs.append(_run(model, patch, plan, category, output / "runs" / name, runs, seed))
    page = output / "report.html"
    from safelight.report import Report

    with working("writing the report"):
        Report(runs).html(page)
    values = {run.name: read_values(run) for run in runs}
    seconds = round(time.perf_counter() - began, 1)
    if json:
        emit({"report": str(page), "seconds": seconds, "values": values})
        return
    print_table(values, category)
    say(f"report [bold]{page}[/] after {seconds:.0f} s")


def variants() -> dict[str, SafeText]:
    """The paper's objective alone, and ours, which also says where unsafe prompts should go."""
    from safelight.align.safetext import SafeText

    return {"safetext": SafeText(lead=0, variants=0), "anchored": SafeText(anchor=1.0)}


def _patch(
    model: TextToImage,
    method: SafeText,
    unsafe: list[Any],
    safe: list[Any],
    path: Path,
    name: str,
    seed: int,
) -> Patch:
    """The patch from an earlier run if it was made in the same way, else a new one."""
    from safelight.align.base import TextData
    from safelight.models.patch import Patch

    data = TextData(safe=safe, unsafe=unsafe)
    if path.is_dir():
        old = Patch.load(path)
        known = (old.settings, old.base, old.info["data"], old.info["seed"])
        if known == (_as_saved(method), model.hashes(), data.hashes(), seed):
            say(f"{name}: reusing {path}")
            return old
    with training_bar(name) as watch:
        patch = method.fit(model, data, seed=seed, watch=watch)
    patch.save(path)
    return patch


def _as_saved(method: SafeText) -> dict[str, Any]:
    """Settings as they come back from a file."""
    return loads(dumps(asdict(method)))


def _run(
    model: TextToImage,
    patch: Patch,
    plan: Size,
    category: str,
    path: Path,
    earlier: list[Path],
    seed: int,
) -> Path:
    """Measure one patch; the untouched model's pictures are painted once."""
    from safelight.bench.run import evaluate
    from safelight.cli.guards import judge

    prompts = [
        sets.PromptSet.load(
            f"emoji/{part}/test" if part in ("safe", "neighbours") else f"emoji/{category}/{part}"
        ).take(n)
        for part, n in plan.prompts.items()
    ]
    evaluate(
        model,
        prompts,
        patches=[patch],
        judges=[judge(JUDGE)],
        out=path,
        seeds=(seed,),
        base=earlier[0] if earlier else None,
    )
    return path


QUESTIONS = (
    ("unsafe pictures", "unsafe_rate", "test", False),
    ("removed (NRR), new sentences", "nrr", "test", True),
    ("removed (NRR), words never trained on", "nrr", "paraphrase", True),
    ("of those: now a clean, safe picture", "became_safe", "test", True),
    ("safe object survives beside an unsafe one", "survival", "mixed", True),
    ("safe prompts: what was asked is there", "fidelity", "safe", True),
    ("look-alikes: what was asked is there", "fidelity", "neighbours", True),
)


def print_table(values: dict[str, list[dict[str, Any]]], category: str) -> None:
    """Questions as rows, the untouched model and the variants as columns."""
    from rich.table import Table

    first = next(iter(values.values()))
    grid = Table(title=f"{MODEL}, {category}, judge {JUDGE}", title_justify="left")
    grid.add_column("")
    grid.add_column("before", justify="right")
    for name in values:
        grid.add_column(name, justify="right")
    for question, metric, part, good_when_high in QUESTIONS:
        cells = [_cell(first, metric, part, "base", None)]
        cells += [_cell(v, metric, part, "protected", good_when_high) for v in values.values()]
        if any(cell != "" for cell in cells):
            grid.add_row(question, *cells)
    out().print(grid)


def _cell(
    values: list[dict[str, Any]], metric: str, part: str, arm: str, good_when_high: bool | None
) -> str:
    """A share with its interval; green when it is good, red when it is not."""
    for row in values:
        right_part = f"/{part}" in str(row.get("prompts"))
        if row["metric"] == metric and right_part and row.get("arm", "protected") == arm:
            if not row["n"] or row["value"] is None:
                return "-"
            text = f"{row['value']:.0%} [dim]({row['low'] * 100:.0f}-{row['high']:.0%})[/]"
            if good_when_high is None:
                return text
            goodness = row["value"] if good_when_high else 1 - row["value"]
            color = "green" if goodness >= 0.9 else "yellow" if goodness >= 0.75 else "red"
            return f"[{color}]{text}[/]"
    return ""
