"""`key=value` on the command line to a method's dataclass fields, with types and suggestions."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from safelight.errors import BadInput, unknown

_TRUE, _FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}


def build(method: Any, pairs: Sequence[str], **given: Any) -> Any:
    """A method from `key=value` texts.

    Args:
        method: A dataclass.
        pairs: Texts such as "lam=0.3".
        given: Settings that are already values.

    Raises:
        BadInput: Not `key=value`, an unknown key, a value of the wrong type, a missing setting.
    """
    hints = get_type_hints(method)
    fields = {field.name: field for field in dataclasses.fields(method) if field.init}
    values = dict(given)
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip()
        if not equals:
            raise BadInput(f"--set {pair}: write it as key=value, for example --set epochs=4.")
        if key not in fields:
            raise BadInput(unknown("setting", key, fields))
        values[key] = parse(text.strip(), hints[key], key)
    for name, field in fields.items():
        if name not in values and _required(field):
            raise BadInput(f"{name} must be given: --set {name}=...")
    return method(**values)


def _required(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def parse(text: str, kind: Any, key: str) -> Any:
    """One value of one type."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if text.lower() == "none" and type(None) in inside:
            return None
        return parse(text, next(a for a in inside if a is not type(None)), key)
    if origin is Literal:
        if text not in inside:
            raise BadInput(f"{key}: {unknown('choice', text, map(str, inside))}")
        return text
    if origin in (tuple, list):
        return tuple(parse(part.strip(), inside[0], key) for part in text.split(",") if part)
    if kind is bool:
        if text.lower() in _TRUE | _FALSE:
            return text.lower() in _TRUE
        raise BadInput(f"{key} is yes or no; {text!r} is neither.")
    try:
        return kind(text)
    except (TypeError, ValueError):
        name = {"int": "a whole number", "float": "a number"}.get(kind.__name__, kind.__name__)
        raise BadInput(f"{key} is {name}; {text!r} is not.") from None


def split(spec: str) -> tuple[str, list[str]]:
    """ "name:key=value,key=value" as the name and its pairs."""
    name, _, rest = spec.partition(":")
    return name, [pair for pair in rest.split(",") if pair]
