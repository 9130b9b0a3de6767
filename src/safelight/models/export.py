"""Exporting: a plain diffusers folder that needs no Safelight, patches melted in.

The weights of CLIP text encoders are written with the `text_model.` prefix: transformers 5 reads
them with or without it, but 4 silently replaces flat ones by random numbers. For the same reason
tokenizers get the files of both generations.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from safelight.errors import BadInput, Unsupported
from safelight.models.base import TextToImage
from safelight.models.folder import replaced, replaced_file
from safelight.models.load import quiet, tokenizer_part
from safelight.models.patch import Patch, worn
from safelight.models.weights import plain

log = logging.getLogger(__name__)


def export(
    model: TextToImage,
    patches: Sequence[Patch],
    path: str | Path,
    *,
    scales: Sequence[float] | None = None,
) -> Path:
    """Write the model with patches melted in, in the precision it is loaded in.

    Args:
        model: The model the patches were made for.
        patches: They add up.
        path: A new folder, or one that an earlier export wrote.
        scales: One per patch; all 1 if None.

    Raises:
        BadInput: Something else is at `path`, or a patch was made for other weights.
        WorkFailed: It could not be written; what was there before is intact.
    """
    path = Path(path)
    if scales is not None and len(scales) != len(patches):
        raise BadInput(f"there are {len(scales)} scales for {len(patches)} patches.")
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not _is_export(path)):
        raise BadInput(f"{path} exists and is not an earlier export; choose another place.")
    with worn(model, patches, scales), replaced(path) as folder:
        with quiet():
            pipeline_of(model).save_pretrained(folder)
        for name, module in model.text_encoders.items():
            if type(module).__name__.startswith("CLIP"):
                _prefix(folder / model.parts[name])
        _both_tokenizers(model, folder)
        about: dict[str, Any] = {
            "name": path.name,
            "sampling": asdict(model.sampling),
            "patches": [patch.about for patch in patches],
            "scales": list(scales or [1.0] * len(patches)),
        }
        if "t5" in model.tokens:
            about["t5_tokens"] = model.tokens["t5"]
        (folder / "safelight.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    return path


def pipeline_of(model: TextToImage) -> Any:
    """The diffusers pipeline made of the model's own modules, patches as they are on now."""
    import diffusers

    parts: dict[str, Any] = dict.fromkeys(model.parts.values())
    parts |= {model.parts[name]: module for name, module in model.modules.items()}
    for name in model.parts:
        if name not in ("denoiser", "vae"):
            parts[tokenizer_part(type(model), name)] = model.tokenizers.get(name)
    if model.family == "sd1":
        parts |= dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    if model.family == "sdxl":
        force = model.config.get("force_zeros_for_empty_prompt", True)
        parts |= dict(force_zeros_for_empty_prompt=force, add_watermarker=False)
    with quiet():
        return getattr(diffusers, model.pipeline)(scheduler=model.scheduler, **parts)


def prefixed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's weights with the names that transformers 4 and 5 both read."""
    outside = ("text_projection.",)
    return {
        key if key.startswith(outside) else f"text_model.{plain(key)}": value
        for key, value in weights.items()
    }


def _prefix(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        save_file(prefixed(load_file(file)), file, metadata={"format": "pt"})
    for listing in folder.glob("*.safetensors.index.json"):
        about = json.loads(listing.read_text(encoding="utf-8"))
        about["weight_map"] = prefixed(about["weight_map"])
        listing.write_text(json.dumps(about, indent=2), encoding="utf-8")


def _both_tokenizers(model: TextToImage, folder: Path) -> None:
    """transformers 5 writes tokenizer.json only; 4 builds CLIP's from vocab.json, merges.txt."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    for encoder, tokenizer in model.tokenizers.items():
        part = tokenizer_part(type(model), encoder)
        if encoder == "t5":
            index[part] = ["transformers", "T5TokenizerFast"]  # the name both generations know
        _reword(folder / part / "tokenizer_config.json")
        if encoder != "t5" and not (folder / part / "vocab.json").is_file():
            tokenizer.backend_tokenizer.model.save(str(folder / part))
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _reword(file: Path) -> None:
    """transformers 5 lists special tokens under a key where 4 expects a mapping; both read this."""
    about = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(about.get("extra_special_tokens"), list):
        about["additional_special_tokens"] = about.pop("extra_special_tokens")
        file.write_text(json.dumps(about, indent=2), encoding="utf-8")


def _is_export(path: Path) -> bool:
    file = path / "safelight.json"
    return file.is_file() and '"patches"' in file.read_text(encoding="utf-8")


def export_lora(
    model: TextToImage,
    patches: Sequence[Patch],
    path: str | Path,
    *,
    scales: Sequence[float] | None = None,
) -> Path:
    """Write low-rank patches as one LoRA file that `pipeline.load_lora_weights` of diffusers opens.

    Several patches are stacked, which is their exact sum; scale and alpha are in the factors.

    Args:
        model: The model the patches were made for.
        patches: Low-rank throughout.
        path: A `.safetensors` file; an existing one is replaced.
        scales: One per patch; all 1 if None.

    Raises:
        BadInput: A patch has whole tensors or was made for other weights.
        Unsupported: It changes a module whose LoRA diffusers does not load.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise BadInput(f"a LoRA file ends in .safetensors; {path.name} does not.")
    scales = list(scales or [1.0] * len(patches))
    stacks: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for patch, scale in zip(patches, scales, strict=True):
        patch.check(model)
        if patch.full:
            raise BadInput(
                f"the {patch.method} patch changes whole tensors; only low-rank ones fit into a "
                "LoRA file. Export a folder instead, or train with scope=lora."
            )
        for name, (down, up, alpha) in patch.low_rank.items():
            factors = (down.float(), up.float() * (scale * alpha / down.shape[0]))
            stacks.setdefault(name, []).append(factors)
    if not stacks:
        raise BadInput("there is nothing to write: the patches are empty.")
    tensors = {}
    for name, stack in stacks.items():
        layer = _lora_name(model, name)
        tensors[f"{layer}.lora_A.weight"] = torch.cat([down for down, _ in stack]).contiguous()
        tensors[f"{layer}.lora_B.weight"] = torch.cat([up for _, up in stack], 1).contiguous()
    with replaced_file(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    return path


def _lora_name(model: TextToImage, parameter: str) -> str:
    """Where diffusers looks for the LoRA factors of one of our parameters."""
    module, _, rest = parameter.partition(".")
    layer = rest.removesuffix(".weight")
    if module == "denoiser":
        return f"{model.parts['denoiser']}.{layer}"
    if module in ("clip_l", "clip_g") and layer != rest:
        return f"{model.parts[module]}.text_model.{layer}"
    raise Unsupported(f"diffusers loads no LoRA for {module}; export a folder instead.")
