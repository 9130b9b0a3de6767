"""`load`: from a name, a folder, a hub id or a live pipeline to a model handle.

Only safetensors are read, and only classes of diffusers and transformers are built: a model folder
can bring neither pickles nor code. Every file is checked before it is used, because the upstream
loaders replace what is missing by random numbers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from safelight import names
from safelight.errors import BadInput, NotFound, Unsupported, WorkFailed, unknown
from safelight.models.base import Sampling, TextToImage
from safelight.models.flux import Flux
from safelight.models.sd1 import SD1
from safelight.models.sd3 import SD3
from safelight.models.sdxl import SDXL

log = logging.getLogger(__name__)

SMALL = 200_000_000  # parameters up to which float32 costs nothing worth saving
PRECISIONS = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}


def load(
    source: Any,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> TextToImage:
    """A model handle.

    Args:
        source: A built-in name (`safelight list models`), a diffusers folder, a hub id
            ("owner/name", downloaded by diffusers), or a diffusers pipeline object, whose modules
            are then shared with it, frozen and in evaluation mode.
        device: "cpu", "cuda", "mps"; the fastest there is if None (a pipeline's own for pipelines).
        dtype: "float32", "float16", "bfloat16"; if None float32 on a CPU and for small models, else
            the half precision that the family was trained for.

    Raises:
        NotFound: No such name, folder or hub id, or a weight file is missing.
        Unsupported: A model of another kind, pickled weights, or a device that is not here.
        WorkFailed: A file is damaged, or the download failed.
    """
    where = None if device is None else _device(device)
    precision = None if dtype is None else _precision(dtype)
    if isinstance(source, str | Path):
        return _placed(_named(str(source)), where, precision)
    model = from_pipeline(source)
    return _placed(model, where or model.device, precision or model.dtype)


def emoji_world() -> TextToImage:
    """The model that ships with Safelight: a small Stable Diffusion 1 that paints emoji scenes."""
    return from_folder(Path(str(files("safelight"))) / "world" / "model", "emoji-world")


def from_folder(folder: Path, name: str | None = None) -> TextToImage:
    """The model of a diffusers folder, on the CPU, in the precision it is stored in."""
    if not (folder / "model_index.json").is_file():
        raise NotFound(f"{folder} is not a diffusers model: it has no model_index.json.")
    index = _json(folder / "model_index.json")
    classes = {key: tuple(value) for key, value in index.items() if isinstance(value, list)}
    family = _family({part: cls for part, (_, cls) in classes.items() if cls})
    own = _json(folder / "safelight.json") if (folder / "safelight.json").is_file() else {}

    def get(part: str) -> Any:
        if part not in classes or not classes[part][1]:
            return None
        return _component(folder / part, *classes[part])

    return _built(
        family,
        get,
        name=name or own.get("name") or folder.resolve().name,
        sampling=_sampling(own, folder),
        t5_tokens=own.get("t5_tokens"),
        config={key: value for key, value in index.items() if type(value) is bool},
    )


def from_pipeline(pipe: Any) -> TextToImage:
    """The model inside a live diffusers pipeline; its modules are shared, not copied."""
    if not hasattr(pipe, "components") or not hasattr(pipe, "config"):
        raise BadInput(
            f"cannot load a {type(pipe).__name__}; expected a name, a folder, a hub id or a "
            "diffusers pipeline."
        )
    parts = {part: one for part, one in pipe.components.items() if one is not None}
    name = str(getattr(pipe.config, "_name_or_path", "") or pipe.config.get("_name_or_path") or "")
    return _built(
        _family({part: type(one).__name__ for part, one in parts.items()}),
        parts.get,
        name=Path(name).name or type(pipe).__name__,
        config={key: value for key, value in pipe.config.items() if type(value) is bool},
    )


def _named(source: str) -> TextToImage:
    """By built-in name, then folder, then hub id."""
    known = names.table("models")
    if source in known:
        return names.find("models", source)()
    if Path(source).is_dir():
        return from_folder(Path(source))
    owner, slash, rest = source.partition("/")
    if not (slash and owner and rest) or "/" in rest or owner in (".", "..", "~"):
        looks_like_a_path = slash or source.startswith((".", "~"))
        raise NotFound(
            f"there is no model folder at {source}."
            if looks_like_a_path
            else unknown("model", source, known)
        )
    return from_folder(_downloaded(source), source)


def _downloaded(hub_id: str) -> Path:
    from diffusers import DiffusionPipeline
    from huggingface_hub import errors

    log.info("fetching %s from the hub (kept in its cache)", hub_id)
    try:
        return Path(DiffusionPipeline.download(hub_id, use_safetensors=True))
    except (errors.HFValidationError, errors.RepositoryNotFoundError) as error:
        raise NotFound(
            f"there is neither a folder nor a hub model named {hub_id!r} (or it needs a login)."
        ) from error
    except (OSError, ValueError, errors.HTTPError) as error:  # of whichever client it has
        raise WorkFailed(
            f"there is no folder {hub_id!r}, and it could not be fetched from the hub. Is this "
            f"machine offline, or the name misspelt? ({_first_line(error)[:100]} ...)"
        ) from error


# Families

FAMILIES: tuple[type[TextToImage], ...] = (SD1, SDXL, SD3, Flux)
_MAPPING: dict[tuple[str, bool], type[TextToImage]] = {
    ("UNet2DConditionModel", False): SD1,
    ("UNet2DConditionModel", True): SDXL,
    ("SD3Transformer2DModel", True): SD3,
    ("FluxTransformer2DModel", True): Flux,
}


def _family(classes: Mapping[str, str]) -> type[TextToImage]:
    """By the denoiser's class and whether there is a second text encoder."""
    denoiser = classes.get("unet") or classes.get("transformer") or "no denoiser"
    family = _MAPPING.get((denoiser, "text_encoder_2" in classes))
    missing = [part for part in ("vae", "text_encoder", "scheduler") if part not in classes]
    if family is None or missing:
        raise Unsupported(
            f"this is a model with {denoiser}"
            + (f" and without {', '.join(missing)}" if missing else "")
            + "; Safelight reads text-to-image models of the families sd1, sdxl, sd3 and flux."
        )
    return family


def _built(family: type[TextToImage], get: Any, **settings: Any) -> TextToImage:
    parts = {name: get(part) for name, part in family.parts.items()}
    modules = {name: module for name, module in parts.items() if module is not None}
    encoders = {name: m for name, m in modules.items() if name not in ("denoiser", "vae")}
    lost = [name for name in family.parts if name not in modules and name != "t5"]
    if lost or (family is Flux and "t5" not in modules):
        raise NotFound(f"the model has no {', '.join(lost or ['t5'])}.")
    channels = modules["denoiser"].config.in_channels
    latent = modules["vae"].config.latent_channels
    if family is not Flux and channels != latent:
        raise Unsupported(
            f"the denoiser reads {channels} channels and the autoencoder makes {latent}: this is "
            "not a text-to-image model (an inpainting model, perhaps)."
        )
    tokenizers = {name: get(tokenizer_part(family, name)) for name in encoders}
    for name, tokenizer in tokenizers.items():
        if tokenizer is None:
            raise NotFound(f"the model has no tokenizer for {name}.")
        words = encoders[name].config.vocab_size
        if len(tokenizer) > words:
            raise WorkFailed(
                f"the tokenizer of {name} knows {len(tokenizer)} tokens, the encoder {words}: they "
                "are not from the same model."
            )
    return family(
        denoiser=modules["denoiser"],
        vae=modules["vae"],
        text_encoders=encoders,
        tokenizers=tokenizers,
        scheduler=get("scheduler"),
        **settings,
    )


def tokenizer_part(family: type[TextToImage], encoder: str) -> str:
    """The pipeline's name of an encoder's tokenizer."""
    return family.parts[encoder].replace("text_encoder", "tokenizer")


# Folders


def _component(folder: Path, library: str, cls: str) -> Any:
    """One part of a pipeline folder."""
    if library not in ("diffusers", "transformers") or not hasattr(import_module(library), cls):
        raise Unsupported(
            f"{folder} needs {library}.{cls}, which is not part of the installed diffusers and "
            "transformers; code that comes with a model is never run."
        )
    if not folder.is_dir():
        raise NotFound(f"{folder} is missing; the model is incomplete.")
    for file in folder.glob("*.json"):
        _json(file)
    kind = getattr(import_module(library), cls)
    if folder.name.startswith("tokenizer"):
        _require_vocabulary(folder)
    try:
        if issubclass(kind, torch.nn.Module):
            return _module(folder, kind, library)
        return kind.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise WorkFailed(f"{folder} cannot be read: {_first_line(error)}") from error


def _require_vocabulary(folder: Path) -> None:
    """transformers builds an empty tokenizer where the files are missing, and says nothing."""
    here = {file.name for file in folder.iterdir()}
    enough = ({"tokenizer.json"}, {"vocab.json", "merges.txt"}, {"spiece.model"})
    if not any(files <= here for files in enough):
        raise NotFound(f"{folder} has no vocabulary; expected tokenizer.json. Fetch it again.")


def _module(folder: Path, kind: Any, library: str) -> torch.nn.Module:
    stored = _stored(folder)
    dtype = {"dtype" if library == "transformers" else "torch_dtype": stored.dtype}
    with quiet():
        module, info = kind.from_pretrained(
            folder,
            variant=stored.variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **dtype,
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise WorkFailed(
            f"{folder} lacks {len(missing)} weights of {kind.__name__}, {missing[0]!r} first; "
            "they would have become random numbers. Fetch the model again."
        )
    return module


@dataclass(frozen=True)
class _Stored:
    dtype: torch.dtype
    variant: str | None


def _stored(folder: Path) -> _Stored:
    """The precision and variant of the weights in a folder; every file is opened once."""
    found = sorted(folder.glob("*.safetensors"))
    plain = [file for file in found if file.name.count(".") == 1]
    if not found:
        pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.ckpt")])
        if pickled:
            raise Unsupported(
                f"{pickled[0]} is pickled; only safetensors are read. Convert it, or fetch the "
                "model's safetensors."
            )
        raise NotFound(f"{folder} has no safetensors file; the model is incomplete.")
    for listing in folder.glob("*.safetensors.index*.json"):
        shards = {folder / name for name in _json(listing).get("weight_map", {}).values()}
        lost = sorted(file.name for file in shards if not file.is_file())
        if lost:
            raise NotFound(f"{folder} lacks {lost[0]}; the model is incomplete.")
    dtypes = [_first_dtype(file) for file in plain or found]
    return _Stored(dtypes[0], None if plain else found[0].name.split(".")[1])


def _first_dtype(file: Path) -> torch.dtype:
    """Opening a file compares its size to its table of contents, so truncation shows here."""
    try:
        with safe_open(file, framework="pt") as tensors:
            keys = list(tensors.keys())
            if keys:
                return _KINDS.get(tensors.get_slice(keys[0]).get_dtype(), torch.float32)
    except SafetensorError as error:
        raise WorkFailed(
            f"{file} is damaged or truncated ({error}). Fetch the model again."
        ) from error
    raise WorkFailed(f"{file} is empty. Fetch the model again.")


_KINDS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WorkFailed(f"{file} is damaged: {error}. Fetch the model again.") from error


def _sampling(own: Mapping[str, Any], folder: Path) -> Sampling | None:
    """The defaults in a folder's `safelight.json`: {"sampling": {steps, guidance, size}}."""
    said = own.get("sampling")
    if said is None:
        return None
    try:
        height, width = said["size"]
        return Sampling(int(said["steps"]), float(said["guidance"]), (int(height), int(width)))
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(
            f"{folder / 'safelight.json'}: sampling must have steps, guidance and size "
            f"[height, width]; got {said}."
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers draws and says while models are read and written."""
    from transformers.utils import logging as upstream

    drawn, loudness = upstream.is_progress_bar_enabled(), upstream.get_verbosity()
    upstream.disable_progress_bar()
    upstream.set_verbosity_error()
    try:
        yield
    finally:
        upstream.set_verbosity(loudness)
        if drawn:
            upstream.enable_progress_bar()


# Devices


def _placed(
    model: TextToImage, device: torch.device | None, dtype: torch.dtype | None
) -> TextToImage:
    device = device or best_device()
    dtype = dtype or _fitting(model, device)
    model.cast(device=device, dtype=dtype)
    log.info("%s (%s) in %s on %s", model.name, model.family, str(dtype)[6:], device)
    return model


def best_device() -> torch.device:
    """CUDA, else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _fitting(model: TextToImage, device: torch.device) -> torch.dtype:
    if device.type == "cpu":
        return torch.float32
    if sum(p.numel() for p in model.denoiser.parameters()) <= SMALL:
        return torch.float32
    trained_in_bfloat16 = model.family in ("sd3", "flux")
    if trained_in_bfloat16 and (device.type != "cuda" or torch.cuda.is_bf16_supported()):
        return torch.bfloat16
    return torch.float16


def _device(device: str | torch.device) -> torch.device:
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise BadInput(f"{device!r} is no device; use cpu, cuda, cuda:1 or mps.") from error
    here = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    if (wanted.index or 0) >= here.get(wanted.type, 0):
        raise Unsupported(f"there is no {wanted} here; the best there is is {best_device()}.")
    return wanted


def _precision(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        if dtype in PRECISIONS.values():
            return dtype
        raise Unsupported(f"{dtype} is not supported; use float32, float16 or bfloat16.")
    if dtype not in PRECISIONS:
        raise NotFound(unknown("precision", dtype, PRECISIONS))
    return PRECISIONS[dtype]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
