"""The tables of `docs/results.md`, from run folders: figures down, runs across.

python docs/tables.py runs/standard/runs/*
python docs/tables.py runs/all --by category
python docs/tables.py --bench bench/emoji-standard
python docs/tables.py --bench --turned bench/emoji-text-side   (rows down, as short as possible)

Of a bench: unsafe pictures by row and column, bold where an attack finds significantly more than
the same prompts as they are; below, what benign prompts lost, and seconds per cell.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safelight.report.leaderboard import Board, Cell, read

FIGURES = {  # (metric, last part of the prompt set) -> how it is called
    ("unsafe_rate", "test"): "unsafe pictures, `test`",
    ("unsafe_rate", "paraphrase"): "unsafe pictures, `paraphrase`",
    ("nrr", "test"): "NRR, `test`",
    ("nrr", "paraphrase"): "NRR, `paraphrase`",
    ("became_safe", "test"): "became a clean, safe picture, `test`",
    ("became_other", "test"): "became another unsafe category, `test`",
    ("became_broken", "test"): "became unrecognisable, `test`",
    ("fidelity", "safe"): "fidelity, `emoji/safe`",
    ("fidelity_drop", "safe"): "fidelity drop, `emoji/safe`",
    ("fidelity", "neighbours"): "fidelity, `emoji/neighbours`",
    ("fidelity_drop", "neighbours"): "fidelity drop, `emoji/neighbours`",
    ("survival", "mixed"): "safe object survives, `mixed`",
    ("drift", "safe"): "drift, `emoji/safe`",
}
Row = dict[str, Any]


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("runs", nargs="+", type=Path)
    ask.add_argument("--bench", action="store_true", help="the folder is a bench's")
    ask.add_argument("--turned", action="store_true", help="of a bench: its rows down")
    ask.add_argument("--judge", default="emoji-b")
    ask.add_argument("--by", choices=("run", "category"), default="run", help="the columns")
    given = ask.parse_args()
    if given.bench:
        for folder in given.runs:
            print(turned(folder) if given.turned else bench(folder))
        return
    runs = {run.name: _values(run, given.judge) for run in given.runs}
    if given.by == "category":
        ((_, rows),) = runs.items()
        parts: dict[str, list[Row]] = {}
        for row in rows:
            parts.setdefault(_parts(row)[1], []).append(row)
        benign = parts.pop("safe", []) + parts.pop("neighbours", [])
        print(table(dict(sorted(parts.items()))))
        print(table({"base": benign, "protected": benign}))
    else:
        first = next(iter(runs.values()))
        print(table({"base": first, **runs}))


def table(columns: dict[str, list[Row]]) -> str:
    """Markdown, one line per figure that any column has."""
    lines = [f"| figure | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for (metric, kind), label in FIGURES.items():
        cells = [_cell(rows, metric, kind, name) for name, rows in columns.items()]
        if any(cell != "–" for cell in cells):
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def bench(folder: Path) -> str:
    """Markdown, one line per column of the bench, one column per row of it."""
    board = read(folder)
    names = [row["name"] for row in board.rows]
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for kind, said in (("unsafe pictures, ", _unsafe), ("", _kept), ("seconds, ", _seconds)):
        for column in board.columns:
            cells = [said(board, board.cells[name, column["name"]]) for name in names]
            if any(cells):
                shown = " | ".join(cell or "–" for cell in cells)
                lines.append(f"| {kind}{_called(column)} | {shown} |")
    return "\n".join(lines) + "\n"


def turned(folder: Path) -> str:
    """Markdown, one line per row of the bench: unsafe pictures, what is kept, seconds."""
    board = read(folder)
    kinds = (("unsafe pictures", _unsafe), ("kept", _kept), ("seconds", _seconds))
    return "\n".join(_turned(board, title, said) for title, said in kinds)


def _turned(board: Board, title: str, said: Callable[[Board, Cell], str]) -> str:
    cells = {
        (row["name"], column["name"]): said(board, board.cells[row["name"], column["name"]])
        for row in board.rows
        for column in board.columns
    }
    columns = [c for c in board.columns if any(cells[r["name"], c["name"]] for r in board.rows)]
    if not columns:
        return ""
    lines = [f"| {title} | {' | '.join(_called(c) for c in columns)} |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for row in board.rows:
        shown = (cells[row["name"], c["name"]] or "–" for c in columns)
        lines.append(f"| {row['name']} | {' | '.join(map(_short, shown))} |")
    return "\n".join(lines) + "\n"


def _short(said: str) -> str:
    """Whole per cent, and no n: every cell of a column has the same."""
    said = re.sub(r", n =? ?\d+", "", said)
    return re.sub(r"(-?\d+)\.(\d)%", lambda m: f"{round(float(m[1] + '.' + m[2]))}%", said)


def _called(column: Row) -> str:
    label = f"`{column['attack']['label']}`" if column["attack"] else "replay"
    return f"{column['prompts']} / {label}"


def _unsafe(board: Board, cell: Cell) -> str:
    if not cell.unsafe:
        return ""
    lift = board.lift(cell)
    said = _said(cell.unsafe)
    return f"**{said}**" if lift and lift.low > 0 else said


def _kept(board: Board, cell: Cell) -> str:
    """Fidelity and its drop, or NRR, of prompts as they are."""
    if cell.column["attack"] or not cell.run:
        return ""
    names = ("nrr",) if cell.column["categories"] else ("fidelity", "fidelity_drop")
    found = [(name, cell.figure(name)) for name in names]
    return "; ".join(f"{name.replace('_', ' ')} {_said(row)}" for name, row in found if row)


def _seconds(board: Board, cell: Cell) -> str:
    if not cell.column["attack"] or not cell.run:
        return ""
    path = cell.run.folder.parent / "cell.json"
    return f"{json.loads(path.read_text(encoding='utf-8')).get('seconds', 0):.0f}"


def _cell(rows: Iterable[Row], metric: str, kind: str, column: str) -> str:
    arm = "base" if column == "base" else "protected"
    for row in rows:
        if row["metric"] == metric and kind in _parts(row) and row["arm"] == arm:
            return _said(row)
    return "–"


def _parts(row: Row) -> list[str]:
    """emoji/weapons/test[:100] -> emoji, weapons, test"""
    return row["prompts"].partition("[")[0].split("/")


def _said(row: Row) -> str:
    if row["metric"] == "drift":
        return f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}], n = {row['n']}"
    return f"{row['value']:.1%} [{row['low']:.1%}, {row['high']:.1%}], n = {row['n']}"


def _values(run: Path, judge: str) -> list[Row]:
    rows = json.loads((run / "values.json").read_text(encoding="utf-8"))
    return [row for row in rows if row["judge"] == judge]


if __name__ == "__main__":
    main()
