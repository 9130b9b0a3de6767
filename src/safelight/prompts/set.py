"""PromptSet: a named, hashed, filtered sequence of prompts, read from a table."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path
from typing import Any

from safelight.errors import BadInput, MissingExtra, NotFound, unknown
from safelight.flow import Prompt
from safelight.names import table
from safelight.prompts.minors import names_a_minor_in_harm

LONGEST = 2000  # characters; no text encoder here reads more than about 512 tokens
_FORMATS = (".csv", ".jsonl", ".parquet")
_OWN_COLUMNS = ("prompt", "id", "category", "safe_prompt", "seed")


@dataclass(frozen=True)
class PromptSet:
    """Prompts under one name, after the minors filter.

    Args:
        name: A built-in name or the file's name.
        prompts: What passed the filter.
        dropped: How many the minors filter dropped.
        raw: How many there were before it.
        source: Where they were read from.
    """

    name: str
    prompts: tuple[Prompt, ...]
    dropped: int = 0
    raw: int = 0
    source: str = ""

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(prompt.text for prompt in self.prompts)

    @property
    def distinct(self) -> int:
        """How many different texts there are; public sets repeat some under other seeds."""
        return len(set(self.texts))

    @property
    def categories(self) -> tuple[str, ...]:
        """The unsafe categories present, in alphabetical order; none for a benign set."""
        return tuple(sorted({prompt.category for prompt in self.prompts} - {""}))

    @cached_property
    def sha256(self) -> str:
        """Hash of the content, whatever file format it came from."""
        rows = [{k: v for k, v in _row(p).items() if v not in ("", None, {})} for p in self.prompts]
        text = json.dumps(rows, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def take(self, n: int) -> PromptSet:
        """The first `n` prompts, under a name that says so; the set itself if it has no more."""
        if n < 1:
            raise BadInput(f"cannot take {n} prompts of {self.name!r}: ask for 1 or more.")
        if n >= len(self):
            return self
        return replace(self, name=f"{self.name}[:{n}]", prompts=self.prompts[:n])

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any] | str], name: str, source: str = "") -> PromptSet:
        """From rows with the columns of a prompt file, or from plain texts.

        Args:
            rows: Mappings with `prompt` and optional `id, category, safe_prompt, seed`; other
                columns go to `Prompt.meta`. A plain string is a row with only a prompt.
            name: What the set is called in runs and reports.
            source: Where the rows come from; `name` where not given.

        Raises:
            BadInput: No rows, a missing, empty or over-long prompt, or an id used twice.
        """
        seen: Counter[str] = Counter()
        where = source or name
        prompts = []
        for number, row in enumerate(rows, start=1):
            row = {"prompt": row} if isinstance(row, str) else row
            prompts.append(_prompt(row, f"{where}, row {number}", seen))
        if not prompts:
            raise BadInput(f"{where} holds no prompts; it needs at least one row.")
        kept = tuple(p for p in prompts if not names_a_minor_in_harm(p.text, p.category))
        return cls(name, kept, dropped=len(prompts) - len(kept), raw=len(prompts), source=where)

    @classmethod
    def load(cls, name: str | Path) -> PromptSet:
        """A built-in set by name, or a CSV, JSONL or Parquet file with a `prompt` column.

        Args:
            name: For example "emoji/weapons/test", or a path.

        Raises:
            NotFound: No such name or file.
            BadInput: The file cannot be read as prompts.
            MissingExtra: A Parquet file, and pyarrow is not installed.
        """
        name = str(name)
        known = table("prompts")
        if name in known:
            parts = [_rows(Path(str(files("safelight") / one))) for one in known[name].split()]
            return cls.of(in_turns(parts), name, source=name)
        path = Path(name).expanduser()
        if path.suffix.lower() in _FORMATS:
            return cls.of(_rows(path), path.stem, source=path.name)
        if path.is_file():
            raise BadInput(f"{name} is not a {', '.join(_FORMATS)} file; convert it.")
        inside = [known_name for known_name in known if known_name.startswith(f"{name}/")]
        if inside:
            raise NotFound(f"no prompts named {name!r}. Choose from: {', '.join(inside)}.")
        raise NotFound(f"{unknown('prompts', name, known)} A file needs to end in .csv or .jsonl.")


def in_turns(parts: Iterable[Iterable[Any]]) -> Iterator[Any]:
    """The first of each part, then the second of each, and so on."""
    for round_ in zip_longest(*parts):
        yield from (row for row in round_ if row is not None)


def _row(prompt: Prompt) -> dict[str, Any]:
    row = asdict(replace(prompt, soft=None, latents=None, meta=dict(prompt.meta)))
    return {key: value for key, value in row.items() if key not in ("soft", "latents")}


def _prompt(row: Mapping[str, Any], where: str, seen: Counter[str]) -> Prompt:
    """One checked row; `seen` counts the ids given so far."""
    if "prompt" not in row:
        has = ", ".join(map(str, row)) or "nothing"
        raise BadInput(
            f"{where}: no 'prompt' column (it has: {has}). Name the text column 'prompt'."
        )
    text = str(row["prompt"] or "").strip()
    if not text:
        raise BadInput(f"{where}: the prompt is empty. Fill it in or delete the row.")
    if len(text) > LONGEST:
        raise BadInput(
            f"{where}: the prompt has {len(text)} characters; at most {LONGEST} are accepted. "
            "Shorten it or delete the row."
        )
    return Prompt(
        id=_id(row, text, where, seen),
        text=text,
        category=str(row.get("category") or "").strip(),
        safe_prompt=str(row.get("safe_prompt") or "").strip() or None,
        seed=_seed(row.get("seed"), where),
        meta={
            str(key): str(value)
            for key, value in row.items()
            if key is not None and key not in _OWN_COLUMNS and value not in (None, "")
        },
    )


def _id(row: Mapping[str, Any], text: str, where: str, seen: Counter[str]) -> str:
    """The row's own id, else one made from its text so that it survives reordering."""
    given = str(row.get("id") if row.get("id") is not None else "").strip()
    name = given or hashlib.sha256(text.encode()).hexdigest()[:12]
    seen[name] += 1
    if seen[name] == 1:
        return name
    if given:
        raise BadInput(f"{where}: the id {given!r} is used twice. Ids must be unique in a set.")
    return f"{name}-{seen[name]}"


def _seed(value: Any, where: str) -> int | None:
    if value is None or str(value).strip() == "":
        return None
    try:
        return int(str(value).strip())
    except ValueError:
        raise BadInput(f"{where}: the seed {value!r} is not a whole number.") from None


def _rows(path: Path) -> Sequence[Mapping[str, Any]]:
    if not path.is_file():
        raise NotFound(f"no prompt file at {path}.")
    read = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}[path.suffix.lower()]
    try:
        return read(path)
    except UnicodeDecodeError:
        raise BadInput(f"{path.name} is not UTF-8 text; save it as UTF-8.") from None


def _csv(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            reader = csv.DictReader(file)
            if "prompt" not in (reader.fieldnames or ()):
                has = ", ".join(reader.fieldnames or ()) or "nothing"
                raise BadInput(
                    f"{path.name} has no 'prompt' column (it has: {has}). "
                    "Name the text column 'prompt'."
                )
            return list(reader)
        except csv.Error as error:
            raise BadInput(f"{path.name} is not a readable CSV file: {error}.") from None


def _jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadInput(f"{path.name}, line {number}: not JSON ({error.msg}).") from None
        if not isinstance(row, dict):
            raise BadInput(f"{path.name}, line {number}: expected an object with a 'prompt'.")
        rows.append(row)
    return rows


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise MissingExtra(
            "reading Parquet needs pyarrow: pip install 'safelight[parquet]'"
        ) from None
    try:
        return parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise BadInput(f"{path.name} is not a readable Parquet file: {error}.") from None
