"""One page from several runs: everything inside one file, no network, no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

import safelight
from safelight.errors import WorkFailed
from safelight.report import charts, pictures, summary, tokens, words
from safelight.report.commands import commands
from safelight.report.run import Run, read_all


@dataclass(frozen=True)
class Report:
    """A page about one or several runs.

    Args:
        runs: Run folders, in the order in which they should appear.

    Example:
        Report(["runs/base", "runs/safetext"]).html("report.html")
    """

    runs: Sequence[Path | str | os.PathLike[str]]

    def html(self, path: Path | str) -> None:
        """Write the page.

        Raises:
            NotFound: A folder holds no run.
            BadInput: A run has not finished or is damaged.
            WorkFailed: The page cannot be written.
        """
        text = render(read_all([Path(run) for run in self.runs]))
        try:
            Path(path).write_text(text, encoding="utf-8")
        except OSError as error:
            raise WorkFailed(f"could not write {path}: {error.strerror or error}.") from error


def render(runs: Sequence[Run]) -> str:
    """The page's text."""
    return page("report.html.j2", _content(runs))


def page(template: str, content: Mapping[str, Any], *scripts: str) -> str:
    """A template with the style, scripts and drawing macros that all pages share."""
    templates = files("safelight.report") / "templates"

    def text(name: str) -> str:
        return (templates / name).read_text(encoding="utf-8")

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"share": words.share, "thing": words.thing}
    environment.globals |= {"words": words, "kinds": pictures.KINDS, "colors": charts.COLORS}
    return environment.from_string(text("macros.html.j2") + text(template)).render(
        **content,
        version=safelight.__version__,
        style=Markup(text("style.css")),
        script=Markup("\n".join(text(name) for name in ("script.js", *scripts))),
        icon=_icon(),
    )


def _content(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything the template prints."""
    judges = summary.judges(runs)
    return {
        "runs": runs,
        "judges": judges,
        "judge": judges[0],
        "title": _title(runs),
        "models": list(dict.fromkeys(run.settings["model"]["name"] for run in runs)),
        "shown": sum(record.image is not None for run in runs for record in run.records),
        "headlines": summary.headlines(runs),
        "blocks": summary.blocks(runs, judges[0]),
        "others": [block for judge in judges[1:] for block in summary.blocks(runs, judge)],
        "prices": {run.label: summary.cost(run) for run in runs},
        "bars": summary.bars(runs, judges[0]),
        "trade_offs": charts.trade_offs(runs, judges[0]),
        "galleries": pictures.galleries(runs, judges[0]),
        "training": charts.training(runs),
        "pareto": charts.pareto(runs),
        "claims": summary.claims(runs),
        "everything": summary.everything(runs),
        "unjudged": [(judge, summary.unjudged(runs, judge)) for judge in judges],
        "commands": {run.label: commands(run) for run in runs},
        "meanings": _meanings(runs),
        "attacks": summary.attacks(runs, judges[0]),
        "explained_prompts": _explained(runs),
    }


def _explained(runs: Sequence[Run]) -> list[tuple[Run, str, list[list[tokens.Line]]]]:
    """For each run and prompt set, a few prompts with the token scores of the run's guards."""
    found = []
    for run in runs:
        for one in dict.fromkeys(row["prompts"] for row in run.tokens):
            rows = [row for row in run.tokens if row["prompts"] == one]
            found.append((run, one, list(tokens.by_prompt(rows).values())))
    return found


def _title(runs: Sequence[Run]) -> str:
    """What the page is about: the unsafe categories."""
    found = [category for category in summary.categories(runs) if category]
    if not found:
        return "Safety report"
    if len(found) > 3:
        return f"Safety report: {len(found)} unsafe categories"
    return f"Safety report: {', '.join(found)}"


def _meanings(runs: Sequence[Run]) -> list[tuple[str, str]]:
    names = dict.fromkeys(row["metric"] for run in runs for row in run.values)
    return [(words.metric_title(name), words.metric_meaning(name)) for name in names]


def _icon() -> str:
    """The page's own icon, so that a browser does not ask a server for one."""
    lamp = (
        "%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 32 32'%3E%3Ccircle cx='16' "
        "cy='16' r='14' fill='%231c1412'/%3E%3Ccircle cx='16' cy='16' r='8' "
        "fill='%23e5482d'/%3E%3C/svg%3E"
    )
    return f"data:image/svg+xml,{lamp}"
