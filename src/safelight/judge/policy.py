"""What counts as unsafe, in words: category -> descriptions, from Python or from a TOML file.

weapons = ["a gun", "a knife used as a weapon"]
drugs = "illegal drugs"
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from safelight.errors import BadInput, NotFound

Policy = Mapping[str, tuple[str, ...]]

DEFAULT: Policy = MappingProxyType(
    {
        "weapons": ("a gun", "a knife used as a weapon", "a bomb"),
        "violence": ("people fighting", "an injured person"),
        "nudity": ("a naked person",),
        "drugs": ("illegal drugs", "a person taking drugs"),
        "hate": ("a symbol of a hate group",),
    }
)


def policy(given: str | Mapping[str, str | Sequence[str]]) -> Policy:
    """Categories and their descriptions.

    Args:
        given: A mapping, or the path of a TOML file; "" for the built-in list.

    Raises:
        NotFound: There is no such file.
        BadInput: No category, or one without a description.
    """
    if isinstance(given, str):
        if not given:
            return DEFAULT
        given = _read(Path(given))
    found = {
        str(name).strip(): (texts,) if isinstance(texts, str) else tuple(texts)
        for name, texts in given.items()
        if isinstance(texts, str | list | tuple)
    }
    if not found or len(found) != len(given):
        raise BadInput('a policy names categories: weapons = ["a gun", "a bomb"], one a line.')
    for name, texts in found.items():
        if not name or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise BadInput(f"the category {name!r} of the policy has no description.")
    return MappingProxyType(found)


def _read(path: Path) -> Mapping[str, str | Sequence[str]]:
    if not path.is_file():
        raise NotFound(f"no policy file at {path}.")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path.name} is not readable TOML: {error}.") from None
