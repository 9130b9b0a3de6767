"""Suites: what a bench measures, as a strict TOML file. No torch.

    title = "..."                    model = "emoji-world"
    judges = ["emoji-b", {name = "vlm", model = "...", url = "...", categories = "policy.toml"}]
    [size.quick]                     prompts = 16, attacked = 8, seeds = [0]
    [[rows]]                         name, and what protects: patches, align, guards
    [[columns]]                      prompts = [...], attacks = ["replay", {name = "mma", ...}]

A row times a column is a cell; a column of several sets and attacks stands for each pair of them.
Every key that is not known is an error: a typo must not measure something else.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from safelight.errors import BadInput, NotFound, unknown
from safelight.names import table

REPLAY = "replay"
SIZES = ("quick", "standard", "full")


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured.

    Args:
        prompts: Prompts of each set that are painted as they are.
        attacked: Prompts of each set that an attack rewrites.
        seeds: Pictures per prompt start from these.
    """

    prompts: int
    attacked: int
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method by name, with its settings.

    Args:
        name: In the method's table.
        label: What tables call it.
        settings: Everything else that was given.
        seconds: What a search is expected to take per prompt, for the estimate.
        budget: `queries`, `steps`, `seconds` of an attack.
    """

    name: str
    label: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    budget: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model with its protection.

    Args:
        name: Unique.
        model: What `load` understands.
        patches: Patch folders.
        align: A method that makes a patch first, with `unsafe` and `safe` prompt sets in its
            settings.
        guards: In the order in which they act.
    """

    name: str
    model: str
    patches: tuple[str, ...] = ()
    align: Method | None = None
    guards: tuple[Method, ...] = ()

    @property
    def protects(self) -> bool:
        return bool(self.patches or self.align or self.guards)


@dataclass(frozen=True, kw_only=True)
class Column:
    """One prompt set under one attack.

    Args:
        prompts: The set's name or file.
        attack: None replays the prompts as they are.
    """

    prompts: str
    attack: Method | None = None

    @property
    def name(self) -> str:
        return f"{self.label} / {self.attack.label if self.attack else REPLAY}"

    @property
    def label(self) -> str:
        """The set's name, or its file's."""
        return Path(self.prompts).name if Path(self.prompts).suffix else self.prompts


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Rows times columns.

    Args:
        name: The file's name.
        title: What the page is called.
        rows: Models with their protections.
        columns: Prompt sets under attacks.
        judges: Who looks at the pictures; the first decides.
        attack_judge: What attacks look at pictures with.
        size: How much is measured.
        sampling: `steps`, `guidance`; the model's own where not given.
        batch: Prompts painted at a time.
        minimum: A cell with fewer judged pictures is unreliable.
        margin: A row where a search beats the replay by more is unreliable.
        folder: What relative paths are relative to.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    judges: tuple[Method, ...]
    attack_judge: Method
    size: Size
    sampling: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 16
    minimum: int = 8
    margin: float = 0.1
    folder: str = ""


_TOP = ("title", "model", "judges", "attack_judge", "size", "sampling", "batch", "minimum",
        "margin", "rows", "columns")  # fmt: skip
_ROW = ("name", "model", "patches", "align", "guards")
_COLUMN = ("prompts", "attacks")
_FILES = ("model", "categories", "prompts")  # settings of judges that may be beside the suite


def shipped() -> dict[str, Path]:
    """The suites inside the package, by name."""
    folder = Path(str(files("safelight.bench") / "suites"))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def read(source: Path | str, size: str = "quick") -> Suite:
    """A suite from a file, or one that ships by its name.

    Raises:
        NotFound: No such file, suite, method or prompt set.
        BadInput: Not TOML, a key that is not known, or a value of the wrong kind.
    """
    path = Path(source)
    if path.suffix != ".toml":
        known = shipped()
        if str(source) not in known:
            raise NotFound(f"{unknown('suite', str(source), known)} A file needs to end in .toml.")
        path = known[str(source)]
    if not path.is_file():
        raise NotFound(f"no suite file at {path}.")
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path.name} is not readable TOML: {error}.") from None
    return _suite(given, path, size)


def _suite(given: Mapping[str, Any], path: Path, size: str) -> Suite:
    where = path.name
    _keys(given, _TOP, where, need=("rows", "columns"))
    sizes = _table(given.get("size", {}), f"{where}, [size]")
    _keys(sizes, SIZES, f"{where}, [size]")
    if size not in sizes:
        raise BadInput(f"{where}: {unknown('size', size, sizes or SIZES)}")
    judges = tuple(
        _judge(one, path, f"{where}, judges")
        for one in _sequence(given.get("judges", ["emoji-b"]), f"{where}, judges")
    )
    if not judges:
        raise BadInput(f"{where}, judges: name at least one.")
    _once([judge.label for judge in judges], f"{where}: two judges")
    attack_judge = _judge(given.get("attack_judge", "emoji"), path, f"{where}, attack_judge")
    sampling = _table(given.get("sampling", {}), f"{where}, [sampling]")
    _keys(sampling, ("steps", "guidance"), f"{where}, [sampling]")
    model = _word(given.get("model", "emoji-world"), f"{where}, model")
    rows = tuple(_row(one, model, path, i) for i, one in enumerate(_list(given, "rows", where)))
    columns = tuple(
        column
        for i, one in enumerate(_list(given, "columns", where))
        for column in _columns(one, path, i)
    )
    _once([row.name for row in rows], f"{where}: two rows")
    _once([column.name for column in columns], f"{where}: two columns")
    return Suite(
        name=path.stem,
        title=_word(given.get("title", path.stem), f"{where}, title"),
        rows=rows,
        columns=columns,
        judges=judges,
        attack_judge=attack_judge,
        size=_size(sizes[size], f"{where}, [size.{size}]"),
        sampling=sampling,
        batch=_number(given.get("batch", 16), int, f"{where}, batch"),
        minimum=_number(given.get("minimum", 8), int, f"{where}, minimum"),
        margin=_number(given.get("margin", 0.1), float, f"{where}, margin"),
        folder=str(path.parent),
    )


def _size(given: Any, where: str) -> Size:
    one = _table(given, where)
    names = [field.name for field in fields(Size)]
    _keys(one, names, where, need=("prompts", "attacked"))
    numbers = {key: _number(one[key], int, f"{where}, {key}") for key in ("prompts", "attacked")}
    seeds = one.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds:
        raise BadInput(f"{where}, seeds: a list of numbers is expected, such as [0, 1].")
    for key, value in numbers.items():
        if value < 1:
            raise BadInput(f"{where}, {key} must be at least 1, not {value}.")
    return Size(**numbers, seeds=tuple(_number(x, int, f"{where}, seeds") for x in seeds))


def _row(given: Any, model: str, path: Path, i: int) -> Row:
    where = f"{path.name}, [[rows]] {i + 1}"
    one = _table(given, where)
    _keys(one, _ROW, where, need=("name",))
    align = one.get("align")
    return Row(
        name=_word(one["name"], f"{where}, name"),
        model=_found(_word(one.get("model", model), f"{where}, model"), path),
        patches=tuple(_found(p, path) for p in _words(one.get("patches", []), f"{where}, patches")),
        align=None if align is None else _align(align, path, f"{where}, align"),
        guards=tuple(
            _guard(g, path, f"{where}, guards") for g in _sequence(one.get("guards", []), where)
        ),
    )


def _guard(given: Any, path: Path, where: str) -> Method:
    """A guard by its name, or by the folder of one that has learnt.

    One that needs a judge names it like a suite does.
    """
    one = {"name": given} if isinstance(given, str) else dict(_table(given, where))
    folder = _found(str(one.get("name", "")), path)
    if one.get("name") not in table("guard") and Path(folder, "guard.json").is_file():
        label = _word(one.pop("label", one.pop("name")), where)
        return Method(name=folder, label=label, settings=one)
    method = _method("guard", one, where)
    if "judge" not in method.settings:
        return method
    judge = _judge(method.settings["judge"], path, f"{where}, judge")
    return replace(method, settings={**method.settings, "judge": judge})


def _judge(given: Any, path: Path, where: str) -> Method:
    """A judge; its files may be beside the suite."""
    method = _method("judge", given, where)
    near = {key: _found(value, path) for key, value in method.settings.items()
            if key in _FILES and isinstance(value, str) and value}  # fmt: skip
    return replace(method, settings={**method.settings, **near})


def _align(given: Any, path: Path, where: str) -> Method:
    """What learns, an alignment or a guard; its data are prompt sets or files beside the suite."""
    method = _method("align", given, where)
    sides = {
        side: [_prompts(name, path, where) for name in _words(method.settings[side], where)]
        for side in ("unsafe", "safe")
        if side in method.settings
    }
    return replace(method, settings={**method.settings, **sides})


def _columns(given: Any, path: Path, i: int) -> list[Column]:
    where = f"{path.name}, [[columns]] {i + 1}"
    one = _table(given, where)
    _keys(one, _COLUMN, where, need=("prompts",))
    attacks = [
        attack
        for given in _sequence(one.get("attacks", [REPLAY]), where)
        for attack in _controls(given, f"{where}, attacks")
    ]
    prompts = [_prompts(name, path, where) for name in _words(one["prompts"], f"{where}, prompts")]
    return [
        Column(prompts=name, attack=None if attack.name == REPLAY else attack)
        for name in prompts
        for attack in attacks
    ]


def _controls(given: Any, where: str) -> list[Method]:
    """An attack, and the same once more for each of its `controls`."""
    one = dict(given) if isinstance(given, dict) else {"name": given}
    controls = _words(one.pop("controls", []), f"{where}, controls")
    attack = _method("attack", one, where)
    return [attack] + [
        replace(
            attack,
            label=f"{attack.label}, {control}",
            settings={**attack.settings, "control": control},
        )
        for control in controls
    ]


def _method(kind: str, given: Any, where: str) -> Method:
    """A method from its name, or from a table with its name and settings."""
    one = {"name": given} if isinstance(given, str) else dict(_table(given, where))
    if "name" not in one:
        raise BadInput(f"{where}: a name is missing.")
    name = _word(one.pop("name"), where)
    _named(kind, name, where)
    attack = kind == "attack"
    label = _word(one.pop("label", name), where)
    seconds = one.pop("seconds", None) if attack else None
    if not isinstance(seconds, int | float | None) or isinstance(seconds, bool):
        raise BadInput(f"{where}: seconds is a number, not {seconds!r}.")
    budget = _table(one.pop("budget", {}), where) if attack else {}
    _keys(budget, ("queries", "steps", "seconds"), f"{where}, budget")
    return Method(name=name, label=label, settings=one, seconds=seconds, budget=budget)


def _prompts(name: str, path: Path, where: str) -> str:
    if name in table("prompts"):
        return name
    if Path(name).suffix:
        return _found(name, path)
    raise NotFound(f"{where}: {unknown('prompts', name, table('prompts'))}")


def _found(name: str, path: Path) -> str:
    """A path relative to the suite's file, where there is one of that name."""
    beside = path.parent / name
    return str(beside) if not Path(name).is_absolute() and beside.exists() else name


def _named(kind: str, name: str, where: str) -> None:
    known = {**table("align"), **table("guard")} if kind == "align" else table(kind)
    if name not in known:
        raise NotFound(f"{where}: {unknown(kind, name, known)}")


def _keys(
    given: Mapping[str, Any], known: Sequence[str], where: str, need: Iterable[str] = ()
) -> None:
    for key in given:
        if key not in known:
            raise BadInput(f"{where}: {unknown('key', key, known)}")
    for key in need:
        if key not in given:
            raise BadInput(f"{where}: {key!r} is missing.")


def _once(names: Sequence[str], what: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise BadInput(
                f"{what} are named {name!r}; give one another name (label=), or leave one out."
            )


def _table(given: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(given, dict):
        raise BadInput(f"{where}: a table is expected, not {given!r}.")
    return given


def _list(given: Mapping[str, Any], key: str, where: str) -> list[Any]:
    found = given[key]
    if not isinstance(found, list) or not found:
        raise BadInput(f"{where}: write at least one [[{key}]].")
    return found


def _sequence(given: Any, where: str) -> list[Any]:
    if not isinstance(given, list):
        raise BadInput(f"{where}: a list is expected, not {given!r}.")
    return given


def _words(given: Any, where: str) -> tuple[str, ...]:
    return tuple(_word(one, where) for one in _sequence(given, where))


def _word(given: Any, where: str) -> str:
    if not isinstance(given, str) or not given.strip():
        raise BadInput(f"{where}: a text is expected, not {given!r}.")
    return given


def _number(given: Any, kind: type, where: str) -> Any:
    if isinstance(given, bool) or not isinstance(given, int if kind is int else int | float):
        raise BadInput(f"{where}: a {'whole ' if kind is int else ''}number is expected.")
    return kind(given)
