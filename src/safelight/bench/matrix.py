"""The bench: every row of a suite under every column, each cell a run folder of its own.

    DIR/suite.json                      what was asked for
    DIR/patches/<row>                   patches that rows made for themselves
    DIR/base/<model>/<set>              the untouched model's pictures, painted once for all rows
    DIR/pictures                        benign pictures that attacks on weights learn from
    DIR/cells/<row>/<column>            one run per cell; `cell.json` says that it is done
    DIR/leaderboard.json                all figures that exist so far

A cell that fails is written down with its reason, and the others go on. A second call does what is
missing or failed. What a cell says depends on its own row and column only, so adding a row changes
no other.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from safelight.attack.base import Attack, Budget
from safelight.bench import attacked
from safelight.bench import records as written
from safelight.bench.attacked import slug
from safelight.bench.figures import before_and_after
from safelight.bench.run import Progress, Run, evaluate
from safelight.bench.suite import Column, Method, Row, Suite
from safelight.errors import BadInput, NotFound, SafelightError, unknown
from safelight.guard.base import Guard
from safelight.guard.trained import TrainedGuard, load_guard
from safelight.judge.base import Judge
from safelight.models.artifact import is_a
from safelight.models.base import Sampling, TextToImage
from safelight.models.patch import Patch
from safelight.names import find, learner
from safelight.prompts import PromptSet

log = logging.getLogger(__name__)
FORMAT = 1
FAILURES = (
    *(SafelightError, RuntimeError, ValueError, TypeError, LookupError, ArithmeticError),
    *(OSError, MemoryError),
)
"""What one cell may die of without stopping the others."""


@dataclass(frozen=True)
class Cell:
    """A row under a column, and where its run is."""

    row: Row
    column: Column
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.row.name} x {self.column.name}"


@dataclass(frozen=True)
class Cost:
    """What a bench is going to do.

    Args:
        cells: How many, and how many of them are done already.
        done: Of these.
        pictures: To be painted, without those that searches ask for.
        searched: Prompts to be searched for.
        minutes: An estimate; None where a picture's time is not known.
        without: Attacks whose search is not in the estimate.
    """

    cells: int
    done: int
    pictures: int
    searched: int
    minutes: float | None
    without: tuple[str, ...] = ()


@dataclass
class Bench:
    """A suite in a folder.

    Args:
        suite: What to measure.
        out: Where everything goes.
        load: How models are loaded by name; `safelight.models.load.load` if None.
        tell: Called with a line about every cell.
        progress: Shown for pictures of a cell.

    Raises:
        BadInput: The folder holds cells of another suite, or settings that methods do not have.
        NotFound: A prompt set or patch that is not there.
    """

    suite: Suite
    out: Path
    load: Callable[[str], TextToImage] | None = None
    tell: Callable[[str], None] = lambda line: None
    progress: bool | Progress = False
    _models: dict[str, TextToImage] = field(default_factory=dict, repr=False)
    _compared: dict[Path, list[dict[str, Any]]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.out = Path(self.out)
        self._check()

    # Before anything is painted

    @property
    def cells(self) -> list[Cell]:
        """Row by row; replays come first, so that there is a picture of everything early."""
        columns = sorted(self.suite.columns, key=lambda column: column.attack is not None)
        return [Cell(row, column, self._folder(row, column)) for column in columns
                for row in self.suite.rows]  # fmt: skip

    def cost(self, seconds: float | None = None) -> Cost:
        """What is still to be done.

        Args:
            seconds: Per picture; None where it is not known.
        """
        cells = self.cells
        todo = [cell for cell in cells if not self._is_done(cell)]
        bases = {self._base_folder(c.row.model, c.column): c.column for c in todo
                 if c.column.attack is None}  # fmt: skip
        pictures = sum(
            self._pictures(column)
            for path, column in bases.items()
            if not (path / "values.json").exists()
        )
        pictures += sum(self._pictures(c.column) for c in todo
                        if c.column.attack or c.row.protects)  # fmt: skip
        searched, spent, without = 0, 0.0, []
        for cell in todo:
            if cell.column.attack is not None:
                n = len(self._prompts(cell.column))
                searched += n
                if cell.column.attack.seconds is None:
                    without.append(cell.column.attack.label)
                spent += n * (cell.column.attack.seconds or 0.0)
        minutes = None if seconds is None else (pictures * seconds + spent) / 60
        return Cost(
            cells=len(cells),
            done=len(cells) - len(todo),
            pictures=pictures,
            searched=searched,
            minutes=minutes,
            without=tuple(dict.fromkeys(without)),
        )

    def probe(self) -> float:
        """Seconds per picture of the first row's model, from one small batch."""
        model = self._model(self.suite.rows[0].model)
        sampling = self._sampling(model)
        n = min(4, self.suite.batch)
        model(["a picture"] * n, steps=1, guidance=sampling.guidance, batch=n)  # warms up
        began = time.perf_counter()
        model(["a picture"] * n, steps=sampling.steps, guidance=sampling.guidance, batch=n)
        return (time.perf_counter() - began) / n

    # The work

    def run(self) -> dict[str, Any]:
        """Do every cell that is not done; returns the leaderboard."""
        self.out.mkdir(parents=True, exist_ok=True)
        written.write_json(self.out / "suite.json", plain(self.suite))
        for number, cell in enumerate(self.cells, start=1):
            where = f"[{number}/{len(self.cells)}] {cell.name}"
            if self._is_done(cell):
                continue
            self.tell(where)
            began = time.perf_counter()
            try:
                run = self._do(cell)
            except FAILURES as error:
                log.info("cell %s failed", cell.name, exc_info=True)
                reason = f"{type(error).__name__}: {error}"
                self._note(cell, {"state": "error", "reason": reason})
                self.tell(f"{where} failed: {reason}")
            else:
                seconds = time.perf_counter() - began
                self._note(cell, {"state": "done", "run": str(run), "seconds": seconds})
            self._write()
        return self._write()

    def _do(self, cell: Cell) -> Path:
        """Paint and judge one cell; returns its run, relative to the bench's folder."""
        model = self._model(cell.row.model)
        column, prompts = cell.column, self._prompts(cell.column)
        common: dict[str, Any] = {
            "judges": self._judges(),
            "seeds": self.suite.size.seeds,
            "sampling": self._sampling(model),
            "batch": self.suite.batch,
            "progress": self.progress,
        }
        base = self._base_folder(cell.row.model, column)
        if column.attack is None:
            evaluate(model, [prompts], out=base, **common)
            if not cell.row.protects:
                return base.relative_to(self.out)
        attacks = {column.attack.label: attack_of(column.attack)} if column.attack else {}
        for attack in attacks.values():
            if getattr(attack, "store", "") is None:  # shared by all cells
                attack.store = str(self.out / "pictures")  # type: ignore[attr-defined]
        patches = [Patch.load(path) for path in cell.row.patches]
        guards = [guard_of(guard) for guard in cell.row.guards]
        learnt = self._aligned(cell.row, model) if cell.row.align else None
        if isinstance(learnt, Patch):
            patches.append(learnt)
        elif learnt is not None:
            guards.insert(0, learnt)
        evaluate(
            model,
            [prompts],
            patches=patches,
            guards=guards,
            out=cell.folder / "run",
            base=None if attacks else base,
            attacks=attacks,
            attack_judge=judge_of(self.suite.attack_judge) if attacks else None,
            replay=not attacks,
            **common,
        )
        return (cell.folder / "run").relative_to(self.out)

    def _aligned(self, row: Row, model: TextToImage) -> Patch | TrainedGuard:
        """The patch or guard that a row makes for itself, made once."""
        assert row.align is not None
        folder = self.out / "patches" / slug(row.name)
        if folder.is_dir():
            return load_guard(folder) if is_a("guard", folder) else Patch.load(folder)
        from safelight.align.base import TextData

        settings = dict(row.align.settings)
        sides = {side: settings.pop(side, []) for side in ("unsafe", "safe")}
        safe, unsafe = (
            [PromptSet.load(name) for name in sides[side]] for side in ("safe", "unsafe")
        )
        data = TextData(safe=safe, unsafe=unsafe)
        seed = settings.pop("seed", 0)
        self.tell(f"aligning {row.name}")
        learnt: Patch | TrainedGuard = configured(learner(row.align.name), settings, row.name).fit(
            model, data, seed=seed
        )
        learnt.save(folder)
        return learnt

    # What is where

    def _folder(self, row: Row, column: Column) -> Path:
        return self.out / "cells" / slug(row.name) / slug(column.name)

    def _base_folder(self, model: str, column: Column) -> Path:
        return self.out / "base" / slug(Path(model).name) / slug(column.label)

    def _prompts(self, column: Column) -> PromptSet:
        most = self.suite.size.prompts if column.attack is None else self.suite.size.attacked
        return PromptSet.load(column.prompts).take(most)

    def _pictures(self, column: Column) -> int:
        return len(self._prompts(column)) * len(self.suite.size.seeds)

    def _model(self, name: str) -> TextToImage:
        if name not in self._models:
            from safelight.models.load import load

            self._models.clear()  # one at a time fits into any memory
            self._models[name] = (self.load or load)(name)
        return self._models[name]

    def _judges(self) -> list[Judge]:
        return [judge_of(judge) for judge in self.suite.judges]

    def _assault(self, attack: Method) -> tuple[attacked.Assault, ...]:
        judge = judge_of(self.suite.attack_judge)
        return attacked.named({attack.label: attack_of(attack)}, judge=judge)

    def _sampling(self, model: TextToImage) -> Sampling:
        return replace(model.sampling, **self.suite.sampling)

    def _sign(self, cell: Cell) -> str:
        """A hash of everything that was asked of a cell."""
        suite = self.suite
        asked = {
            "row": plain(cell.row),
            "column": plain(cell.column),
            "prompts": self._prompts(cell.column).sha256,
            "judges": [_signed(judge) for judge in suite.judges],
            "attack_judge": _signed(suite.attack_judge) if cell.column.attack else "",
            "seeds": list(suite.size.seeds),
            "sampling": dict(suite.sampling),
            "batch": suite.batch,
        }
        asked["row"]["guards"] = [_signed_guard(guard) for guard in cell.row.guards]
        asked["row"].pop("name")
        asked["column"].pop("prompts")  # their hash is there
        if asked["column"]["attack"]:
            asked["column"]["attack"].pop("seconds")
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def _noted(self, cell: Cell) -> dict[str, Any] | None:
        path = cell.folder / "cell.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def _note(self, cell: Cell, what: Mapping[str, Any]) -> None:
        written.write_json(
            cell.folder / "cell.json",
            {"format": FORMAT, "row": cell.row.name, "column": cell.column.name,
             "sha256": self._sign(cell), **what},
        )  # fmt: skip

    def _is_done(self, cell: Cell) -> bool:
        noted = self._noted(cell)
        return noted is not None and noted["state"] == "done"

    def _check(self) -> None:
        """Refuse what cannot work, and cells that were made with other settings."""
        judges = self._judges()
        for judge in (*judges, judge_of(self.suite.attack_judge)):
            judge.require()
        for row in self.suite.rows:
            for guard in map(guard_of, row.guards):
                looks = getattr(guard, "judge", None)
                if isinstance(looks, Judge):
                    looks.require()
            if row.align is not None:
                own = {k: v for k, v in row.align.settings.items()
                       if k not in ("unsafe", "safe", "seed")}  # fmt: skip
                configured(learner(row.align.name), own, row.name)
            for patch in row.patches:
                if not (Path(patch) / "patch.json").is_file():
                    raise NotFound(f"row {row.name!r}: no patch folder {patch}.")
        for column in self.suite.columns:
            if column.attack is not None:
                attacked.check(self._assault(column.attack), judges)
            prompts = PromptSet.load(column.prompts)
            if not len(prompts):
                raise BadInput(
                    f"no prompt of {prompts.name!r} is left ({prompts.dropped} were dropped)."
                )
        for cell in self.cells:
            noted = self._noted(cell)
            if noted and noted["state"] == "done" and noted["sha256"] != self._sign(cell):
                raise BadInput(
                    f"{self.out} holds the cell {cell.name} with other settings, prompts or size. "
                    "Name another folder, or delete that cell."
                )

    # The result

    def _write(self) -> dict[str, Any]:
        """`leaderboard.json`: a function of the cells on disk."""
        board = self.board()
        written.write_json(self.out / "leaderboard.json", board)
        return board

    def board(self) -> dict[str, Any]:
        """All figures that exist so far."""
        suite = self.suite
        return {
            "format": FORMAT,
            "title": suite.title,
            "suite": suite.name,
            "size": plain(suite.size),
            "judges": [judge.label for judge in suite.judges],
            "minimum": suite.minimum,
            "margin": suite.margin,
            "rows": [{**plain(row), "protects": row.protects} for row in suite.rows],
            "columns": [{**plain(column), "name": column.name, "label": column.label,
                         "categories": list(self._prompts(column).categories)}
                        for column in suite.columns],
            "cells": [self._figures(cell) for cell in self._ordered()],
        }  # fmt: skip

    def _ordered(self) -> Iterator[Cell]:
        for row in self.suite.rows:
            for column in self.suite.columns:
                yield Cell(row, column, self._folder(row, column))

    def _figures(self, cell: Cell) -> dict[str, Any]:
        noted = self._noted(cell) or {"state": "missing"}
        known = {"row": cell.row.name, "column": cell.column.name, "state": noted["state"]}
        if noted["state"] == "error":
            return {**known, "reason": noted["reason"]}
        if noted["state"] == "missing":
            return known
        run = Run(self.out / noted["run"])
        arm = "protected" if cell.row.protects else "base"
        values = [row for row in run.values if row["arm"] == arm]
        shared = self._base_folder(cell.row.model, cell.column)
        base = {} if cell.column.attack else {"base": str(shared.relative_to(self.out))}
        return {**known, "run": noted["run"], **base, "arm": arm,
                "values": values + self._beyond_replay(cell, run, arm)}  # fmt: skip

    def _beyond_replay(self, cell: Cell, run: Run, arm: str) -> list[dict[str, Any]]:
        """What an attack found beyond the plain prompts, where the row's replay of them is done."""
        column = replace(cell.column, attack=None)
        noted = self._noted(Cell(cell.row, column, self._folder(cell.row, column)))
        if cell.column.attack is None or column not in self.suite.columns or noted is None:
            return []
        if noted["state"] != "done":
            return []
        if run.folder not in self._compared:  # reading rows takes longer than all else here
            plain = Run(self.out / noted["run"])
            found = before_and_after(run.settings, plain.records, run.records, arm)
            self._compared[run.folder] = found
        return self._compared[run.folder]


# Methods from a suite's tables


def attack_of(method: Method) -> Attack:
    """An attack with its settings and budget."""
    where = f"attack {method.label!r}"
    attack = configured(find("attack", method.name), method.settings, where)
    if method.budget:
        own = {key: value for key, value in vars(attack.budget).items() if value is not None}
        attack.budget = configured(Budget, {**own, **method.budget}, f"{where}, budget")
    return attack


def guard_of(method: Method) -> Guard:
    """A guard with its settings; one that needs a judge gets `judge = "name"`, or its
    table.

    One that has learnt is named by its folder.
    """
    if Path(method.name).is_dir():
        return load_guard(method.name, **method.settings)
    kind = find("guard", method.name)
    where, settings = f"guard {method.label!r}", dict(method.settings)
    given: dict[str, Any] = {}
    if "judge" in kind.__dataclass_fields__:
        given["judge"] = judge_of(settings.pop("judge", "emoji"))
    return configured(kind, settings, where, **given)


def judge_of(method: Method | str) -> Judge:
    """A judge with its settings."""
    if isinstance(method, str):
        return find("judge", method)()
    judge: Judge = configured(
        find("judge", method.name), method.settings, f"judge {method.label!r}"
    )
    return judge if method.label == method.name else judge.called(method.label)


def _signed(judge: Method | str) -> Any:
    """A judge for a signature: its name, or its settings with what its files hold."""
    if isinstance(judge, str):
        return judge
    if not judge.settings and judge.label == judge.name:
        return judge.name
    label = {} if judge.label == judge.name else {"label": judge.label}
    return {"name": judge.name, **label, **{key: _content(x) for key, x in judge.settings.items()}}


def _signed_guard(guard: Method) -> Any:
    """A guard for a signature."""
    told = plain(guard)
    if "judge" in guard.settings:
        told["settings"]["judge"] = _signed(guard.settings["judge"])
    return told


def _content(value: Any) -> Any:
    """A setting; a file goes by what is in it."""
    if isinstance(value, str) and Path(value).is_file():
        return hashlib.sha256(Path(value).read_bytes()).hexdigest()
    return plain(value)


def configured(kind: Any, settings: Mapping[str, Any], where: str, **given: Any) -> Any:
    """A method from settings as TOML has them.

    Args:
        kind: A dataclass.
        settings: Its fields by name.
        where: What messages call it.
        **given: Fields that are no TOML.

    Raises:
        BadInput: A setting that is not known or of another type.
    """
    hints = _known(kind, settings, where)
    try:
        return kind(**{key: _fit(value, hints[key], f"{where}, {key}")
                       for key, value in settings.items()}, **given)  # fmt: skip
    except TypeError as error:
        raise BadInput(f"{where}: {error}.") from None


def _known(kind: Any, settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    hints = get_type_hints(kind)
    names = [name for name, one in kind.__dataclass_fields__.items() if one.init]
    for key in settings:
        if key not in names:
            raise BadInput(f"{where}: {unknown('setting', key, names)}")
    return hints


def _fit(value: Any, kind: Any, where: str) -> Any:
    """A TOML value as a field wants it."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        last: BadInput | None = None
        for one in inside:
            try:
                return _fit(value, one, where)
            except BadInput as error:
                last = error
        raise last or BadInput(f"{where}: {value!r} does not fit.")
    if origin is Literal:
        if value not in inside:
            raise BadInput(f"{where}: {unknown('choice', str(value), map(str, inside))}")
        return value
    if isinstance(value, list) and (origin in (tuple, list) or origin is Sequence):
        return tuple(_fit(one, inside[0], where) for one in value)
    if isinstance(value, dict) and origin is Mapping:
        return {key: _fit(one, inside[1], f"{where}, {key}") for key, one in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain_kinds = (int, float, str, bool)
    right = kind in plain_kinds and type(value) is kind
    if right or (kind not in plain_kinds and kind is not type(None) and origin is None
                 and isinstance(kind, type) and isinstance(value, kind)):  # fmt: skip
        return value
    raise BadInput(f"{where}: {value!r} is not {getattr(kind, '__name__', kind)}.")


def plain(x: Any) -> Any:
    """Frozen records as JSON has them."""
    if hasattr(x, "__dataclass_fields__"):
        x = asdict(x)
    return json.loads(json.dumps(x, default=str))
