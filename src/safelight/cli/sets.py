"""What `--unsafe`, `--safe`, `--prompts` and `--seeds` accept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safelight.errors import BadInput, NotFound, unknown
from safelight.names import table
from safelight.prompts import PromptSet

WORLD = "emoji"
SAFE = f"{WORLD}/safe/train"


def categories() -> list[str]:
    """The built-in unsafe categories."""
    parts = [name.split("/") for name in table("prompts")]
    return sorted({p[1] for p in parts if p[0] == WORLD and p[2:] == ["train"]} - {"all", "safe"})


def words(values: Sequence[str]) -> list[str]:
    """Repeated options and comma lists as one list, each word once."""
    return list(dict.fromkeys(w.strip() for v in values for w in v.split(",") if w.strip()))


def unsafe(values: Sequence[str]) -> list[PromptSet]:
    """The prompt sets of `--unsafe`: categories, "all", names of sets, or files."""
    return [PromptSet.load(name) for name in unsafe_names(values)]


def unsafe_names(values: Sequence[str]) -> list[str]:
    """The names of sets and files that `--unsafe` means, each once."""
    found = []
    for word in words(values):
        if word == "all":
            found += [f"{WORLD}/{category}/train" for category in categories()]
        elif word in categories():
            found.append(f"{WORLD}/{word}/train")
        elif word in table("prompts") or is_file(word):
            found.append(word)
        else:
            raise NotFound(unknown("unsafe category", word, [*categories(), "all"]))
    if not found:
        raise BadInput(f"--unsafe is empty; choose from {', '.join(categories())} or a file.")
    return list(dict.fromkeys(found))


def safe(values: Sequence[str], unsafe: Sequence[PromptSet]) -> list[PromptSet]:
    """The prompt sets of `--safe`; the built-in one belongs to built-in categories only."""
    if values:
        return [PromptSet.load(name) for name in words(values)]
    foreign = [one.name for one in unsafe if one.name not in table("prompts")]
    if foreign:
        raise BadInput(
            f"{', '.join(foreign)} is your own file: also name prompts that must stay as they are "
            "with --safe FILE."
        )
    return [PromptSet.load(SAFE)]


def seeds(text: str) -> tuple[int, ...]:
    """ "0-3" or "0,7,9" as numbers."""
    try:
        found: list[int] = []
        for part in text.split(","):
            low, dash, high = part.strip().partition("-")
            found += range(int(low), int(high) + 1) if dash else [int(low)]
    except ValueError:
        raise BadInput(f"--seeds {text}: write 0-3 or 0,7,9.") from None
    if not found:
        raise BadInput(f"--seeds {text} names no seed; write 0-3 or 0,7,9.")
    return tuple(dict.fromkeys(found))


def is_file(word: str) -> bool:
    """Whether a word is meant as a path."""
    return Path(word).suffix != "" or Path(word).exists()
