"""Patches on the command line: several folders, which add up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safelight.errors import NotFound

if TYPE_CHECKING:
    from safelight.models.patch import Patch


def load_patches(paths: Sequence[Path]) -> list[Patch]:
    """Patches from their folders."""
    for path in paths:
        if not path.is_dir():
            raise NotFound(f"no patch folder {str(path)!r}; `safelight align` makes one.")
    from safelight.models.patch import Patch

    return [Patch.load(path) for path in paths]
