"""A bench as one page: who holds under which attack, at what price. No torch.

All figures are absolute: each comes from its own cell's rows and from nothing else. A row is marked
as unreliable where its plain figures say too little: an attack finds more unsafe pictures than the
plain prompts by more than the suite's margin, or a cell has too few pictures that could be judged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any

from safelight.bench import records
from safelight.cards import entry
from safelight.errors import BadInput, NotFound, WorkFailed
from safelight.flow import Record, Value
from safelight.metric.base import Profile, drop, rate
from safelight.report import charts, page, pictures, summary, words
from safelight.report.run import REPLAY, Row, Run

EVIDENCE = 4  # pictures of a cell
FILE = "leaderboard.json"


@dataclass(frozen=True)
class Leaderboard:
    """A page about a bench.

    Args:
        folder: What `safelight bench` wrote.
    """

    folder: Path | str

    def html(self, path: Path | str) -> None:
        """Write the page.

        Raises:
            NotFound: The folder holds no bench.
            BadInput: Its figures are damaged.
            WorkFailed: The page cannot be written.
        """
        text = page.page("leaderboard.html.j2", content(read(Path(self.folder))), "sort.js")
        try:
            Path(path).write_text(text, encoding="utf-8")
        except OSError as error:
            raise WorkFailed(f"could not write {path}: {error.strerror or error}.") from error


def read(folder: Path) -> Board:
    """A bench's folder."""
    path = folder / FILE
    if not path.is_file():
        raise NotFound(f"{folder} holds no bench: it has no {FILE}.")
    try:
        return Board(folder, json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is damaged: {error}.") from None


@dataclass(frozen=True, eq=False)
class Cell:
    """A row under a column.

    Args:
        row, column: Their entries in `leaderboard.json`.
        state: "done", "error" or "missing".
        reason: Why it failed.
        run: What was painted and judged; None unless done.
        arm: Which of the run's arms it is about.
        judge: Whose figures count.
        base_time: Milliseconds per picture of the untouched model on these prompts, if known.
    """

    row: Row
    column: Row
    state: str
    reason: str
    run: Run | None
    arm: str
    judge: str
    base_time: float | None = None

    @property
    def attack(self) -> str:
        return self.column["attack"]["label"] if self.column["attack"] else REPLAY

    @property
    def is_control(self) -> bool:
        """Whether the attack is a control: what a search has to beat, and no attack itself."""
        return control_of(self.column) is not None

    @cached_property
    def records(self) -> list[Record]:
        """Its rows."""
        if self.run is None:
            return []
        return [r for r in self.run.records if r.arm == self.arm and r.attack == self.attack]

    @property
    def profile(self) -> Profile:
        assert self.run is not None
        return self.run.judges[self.judge]

    def figure(self, metric: str) -> Row | None:
        """One of its figures."""
        for row in self.run.values if self.run else ():
            mine = row["arm"] == self.arm and row.get("attack", REPLAY) == self.attack
            if mine and row["metric"] == metric and row["judge"] in (self.judge, ""):
                return row
        return None

    @property
    def unsafe(self) -> Row | None:
        """The share of unsafe pictures, where any could be judged."""
        row = self.figure("unsafe_rate")
        return row if row and words.number(row["value"]) else None

    @property
    def text(self) -> summary.Cell:
        row = self.figure("unsafe_rate")
        return summary.Cell() if row is None else summary.printed(row)

    @property
    def heat(self) -> str:
        """How much of the warning colour it gets, in per cent."""
        if self.is_control or not self.unsafe:
            return "0%"
        return f"{75 * self.unsafe['value']:.0f}%"


@dataclass(frozen=True, eq=False)
class Board:
    """What a bench measured."""

    folder: Path
    about: Row

    @property
    def rows(self) -> Sequence[Row]:
        return self.about["rows"]

    @property
    def columns(self) -> Sequence[Row]:
        return self.about["columns"]

    @property
    def judge(self) -> str:
        return self.about["judges"][0]

    @cached_property
    def cells(self) -> Mapping[tuple[str, str], Cell]:
        """By row and column."""
        rows = {row["name"]: row for row in self.rows}
        columns = {column["name"]: column for column in self.columns}
        return {
            (one["row"], one["column"]): self._cell(one, rows[one["row"]], columns[one["column"]])
            for one in self.about["cells"]
        }

    def _cell(self, one: Row, row: Row, column: Row) -> Cell:
        run = None
        if one["state"] == "done":
            folder = self.folder / one["run"]
            run = Run(
                folder,
                row["name"],
                _json(folder / "run.json"),
                _json(folder / "values.json"),
                _json(folder / "cost.json") if (folder / "cost.json").exists() else {},
                records.read(folder),
            )
        return Cell(
            row,
            column,
            one["state"],
            one.get("reason", ""),
            run,
            one.get("arm", ""),
            self.judge,
            self._base_time(one),
        )

    def _base_time(self, one: Row) -> float | None:
        """What the shared base run took per picture: no other row needs to be there for it."""
        path = self.folder / one.get("base", "") / "cost.json"
        if "base" not in one or not path.exists():
            return None
        return _json(path).get("arms", {}).get("base", {}).get("ms_per_picture")

    def of(self, row: Row) -> list[Cell]:
        """A row's cells, in the order of the columns."""
        return [self.cells[row["name"], column["name"]] for column in self.columns]

    def replay(self, cell: Cell) -> Cell | None:
        """The same row and prompts without the attack."""
        for column in self.columns:
            if column["label"] == cell.column["label"] and column["attack"] is None:
                return self.cells[cell.row["name"], column["name"]]
        return None

    def controls(self, cell: Cell) -> list[tuple[str, Row, Value | None]]:
        """An attack's controls in the same row: (name, unsafe rate, attack minus control)."""
        found = []
        for column in self.columns:
            name = control_of(column)
            other = self.cells[cell.row["name"], column["name"]]
            if name and other.unsafe and _same_search(cell.column, column):
                found.append((name, other.unsafe, _beyond(cell, other)))
        return found

    def lift(self, cell: Cell) -> Value | None:
        """How many more unsafe pictures an attack finds on the same prompts and noise."""
        plain = self.replay(cell)
        if plain is None or plain.run is None or cell.run is None or cell.attack == REPLAY:
            return None
        before = {(r.prompt_id, r.seed): plain.profile.unsafe(r) for r in plain.records}
        answers = [
            (r.parent, cell.profile.unsafe(r), before[r.parent, r.seed])
            for r in cell.records
            if r.parent is not None and (r.parent, r.seed) in before
        ]
        found = drop(answers)
        return found if found.n else None


def control_of(column: Row) -> str | None:
    """Which control of an attack a column runs; None if it runs the attack itself, or none."""
    name = (column["attack"] or {}).get("settings", {}).get("control", "none")
    return None if name == "none" else name


def _same_search(attack: Row, control: Row) -> bool:
    """Whether a column is the control of another: nothing but `control` differs."""
    if attack["label"] != control["label"] or not attack["attack"] or control_of(attack):
        return False

    def asked(column: Row) -> tuple[Any, ...]:
        method = column["attack"]
        settings = {k: v for k, v in method["settings"].items() if k != "control"}
        return method["name"], settings, method["budget"]

    return asked(attack) == asked(control)


def _beyond(cell: Cell, control: Cell) -> Value | None:
    """The rate of an attack minus that of its control, over the same prompts and noise."""
    there = {(r.parent, r.seed): control.profile.unsafe(r) for r in control.records}
    found = drop(
        (r.parent, cell.profile.unsafe(r), there[r.parent, r.seed])
        for r in cell.records
        if r.parent is not None and (r.parent, r.seed) in there
    )
    return found if found.n else None


@dataclass(frozen=True)
class Line:
    """A row of the leaderboard.

    Args:
        name: The row.
        color: Its colour's number; -1 for what protects nothing.
        cells: (title, printed figure, number to sort by).
        doubts: Why it is unreliable.
    """

    name: str
    color: int
    cells: Sequence[tuple[str, summary.Cell, float | None]]
    doubts: Sequence[str]


TITLES = ("Unsafe, plain prompts", "Unsafe, strongest attack", "Fidelity", "Added per picture",
          "To align")  # fmt: skip


def lines(board: Board) -> list[Line]:
    """One line per row of the suite, its worst cells in front."""
    colors = _colors(board)
    found = []
    for row in board.rows:
        plain = worst(c for c in _unsafe(board, row) if c.attack == REPLAY)
        attacked = worst(c for c in _unsafe(board, row) if c.attack != REPLAY)
        fidelity = _fidelity(board, row)
        added, aligned = _added(board, row), _aligned(board, row)
        cells = [
            _worst_cell(plain),
            _worst_cell(attacked, board),
            (
                summary.Cell() if fidelity is None else summary.printed(fidelity),
                None if fidelity is None else fidelity["value"],
            ),
            (summary.Cell() if added is None else summary.Cell(f"{added:+.1f} ms"), added),
            (summary.Cell(words.seconds(aligned)), aligned),
        ]
        found.append(
            Line(
                row["name"],
                colors[row["name"]],
                [(title, cell, x) for title, (cell, x) in zip(TITLES, cells, strict=True)],
                doubts(board, row),
            )
        )
    return found


def doubts(board: Board, row: Row) -> list[str]:
    """Why a row's plain figures should not be trusted on their own."""
    found = []
    for cell in board.of(row):
        if cell.state == "error":
            found.append(f"{cell.column['name']} failed")
        figure = cell.figure("unsafe_rate")
        if figure is not None and figure["n"] < board.about["minimum"]:
            found.append(
                f"{cell.column['name']}: only {figure['n']} pictures could be judged "
                f"(at least {board.about['minimum']} are asked for)"
            )
        lift = board.lift(cell) if row["protects"] and not cell.is_control else None
        if lift is not None and lift.value > board.about["margin"]:
            found.append(
                f"{cell.column['name']} finds {words.share(lift.value)} points more than the "
                f"plain prompts ({words.share(lift.low)} … {words.share(lift.high)}, n {lift.n})"
            )
    return found


def worst(cells: Any) -> Cell | None:
    """The cell with the highest unsafe rate."""
    judged = [cell for cell in cells if cell.unsafe]
    return max(judged, key=lambda cell: cell.unsafe["value"], default=None)  # type: ignore[index]


def _worst_cell(cell: Cell | None, board: Board | None = None) -> tuple[summary.Cell, float | None]:
    if cell is None or cell.unsafe is None:
        return summary.Cell(), None
    where = words.set_title(cell.column["label"])
    notes = [where if cell.attack == REPLAY else f"{cell.attack}, {where}"]
    notes += [rate for rate, _ in against_controls(board, cell)] if board else []
    return summary.printed(cell.unsafe, notes), cell.unsafe["value"]


def against_controls(board: Board, cell: Cell) -> list[tuple[str, str]]:
    """What stands under an attack's rate: each control's rate, and how far the attack is above."""
    found = []
    for name, figure, above in board.controls(cell):
        more = ""
        if above is not None:
            low, high = words.share(above.low), words.share(above.high)
            more = f"above it: {words.share(above.value)} ({low} … {high})"
        found.append((f"control ({name}): {words.share(figure['value'])} %", more))
    return found


def _unsafe(board: Board, row: Row) -> list[Cell]:
    """Cells about prompts that ask for something unsafe, without controls."""
    asks = any(column["categories"] for column in board.columns)
    return [
        cell
        for cell in board.of(row)
        if (cell.column["categories"] or not asks) and not cell.is_control
    ]


def _fidelity(board: Board, row: Row) -> Row | None:
    for cell in board.of(row):
        if not cell.column["categories"] and cell.attack == REPLAY:
            figure = cell.figure("fidelity")
            if figure and words.number(figure["value"]):
                return figure
    return None


def _added(board: Board, row: Row) -> float | None:
    """Milliseconds per picture more than the untouched model takes, in its base cell.

    A row's base pictures are shared, so its own run has timed the protected arm only.
    """
    own, base = [], []
    for cell in board.of(row):
        if cell.run is None or cell.attack != REPLAY or not row["protects"]:
            continue
        arms = cell.run.cost.get("arms", {})
        mine = arms.get("protected", {}).get("ms_per_picture")
        theirs = cell.base_time
        if words.number(mine) and words.number(theirs):
            own.append(mine)
            base.append(theirs)
    return sum(own) / len(own) - sum(base) / len(base) if own else None


def _aligned(board: Board, row: Row) -> float | None:
    for cell in board.of(row) if row["protects"] else ():
        if cell.run is not None and cell.run.patches:
            spent = [p["info"].get("cost", {}).get("seconds") for p in cell.run.patches]
            known = [x for x in spent if words.number(x)]
            return sum(known) if known else None
    return None


@dataclass(frozen=True)
class Heat:
    """Attacks by defences on one prompt set: (attack, one cell per row of the suite)."""

    prompts: str
    lines: Sequence[tuple[str, Sequence[Cell]]]


def heat(board: Board) -> list[Heat]:
    """The heat map, a block per prompt set that asks for something unsafe."""
    blocks: dict[str, list[tuple[str, list[Cell]]]] = {}
    asks = any(column["categories"] for column in board.columns)
    for column in board.columns:
        if column["categories"] or not asks:
            name = column["attack"]["label"] if column["attack"] else REPLAY
            cells = [board.cells[row["name"], column["name"]] for row in board.rows]
            blocks.setdefault(column["label"], []).append((name, cells))
    return [Heat(words.set_title(prompts), found) for prompts, found in blocks.items()]


def by_category(board: Board) -> tuple[list[str], list[tuple[str, list[list[summary.Cell]]]]]:
    """Per row and category, the plain rate and that of the strongest attack."""
    names = list(dict.fromkeys(c for column in board.columns for c in column["categories"]))
    table = []
    for row in board.rows:
        table.append((row["name"], [_category(board, row, name) for name in names]))
    return names, table


def _category(board: Board, row: Row, category: str) -> list[summary.Cell]:
    groups: dict[str, list[tuple[str, bool | None]]] = {}
    for cell in _unsafe(board, row):
        if cell.run is not None:
            groups.setdefault(cell.attack, []).extend(
                (f"{r.prompts}/{r.prompt_id}", cell.profile.unsafe(r))
                for r in cell.records
                if r.category == category
            )
    rates = {name: rate(answers) for name, answers in groups.items() if answers}
    attacks = {k: v for k, v in rates.items() if k != REPLAY and v.n}
    top = max(attacks, key=lambda name: attacks[name].value, default=None)
    return [
        _printed(rates.get(REPLAY)),
        summary.Cell() if top is None else _printed(attacks[top], [top]),
    ]


def _printed(value: Value | None, notes: Sequence[str] = ()) -> summary.Cell:
    if value is None or not isfinite(value.value):
        return summary.Cell()
    return summary.printed({"metric": "unsafe_rate", **vars(value)}, notes)


def evidence(board: Board) -> list[tuple[str, list[tuple[str, Cell, list[pictures.Strip]]]]]:
    """Pictures of every cell: unsafe ones if there are any, beside those of the plain prompts."""
    found = []
    for row in board.rows:
        cells = [(cell.column["name"], cell, _strips(board, cell)) for cell in board.of(row)]
        found.append((row["name"], cells))
    return found


def _strips(board: Board, cell: Cell) -> list[pictures.Strip]:
    if cell.run is None:
        return []
    shown = sorted((r for r in cell.records if r.image), key=lambda r: (r.prompt_id, r.seed))
    unsafe = [r for r in shown if cell.profile.unsafe(r)]
    plain = board.replay(cell) if cell.attack != REPLAY else None
    before = {(r.prompt_id, r.seed): r for r in plain.records} if plain and plain.run else {}
    strips = []
    keys = [(r.prompt_id, r.seed) for r in unsafe or shown]
    by_key = {(r.prompt_id, r.seed): r for r in shown}
    for key in pictures.evenly(keys, EVIDENCE):
        record, color = by_key[key], _colors(board)[cell.row["name"]]
        tiles = []
        old = before.get((record.parent or "", record.seed))
        if old is not None and plain is not None and plain.run is not None:
            tiles.append(pictures.tile(plain.run, board.judge, color, old, "Plain prompt"))
        tiles.append(pictures.tile(cell.run, board.judge, color, record, cell.attack))
        strips.append(pictures.Strip(record.text, record.prompt_id, record.seed, tiles))
    return strips


def claims(board: Board) -> list[tuple[str, str, str, str, list[summary.Cell]]]:
    """(attack, source, claim, claimed figure, the highest measured rate of every row)."""
    found = []
    used = {
        column["attack"]["label"]: column["attack"]["name"]
        for column in board.columns
        if column["attack"] and not control_of(column)
    }
    for label, name in used.items():
        card = entry("attack", name).card
        measured = []
        for row in board.rows:
            top = worst(cell for cell in board.of(row) if cell.attack == label)
            measured.append(_worst_cell(top)[0])
        for text, x in (card.claims if card else {}).items():
            found.append(
                (label, card.source if card else "", text, f"{words.share(x)} %", measured)
            )
    return found


def content(board: Board) -> dict[str, Any]:
    """Everything the template prints."""
    table = lines(board)
    protected = [row for row in board.rows if row["protects"]]
    # A cell that failed is no defence: a row stands in the plane only if all of its cells do.
    incomplete = [row["name"] for row in protected
                  if not all(cell.unsafe for cell in _unsafe(board, row))]  # fmt: skip
    whole = [row["name"] for row in protected if row["name"] not in incomplete]
    points = []
    costs = []
    for line in table:
        top = worst(_unsafe(board, _row(board, line.name)))
        fidelity = _fidelity(board, _row(board, line.name))
        added = line.cells[3][2]
        if top and top.unsafe and line.name in whole:
            if fidelity:
                points.append((line.name, line.color, fidelity, top.unsafe))
            if added is not None:
                costs.append((line.name, line.color, dict.fromkeys(("low", "value", "high"), added),
                              top.unsafe))  # fmt: skip
    bases = [_fidelity(board, row) for row in board.rows if not row["protects"]]
    base = next((one["value"] for one in bases if one), None)
    drawn = [
        charts.against("Safety against fidelity", points, "fidelity (%)", base=base),
        charts.against("Safety against cost", costs, "added time per picture (ms)", more=False),
    ]
    names, categories = by_category(board)
    return {
        "title": board.about["title"],
        "judge": board.judge,
        "size": board.about["size"],
        "margin": board.about["margin"],
        "minimum": board.about["minimum"],
        "titles": TITLES,
        "lines": table,
        "rows": board.rows,
        "palette": _colors(board),
        "incomplete": incomplete,
        "charts": [chart for chart in drawn if chart],
        "heat": heat(board),
        "controls": {
            (cell.row["name"], cell.column["name"]): against_controls(board, cell)
            for cell in board.cells.values()
        },
        "has_controls": any(cell.is_control for cell in board.cells.values()),
        "categories": names,
        "by_category": categories,
        "evidence": evidence(board),
        "claims": claims(board),
        "method_claims": summary.claims(_runs(board)),
        "errors": [c for c in board.cells.values() if c.state == "error"],
        "missing": sum(c.state == "missing" for c in board.cells.values()),
        "runs": [],
    }


def _runs(board: Board) -> list[Run]:
    """One plain run per protected row, for what its method's authors claim."""
    found = []
    for row in board.rows:
        cells = [c for c in _unsafe(board, row) if c.attack == REPLAY and c.run is not None]
        if row["protects"] and cells and cells[0].run is not None and cells[0].run.patches:
            found.append(cells[0].run)
    return found


def _row(board: Board, name: str) -> Row:
    return next(row for row in board.rows if row["name"] == name)


def _colors(board: Board) -> dict[str, int]:
    """Numbers of colours; -1 for rows that protect nothing."""
    protected = [row["name"] for row in board.rows if row["protects"]]
    return {row["name"]: protected.index(row["name"]) if row["protects"] else -1
            for row in board.rows}  # fmt: skip


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path} is gone; run the bench again.") from None
    except json.JSONDecodeError as error:
        raise BadInput(f"{path} is damaged: {error}.") from None
