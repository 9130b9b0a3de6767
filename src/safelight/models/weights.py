"""The weights of a model: names, hashes, and other tensors in their places for a while.

A place is changed by standing another tensor in it, never by writing into the one that is there. So
what was there comes back bit for bit, and graphs that still hold it stay valid.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from safelight.errors import BadInput


class Weights:
    """The parameters of several modules, named `<module>.<parameter>`.

    Args:
        modules: By name.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = dict(modules)
        self._places = _places(self.modules)
        self._originals: dict[str, Tensor] = {}  # of those that are replaced just now
        self._loaded_as: dict[str, str] = {}  # hash in memory -> hash as stored, see `cast`

    def now(self) -> dict[str, Tensor]:
        """Every parameter as it is now; tied ones appear once, under their first name."""
        return {name: places[0].get() for name, places in self._places.items()}

    def untouched(self, name: str) -> Tensor:
        """A parameter as it is when nothing is replaced."""
        return self._originals.get(name, self._places[name][0].get())

    def hashes(self) -> dict[str, str]:
        """SHA-256 of every module's weights as they are now."""
        found: dict[str, Any] = {module: hashlib.sha256() for module in self.modules}
        for name, value in sorted(self.now().items()):
            module, _, rest = name.partition(".")
            found[module].update(f"{rest}{tuple(value.shape)}".encode())
            found[module].update(value.detach().float().cpu().contiguous().numpy().data)
        return {
            module: self._loaded_as.get(sha.hexdigest(), sha.hexdigest())
            for module, sha in found.items()
        }

    def cast(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move all modules. `hashes` keeps naming the weights as they were before rounding."""
        rounds = dtype != torch.float32 and any(p.dtype != dtype for p in self.now().values())
        before = self.hashes() if rounds else {}
        for module in self.modules.values():
            nn.Module.to(module, device=device, dtype=dtype)  # diffusers' own warns for nothing
            if dtype == torch.float16:  # T5's overflow there
                _keep_precise(module)
        if before:
            self._loaded_as = {now: before[name] for name, now in self.hashes().items()}

    @contextmanager
    def using(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Other tensors in place of some parameters; what was there comes back on exit.

        Raises:
            BadInput: No such parameter, or another shape.
        """
        self._check(values)
        before = {name: self._places[name][0].get() for name in values}
        fresh = {name: value for name, value in before.items() if name not in self._originals}
        self._originals |= fresh
        try:
            self.put(values)
            yield
        finally:
            self.put(before)
            for name in fresh:
                del self._originals[name]

    @contextmanager
    def unpatched(self) -> Iterator[None]:
        """The untouched parameters inside `using`."""
        replaced = {name: self._places[name][0].get() for name in self._originals}
        self.put(self._originals)
        try:
            yield
        finally:
            self.put(replaced)

    def put(self, values: Mapping[str, Tensor]) -> None:
        """Stand tensors in their places, for good."""
        for name, value in values.items():
            for place in self._places[name]:
                place.put(value)

    def _check(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            if name not in self._places:
                raise BadInput(f"the model has no parameter {name!r}.")
            shape = self._places[name][0].get().shape
            if value.shape != shape:
                raise BadInput(
                    f"{name} has shape {tuple(shape)} in the model, not {tuple(value.shape)}."
                )


def plain(name: str) -> str:
    """A text encoder's parameter name without the prefix that transformers 4 has, 5 has not."""
    return name.removeprefix("text_model.")


@dataclass(frozen=True)
class _Place:
    """Where a parameter lives. Plain tensors may stand there too, as in `torch.func`."""

    module: nn.Module
    leaf: str

    def get(self) -> Any:
        return self.module._parameters[self.leaf]

    def put(self, value: Tensor) -> None:
        self.module._parameters[self.leaf] = value  # type: ignore[assignment]


def _places(modules: Mapping[str, nn.Module]) -> dict[str, list[_Place]]:
    """Every parameter's places by name; tied parameters have several places and one name."""
    found: dict[int, tuple[str, list[_Place]]] = {}
    for module_name, module in modules.items():
        for path, owner in module.named_modules():
            for leaf, value in owner._parameters.items():
                if value is None:
                    continue
                name = f"{path}.{leaf}" if path else leaf
                name = f"{module_name}.{plain(name)}"
                found.setdefault(id(value), (name, []))[1].append(_Place(owner, leaf))
    return dict(found.values())


def _keep_precise(module: nn.Module) -> None:
    """Put those layers that their authors want in float32 back there."""
    leaves = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    for name, layer in module.named_modules():
        if name.rpartition(".")[2] in leaves:
            layer.float()
