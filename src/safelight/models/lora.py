"""LoRA files made elsewhere, as patches: a user's style beside a safety patch, or an expert.

diffusers and peft read them, with all the dialects they know, by hanging the factors into the
model's own modules; here they are taken out again, and the modules left as they were. So the scale
is the one that diffusers would have used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from safelight.errors import BadInput, NotFound, Unsupported, WorkFailed
from safelight.models.base import TextToImage, plain
from safelight.models.export import pipeline_of
from safelight.models.load import quiet
from safelight.models.networks import READING, file_sha256, first_line
from safelight.models.patch import LowRank, Patch

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # of a folder of peft
WHY = {
    "use_rslora": "rsLoRA: merging with peft would over-scale it by sqrt(rank)",
    "use_dora": "DoRA: it also rescales every weight, which low-rank factors do not say",
    "lora_bias": "LoRA with biases: they would be lost",
}


def load_lora(model: TextToImage, path: str | Path) -> Patch:
    """A LoRA file as a patch for a model.

    Args:
        model: The model it is for; nothing in a file says which weights it was trained on, so only
            names and shapes are compared.
        path: A `.safetensors` file that diffusers reads, or a folder that peft saved of a denoiser.

    Raises:
        NotFound: Nothing there.
        Unsupported: Of a kind that low-rank factors do not hold: rsLoRA, DoRA, biases.
        BadInput: It does not fit the model, or is no LoRA.
        WorkFailed: The file is damaged.
    """
    path = Path(path)
    file, config = (path / WEIGHTS, path / CONFIG) if path.is_dir() else (path, None)
    if not file.is_file() or (config and not config.is_file()):
        raise NotFound(f"no LoRA at {path}: a .safetensors file, or a folder with {CONFIG}.")
    keys, about = _header(file)
    if config:
        about = json.loads(config.read_text(encoding="utf-8"))
    _require_plain(path, keys, about)
    factors = _read(model, file, config)
    return Patch(
        low_rank=factors,
        method="lora",
        family=model.family,
        info={"file": path.name, "sha256": file_sha256(file)},
    )


def _header(file: Path) -> tuple[list[str], dict[str, Any]]:
    """Names of the tensors, and what diffusers wrote about the adapter."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys()), json.loads(
                (tensors.metadata() or {}).get("lora_adapter_metadata", "{}")
            )
    except READING as error:
        raise WorkFailed(f"{file} cannot be read: {first_line(error)}") from error


def _require_plain(path: Path, keys: list[str], about: Mapping[str, Any]) -> None:
    """Refuse adapters that are more, or else, than `alpha / rank * B A`."""
    said = {key.rpartition(".")[2] for key, value in about.items() if value is True}
    marks = {
        "use_dora": any("dora_scale" in key or "lora_magnitude_vector" in key for key in keys),
        "lora_bias": any(key.endswith((".bias", ".diff_b")) for key in keys),
    }
    for kind, why in WHY.items():
        if kind in said or marks.get(kind):
            raise Unsupported(
                f"{path.name} is a {why}. Train it again as a plain LoRA ({kind}=False)."
            )


def _read(model: TextToImage, file: Path, config: Path | None) -> dict[str, LowRank]:
    pipe = pipeline_of(model)
    try:
        with quiet():
            if config:
                _hang(model.denoiser, file, config)
            else:
                pipe.load_lora_weights(str(file.parent), weight_name=file.name)
            factors = _taken(model)
    except READING as error:
        raise BadInput(f"{file.name} does not fit {model.name}: {first_line(error)}") from error
    finally:
        pipe.unload_lora_weights()
    if not factors:
        raise BadInput(f"{file.name} has no LoRA for any module of {model.name} ({model.family}).")
    return factors


def _hang(denoiser: Any, file: Path, config: Path) -> None:
    """An adapter that peft saved, onto the denoiser it was saved from."""
    from peft import LoraConfig
    from safetensors.torch import load_file

    about = LoraConfig.from_pretrained(str(config.parent)).to_dict()
    tensors = {key.removeprefix("base_model.model."): x for key, x in load_file(file).items()}
    denoiser.load_lora_adapter(tensors, prefix=None, metadata=about)


def _taken(model: TextToImage) -> dict[str, LowRank]:
    """The factors that hang in a model's modules; those of a convolution as matrices."""
    from peft.tuners.lora import LoraLayer

    return {
        f"{module}.{plain(path)}.weight": _factors(layer)
        for module, network in model.modules.items()
        for path, layer in network.named_modules()
        if isinstance(layer, LoraLayer)
    }


def _factors(layer: Any) -> LowRank:
    (name,) = layer.lora_A
    down, up = (_copied(side[name].weight) for side in (layer.lora_A, layer.lora_B))
    return down, up, layer.scaling[name] * len(down)


def _copied(weight: Tensor) -> Tensor:
    return weight.detach().float().cpu().flatten(1).clone()
