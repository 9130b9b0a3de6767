"""Writing a folder or a file whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from safelight.errors import WorkFailed


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A new folder to fill, which takes `path`'s place when the block ends without an error.

    Whatever ends the block early (Ctrl-C included) leaves `path` as it was.

    Raises:
        WorkFailed: The disk is full, or the place cannot be written.
    """
    fresh: Path | None = None
    try:
        with _failing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
            fresh.chmod(0o755)  # mkdtemp makes it private
            yield fresh
            if path.exists():
                old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
                os.replace(path, old / "old")
                os.replace(fresh, path)
                shutil.rmtree(old)
            else:
                os.replace(fresh, path)
    finally:
        if fresh is not None and fresh.exists():
            shutil.rmtree(fresh, ignore_errors=True)


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """A new file to fill, in the manner of `replaced`.

    Raises:
        WorkFailed: The disk is full, or the place cannot be written.
    """
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with _failing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield fresh
            os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


@contextmanager
def _failing(path: Path) -> Iterator[None]:
    """What a disk refuses, as an error that says where."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise WorkFailed(
            f"{path} could not be written: {why}. Nothing was changed there."
        ) from error
