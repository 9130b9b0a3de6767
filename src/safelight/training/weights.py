"""Lending a model's weights to a training run, and taking them back untouched.

While a loan lasts the model runs on float32 copies of the lent modules' weights, which may be
trained; when it ends, by success, error or Ctrl-C, the model has its own tensors back, bit for bit.
What was learnt is copied out first:

    with full(model, ["clip_l"]) as loan:          # or lora(model, ["clip_l"], rank=..., ...)
        train(loan.parameters.values())
        learnt = loan.learnt()
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from safelight.errors import Unsupported
from safelight.models.base import TextToImage, plain


@dataclass(frozen=True)
class Learnt:
    """A copy of what a loan's weights have become, by the names a patch uses.

    Args:
        full: New values.
        low_rank: (down, up, alpha): the change is `alpha / rank * up @ down`.
    """

    full: Mapping[str, Tensor]
    low_rank: Mapping[str, tuple[Tensor, Tensor, float]]


@dataclass(frozen=True)
class Loan(ABC):
    """Weights that may be trained for a while.

    Args:
        parameters: What an optimiser may change, by name.
    """

    parameters: Mapping[str, nn.Parameter]

    @abstractmethod
    def learnt(self) -> Learnt:
        """A copy of the weights as they are now, on the CPU."""

    @abstractmethod
    def nudge(self, size: float, rng: torch.Generator) -> None:
        """Move every weight by random noise of `size` times its own norm."""

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the trained parameters, for `rewind`."""
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def rewind(self, snapshot: Mapping[str, Tensor]) -> None:
        """Back to a snapshot."""
        for name, value in snapshot.items():
            self.parameters[name].copy_(value)


SMALL = 10**8  # parameters of a denoiser that is far smaller than those of published settings


def small(model: TextToImage) -> bool:
    """Whether a denoiser is far smaller than those of published settings."""
    return sum(p.numel() for p in model.denoiser.parameters()) < SMALL


@contextmanager
def full(
    model: TextToImage,
    modules: Sequence[str],
    *,
    embeddings: bool = True,
    only: Collection[str] | None = None,
) -> Iterator[Loan]:
    """Lend all weights of some modules, with or without their embedding tables.

    Args:
        only: Names of those that may be trained; None is all.
    """
    with _copies(model, modules) as copies:
        tables = set() if embeddings else _tables(model, modules)
        wanted = {
            name: p
            for name, p in copies.items()
            if name not in tables and (only is None or name in only)
        }
        for p in wanted.values():
            p.requires_grad_()
        yield _Full(wanted)


@contextmanager
def lora(
    model: TextToImage,
    modules: Sequence[str],
    *,
    rank: int,
    alpha: float,
    rng: torch.Generator,
    layers: Sequence[str] = (),
    std: float | None = None,
    copied: bool = True,
) -> Iterator[Loan]:
    """Lend low-rank changes of some modules' linear layers (Hu et al., arXiv:2106.09685).

    The adapters are peft's. peft edits a module in place, so a variable that still points at the
    module is not a frozen copy; the original behaviour is to be had with `unadapted`.

    Args:
        layers: Ends of the layers' names, such as "k_proj" or "attn1.to_q"; () is every linear
            layer.
        std: Of the factor A at the start; None is one over the root of the layer's width.
        copied: Run on float32 copies of the weights below the adapters, which no gradient reaches.
            Without, they stay as they are, in their own precision; the adapters are float32.

    Raises:
        Unsupported: A module has no such layer.
    """
    with ExitStack() as stack:
        if copied:
            stack.enter_context(_copies(model, modules))
        wrapped: dict[str, Any] = {}
        for name in modules:
            paths = _linear(name, model.modules[name], layers)
            adapted = _adapted(name, model.modules[name], paths, rank, alpha)
            wrapped |= stack.enter_context(adapted)
        for layer in wrapped.values():
            _seed(layer, rng, std)
        factors = {
            f"{name}.{side}": getattr(layer, f"lora_{side}")["default"].weight
            for name, layer in wrapped.items()
            for side in "AB"
        }
        yield _LowRank(factors, wrapped, alpha)


@contextmanager
def unadapted(model: TextToImage) -> Iterator[None]:
    """Run without what `lora` has lent: the frozen reference, without a second network."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = [part for whole in model.modules.values() for part in whole.modules()]
    layers = [part for part in modules if isinstance(part, BaseTunerLayer)]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@dataclass(frozen=True)
class _Full(Loan):
    def learnt(self) -> Learnt:
        return Learnt({name: value.cpu() for name, value in self.snapshot().items()}, {})

    @torch.no_grad()
    def nudge(self, size: float, rng: torch.Generator) -> None:
        for p in self.parameters.values():
            noise = torch.randn(p.shape, generator=rng).to(p)
            p.add_(noise * size * p.norm() / p.numel() ** 0.5)


@dataclass(frozen=True)
class _LowRank(Loan):
    layers: Mapping[str, Any]  # peft's wrapped linear layers, by the weight they change
    alpha: float

    def learnt(self) -> Learnt:
        now = {name: value.cpu() for name, value in self.snapshot().items()}
        return Learnt(
            {}, {name: (now[f"{name}.A"], now[f"{name}.B"], self.alpha) for name in self.layers}
        )

    @torch.no_grad()
    def nudge(self, size: float, rng: torch.Generator) -> None:
        # B starts at zero, and so does A's gradient; at a stationary point B's is zero as well.
        for name, layer in self.layers.items():
            A, B = (self.parameters[f"{name}.{side}"] for side in "AB")
            noise = torch.randn(B.shape, generator=rng).to(B)
            change = self.alpha / A.shape[0] * (noise @ A)
            B.add_(noise * size * layer.base_layer.weight.norm() / change.norm())


@contextmanager
def _copies(model: TextToImage, modules: Sequence[str]) -> Iterator[dict[str, nn.Parameter]]:
    """Run on float32 copies of some modules' weights."""
    copies = {
        name: nn.Parameter(value.detach().to(torch.float32, copy=True), requires_grad=False)
        for name, value in model.parameters().items()
        if name.partition(".")[0] in modules
    }
    with model.using(copies):
        yield copies


@contextmanager
def _adapted(
    name: str,
    module: nn.Module,
    linear: list[str],
    rank: int,
    alpha: float,
) -> Iterator[dict[str, Any]]:
    """peft's adapters on one module; yields the wrapped layers by the name of their weight."""
    from peft import LoraConfig, PeftModel

    config = LoraConfig(r=rank, lora_alpha=cast(int, alpha), target_modules=linear, bias="none")
    wrapped: Any = PeftModel(cast(Any, module), config)
    try:
        wrapped.eval()
        inner = wrapped.base_model.model
        layers = {f"{name}.{plain(path)}.weight": inner.get_submodule(path) for path in linear}
        yield layers
    finally:
        wrapped.unload()
        module.requires_grad_(False)


def _linear(name: str, module: nn.Module, layers: Sequence[str]) -> list[str]:
    """Paths of a module's linear layers, those whose names end in a certain way if any is given."""
    every = [path for path, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    known = sorted({path.rpartition(".")[2] for path in every})
    absent = [end for end in layers if not any(_ends(path, [end]) for path in every)]
    if absent or not every:
        raise Unsupported(
            f"{name} has no linear layer {' or '.join(absent)} that LoRA could adapt; "
            f"it has {', '.join(known) or 'none'}."
        )
    return [path for path in every if not layers or _ends(path, layers)]


def _ends(path: str, ends: Sequence[str]) -> bool:
    return f".{path}".endswith(tuple(f".{end}" for end in ends))


@torch.no_grad()
def _seed(layer: Any, rng: torch.Generator, std: float | None) -> None:
    """peft draws A from the global generator; ours comes from the run's seed."""
    A = layer.lora_A["default"].weight
    A.copy_(torch.randn(A.shape, generator=rng).to(A) / (1 / std if std else A.shape[1] ** 0.5))


def _tables(model: TextToImage, modules: Sequence[str]) -> set[str]:
    """Names of embedding tables."""
    return {
        f"{name}.{plain(path)}.weight"
        for name in modules
        for path, layer in model.modules[name].named_modules()
        if isinstance(layer, nn.Embedding)
    }
