"""Every error Safelight raises on purpose.

```
SafelightError
├── NotFound         a name, file or weight that does not exist
├── Unsupported      a method, family or precision that cannot work together
├── BadInput         prompts, images, settings or rows of the wrong form
├── MissingExtra     an optional dependency that is not installed
├── WorkFailed       the work began and could not be finished (disk full, weights unreadable)
└── GuardFailed      a protection or a judge could not do its work: never read as "safe"
```

A message says what happened, what was expected and what to do. The command line turns the first
four into exit code 2 (wrong use) and the last two into exit code 3 (the work failed).
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class SafelightError(Exception):
    """The root: catch this to catch everything Safelight raises on purpose."""

    exit_code = 3


class NotFound(SafelightError):
    """A name, file or weight that does not exist."""

    exit_code = 2


class Unsupported(SafelightError):
    """A method, family or precision that cannot work together."""

    exit_code = 2


class BadInput(SafelightError):
    """Prompts, images, settings or rows of the wrong form."""

    exit_code = 2


class MissingExtra(SafelightError):
    """An optional dependency that is not installed."""

    exit_code = 2


class WorkFailed(SafelightError):
    """The work began and could not be finished; what was already on disk is intact."""


class GuardFailed(SafelightError):
    """A protection or a judge could not do its work."""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Words for "no such name", with the nearest known one or the whole list."""
    known = sorted(known)
    close = get_close_matches(name, known, n=1)
    hint = f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known) or 'none'}."
    return f"no {kind} named {name!r}. {hint}"
