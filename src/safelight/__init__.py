"""Safelight: make open text-to-image models safe, and prove it.

    import safelight as sl
    model = sl.load("emoji-world")

The public names load on first use, so that `import safelight` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "load": "safelight.models.load",
    "Patch": "safelight.models.patch",
    "PromptSet": "safelight.prompts",
    "Guarded": "safelight.guard.base",
    "evaluate": "safelight.bench.run",
    "Report": "safelight.report",
}
__all__ = [*_WHERE, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'safelight' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
