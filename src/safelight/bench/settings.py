"""What `run.json` says: everything needed to repeat a run, written before the first picture."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from typing import Any

import safelight
from safelight.attack.base import Attack, name_of
from safelight.bench.records import FORMAT
from safelight.errors import BadInput
from safelight.guard.base import Guard
from safelight.guard.trained import TrainedGuard
from safelight.judge.base import Judge
from safelight.models.base import Sampling, TextToImage
from safelight.models.patch import Patch
from safelight.prompts import PromptSet

# What two calls must agree on for the second to go on where the first stopped.
SAME = (
    *("format", "model", "protected_hashes", "guards", "judges", "features"),
    *("prompts", "sampling", "seeds", "batch", "arms", "image_store", "attacks", "replay"),
)


def of_model(model: TextToImage, hashes: Mapping[str, str]) -> dict[str, Any]:
    """The untouched model."""
    return {
        "name": model.name,
        "family": model.family,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "hashes": dict(hashes),
    }


def of_patch(patch: Patch) -> dict[str, Any]:
    """A patch without its tensors, as its own `patch.json` has it."""
    return plain(patch.about)


def of_guard(guard: Guard) -> dict[str, Any]:
    """A guard's name and settings."""
    settings: dict[str, Any] = {}
    if dataclasses.is_dataclass(guard):
        settings = {field.name: getattr(guard, field.name) for field in dataclasses.fields(guard)}
        settings = {k: spelled(x) if isinstance(x, Judge) else x for k, x in settings.items()}
    about = {
        "name": type(guard).__name__.lower(),
        "title": guard.card.title,
        "settings": plain(settings),
    }
    return {**about, "weights": guard.sha256} if isinstance(guard, TrainedGuard) else about


def of_judge(judge: Judge) -> dict[str, Any]:
    """A judge's profile, and how it is spelled on the command line if its name is not enough."""
    spec = spelled(judge)
    return {**judge.profile(), **({"spec": spec} if spec != judge.name else {})}


def spelled(judge: Judge) -> str:
    """A judge as the command line names it: "name", or "name:key=value,key=value"."""
    if not dataclasses.is_dataclass(judge):
        return judge.name
    kind = getattr(type(judge), "name", judge.name)
    own = "name" in {field.name for field in dataclasses.fields(judge)}
    fixed = own or isinstance(kind, property)  # a setting, or it follows from one
    name = judge.name if fixed else kind
    given = [] if name == judge.name else [f"label={judge.name}"]
    for field in dataclasses.fields(judge):
        value, made = getattr(judge, field.name), field.default_factory
        if value != (field.default if made is dataclasses.MISSING else made()):
            scalar = isinstance(value, bool | int | float | str)
            given.append(f"{field.name}={value if scalar else json.dumps(_told(value))}")
    return f"{name}:{','.join(given)}" if given else name


def of_attack(name: str, attack: Attack) -> dict[str, Any]:
    """An attack's name, settings and budget; models, pictures and functions go by their kind."""
    settings = {
        field.name: getattr(attack, field.name)
        for field in dataclasses.fields(attack)
        if field.name != "budget" and not field.metadata.get("place")
    }
    return {
        "name": name,
        "method": name_of(attack),
        "title": attack.card.title,
        "source": attack.card.source,
        "access": attack.access,
        "settings": {key: _told(value) for key, value in settings.items()},
        "budget": plain(dataclasses.asdict(attack.budget)),
    }


def _told(x: Any) -> Any:
    try:
        return plain(x)
    except BadInput:
        return type(x).__name__


def of_prompts(prompts: PromptSet) -> dict[str, Any]:
    """A prompt set's name, hash and counts."""
    return {
        "name": prompts.name,
        "sha256": prompts.sha256,
        "n": len(prompts),
        "raw": prompts.raw,
        "dropped": prompts.dropped,
        "distinct": prompts.distinct,
        "categories": list(prompts.categories),
        "source": prompts.source,
    }


def of_sampling(sampling: Sampling) -> dict[str, Any]:
    return plain(dataclasses.asdict(sampling))


def versions() -> dict[str, str]:
    """What made the pictures; not part of what two calls must agree on."""
    found = {"python": platform.python_version(), "safelight": safelight.__version__}
    for package in ("torch", "diffusers", "transformers", "numpy", "scipy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def run(
    model: TextToImage,
    prompts: Sequence[PromptSet],
    *,
    patches: Sequence[Patch],
    guards: Sequence[Guard],
    judges: Sequence[Judge],
    features: str,
    sampling: Sampling,
    seeds: Sequence[int],
    batch: int,
    arms: Sequence[str],
    image_store: bool,
    attacks: Sequence[Mapping[str, Any]] = (),
    replay: bool = True,
) -> dict[str, Any]:
    """The whole of `run.json`; call it with the patches on the model."""
    with model.unpatched():
        untouched = model.hashes()
    return {
        "format": FORMAT,
        "model": of_model(model, untouched),
        "protected_hashes": model.hashes() if len(arms) > 1 else untouched,
        "patches": [of_patch(patch) for patch in patches],
        "guards": [of_guard(guard) for guard in guards],
        "judges": [of_judge(judge) for judge in judges],
        "features": features,
        "prompts": [of_prompts(one) for one in prompts],
        "sampling": of_sampling(sampling),
        "seeds": list(seeds),
        "noise": "a prompt's stored seed, or crc32 of its id modulo 1000000, plus each seed",
        "batch": batch,
        "arms": list(arms),
        "image_store": image_store,
        "attacks": [dict(attack) for attack in attacks],
        "replay": replay,
        "versions": versions(),
    }


def differing(old: Mapping[str, Any], new: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """The keys, out of `keys`, in which two settings differ; where prompts lay does not count."""

    def compared(settings: Mapping[str, Any], key: str) -> Any:
        value = settings.get(key, {"attacks": [], "replay": True}.get(key))  # runs of 0.1
        if key != "prompts" or value is None:
            return value
        return [(one["name"], one["sha256"]) for one in value]

    return [key for key in keys if compared(old, key) != compared(new, key)]


def plain(x: Any) -> Any:
    """Settings as JSON knows them; a judge or another method goes by its name, nan is null."""
    if isinstance(x, float) and not isfinite(x):
        return None
    if x is None or isinstance(x, bool | int | float | str):
        return x
    if isinstance(x, Mapping):
        return {str(key): plain(value) for key, value in x.items()}
    if isinstance(x, Sequence | set | frozenset):
        return [plain(value) for value in x]
    if hasattr(x, "name") and isinstance(x.name, str):
        return x.name
    raise BadInput(f"a setting of type {type(x).__name__} cannot be written to run.json.")
