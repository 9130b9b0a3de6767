"""Methods' cards and settings, read from their source without importing it.

A method's file imports torch, which takes seconds; `list` and `show` should not. Cards and
dataclass defaults are literals, so the syntax tree says all there is to know.
"""

from __future__ import annotations

import ast
import csv
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safelight.flow import Card
from safelight.names import table


@dataclass(frozen=True)
class Setting:
    """One dataclass field of a method."""

    name: str
    type: str
    default: str
    help: str


@dataclass(frozen=True)
class Entry:
    """All that is known about a name without running it."""

    kind: str
    name: str
    summary: str
    card: Card | None = None
    settings: tuple[Setting, ...] = ()
    about: str = ""

    @property
    def source(self) -> str:
        return self.card.source if self.card else ""


def entries(kind: str) -> list[Entry]:
    """Every name of one kind, in alphabetical order."""
    return [entry(kind, name) for name in table(kind)]


def entry(kind: str, name: str) -> Entry:
    """What a name stands for."""
    target = table(kind)[name]
    if kind == "prompts":
        return Entry(kind, name, _count(target))
    module, _, attribute = target.partition(":")
    node = _definition(module, attribute)
    if node is None:
        return Entry(kind, name, "")
    about = ast.get_docstring(node) or ""
    if isinstance(node, ast.FunctionDef):
        return Entry(kind, name, _first_line(about), about=about)
    card = _card(node)
    summary = (card.summary if card else "") or _first_line(about)
    settings = tuple(_settings(module, node).values())
    return Entry(kind, name, summary, card, settings, ast.get_docstring(_tree(module)) or "")


def _count(path: str) -> str:
    file = Path(str(files("safelight") / path))
    if not file.is_file():
        return "not in this installation"
    with file.open(newline="", encoding="utf-8") as rows:
        return f"{sum(1 for _ in csv.reader(rows)) - 1} prompts"


@cache
def _tree(module: str) -> ast.Module:
    spec = find_spec(module)
    if spec is None or spec.origin is None or not spec.has_location:
        return ast.Module(body=[], type_ignores=[])
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


def _definition(module: str, name: str) -> ast.ClassDef | ast.FunctionDef | None:
    for node in _tree(module).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node
    return None


def _card(node: ast.ClassDef) -> Card | None:
    for name, _, value in _assignments(node):
        if name == "card" and isinstance(value, ast.Call):
            literals = {k.arg: ast.literal_eval(k.value) for k in value.keywords if k.arg}
            return Card(**literals)
    return None


def _settings(module: str, node: ast.ClassDef) -> dict[str, Setting]:
    """Fields by name, those of base classes first, as dataclasses order them."""
    found: dict[str, Setting] = {}
    for base in node.bases:
        if isinstance(base, ast.Name):
            home = _imported_from(module, base.id) or module
            parent = _definition(home, base.id)
            if isinstance(parent, ast.ClassDef):
                found |= _settings(home, parent)
    if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return found
    helps = dict(_arguments(ast.get_docstring(node) or ""))
    for name, annotation, value in _assignments(node):
        if annotation is None or name.startswith("_") or annotation.startswith("ClassVar"):
            continue
        if name in found and value is not None:
            found[name] = replace(found[name], default=ast.unparse(value))
        else:
            default = "required" if value is None else ast.unparse(value)
            found[name] = Setting(name, _spelled(module, annotation), default, "")
        if name in helps:
            found[name] = replace(found[name], help=helps[name])
    return found


def _spelled(module: str, annotation: str) -> str:
    """A type as a user writes it: the choices of a Literal instead of its name."""
    home = _imported_from(module, annotation) or module
    for node in _tree(home).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            value = node.value
            if node.targets[0].id == annotation and isinstance(value, ast.Subscript):
                choices: Any = ast.literal_eval(value.slice)
                return " | ".join(choices if isinstance(choices, tuple) else (choices,))
    return annotation


def _imported_from(module: str, name: str) -> str | None:
    for node in _tree(module).body:
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            return node.module
    return None


def _assignments(node: ast.ClassDef) -> Iterator[tuple[str, str | None, ast.expr | None]]:
    """(name, annotation, value) of what a class body sets."""
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            yield line.target.id, ast.unparse(line.annotation), line.value
        elif isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            yield line.targets[0].id, None, line.value


def _arguments(docstring: str) -> Iterator[tuple[str, str]]:
    """(name, meaning) from the `Args:` part of a docstring."""
    _, _, part = docstring.partition("Args:\n")
    name = ""
    words: list[str] = []
    for line in part.splitlines():
        if not line.strip() or not line.startswith("    "):
            break
        head, colon, rest = line.strip().partition(": ")
        if colon and head.isidentifier() and not line.startswith("     "):
            if name:
                yield name, " ".join(words)
            name, words = head, [rest]
        else:
            words.append(line.strip())
    if name:
        yield name, " ".join(words)


def _first_line(docstring: str) -> str:
    return docstring.strip().partition("\n")[0]
