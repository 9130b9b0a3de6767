"""What training leaves on disk: a folder with one JSON file and `weights.safetensors`.

The JSON file is named after what the folder is (`patch.json`, `guard.json`), carries a format
number and the weights' SHA-256. Nothing is ever pickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from safelight.errors import BadInput, NotFound, Unsupported, WorkFailed
from safelight.models.folder import replaced

WEIGHTS = "weights.safetensors"


def is_a(kind: str, path: Path) -> bool:
    """Whether a folder is a patch, a guard, ..."""
    return (path / f"{kind}.json").is_file()


def save(kind: str, path: Path, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write the folder; either all of it is there afterwards or nothing has changed.

    Args:
        kind: What it is, "patch" or "guard".
        path: The folder.
        about: All but the tensors; plain JSON values, among them "format".
        tensors: By unambiguous names.

    Raises:
        BadInput: Something else is in the way, or `about` is not plain.
        WorkFailed: It could not be written.
    """
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not is_a(kind, path)):
        raise BadInput(f"{path} exists and is not a {kind}; choose another place.")
    with replaced(path) as folder:
        held = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        save_file(held, folder / WEIGHTS, metadata={"format": f"safelight-{kind}"})
        whole = {**about, "weights_sha256": _sha256(folder / WEIGHTS)}
        (folder / f"{kind}.json").write_text(_json(kind, whole), encoding="utf-8")


def load(
    kind: str, path: Path, needed: Iterable[str], newest: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a folder that `save` wrote.

    Args:
        kind: What it should be.
        path: The folder.
        needed: What its JSON file must have, beside "format".
        newest: The newest format that can be read.

    Raises:
        NotFound: No such folder, or its weights are missing.
        Unsupported: It was written by a newer version.
        WorkFailed: A file is damaged.
    """
    if not is_a(kind, path):
        raise NotFound(f"there is no {kind} at {path}: it has no {kind}.json.")
    about = _read(path / f"{kind}.json", {"format", "weights_sha256", *needed}, newest)
    weights = path / WEIGHTS
    if not weights.is_file():
        raise NotFound(f"the {kind} at {path} has lost its {WEIGHTS}.")
    if about["weights_sha256"] != _sha256(weights):
        raise WorkFailed(f"{weights} is damaged: its hash is not the one in {kind}.json.")
    try:
        return about, load_file(weights)
    except SafetensorError as error:
        raise WorkFailed(f"{weights} cannot be read: {error}.") from error


def _read(path: Path, needed: set[str], newest: int) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WorkFailed(f"{path} is damaged: {error}.") from error
    if not isinstance(about, dict) or not needed <= about.keys():
        raise WorkFailed(f"{path} is damaged: it lacks some of {', '.join(sorted(needed))}.")
    if about["format"] > newest:
        raise Unsupported(
            f"{path} has format {about['format']}; this version reads up to {newest}. "
            "Update safelight."
        )
    return about


def _json(kind: str, about: Mapping[str, Any]) -> str:
    try:
        return json.dumps(about, indent=1, ensure_ascii=False)
    except TypeError as error:
        raise BadInput(
            f"a {kind}'s settings and info must be plain JSON values: {error}."
        ) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
