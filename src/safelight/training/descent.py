"""The one training loop that everything trained shares.

A `Descent` says what is trained and what the loss is; this file owns the rest: AdamW, batches,
validation, early stopping, the history of every step, the cost, and that Ctrl-C leaves nothing
half-changed. `align.base.Trained` makes a patch of what was learnt, `guard.trained.TrainedGuard` a
guard.
"""

from __future__ import annotations

import logging
import math
import platform
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from safelight.errors import BadInput, WorkFailed
from safelight.models.base import TextToImage
from safelight.training.weights import Learnt, Loan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tick:
    """How far a training run is, for whoever draws the progress bar."""

    step: int
    total: int
    epoch: int
    terms: Mapping[str, float]


Watch = Callable[[Tick], None]


@dataclass(frozen=True)
class Loss:
    """What is minimised, and the un-weighted terms that it is made of."""

    total: Float[Tensor, ""]
    terms: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Descent(ABC):
    """Something found by gradient descent.

    Training stops when `check`'s "objective" on held-out data has not improved by `tolerance` (of
    its best value) for `patience` epochs; the best epoch's weights are kept. Epoch 0, the untouched
    model, does not count as a candidate.

    Args:
        epochs: Passes over the data, at most; None leaves it to the method, by the model's size.
        batch: Prompts or pictures per step.
        lr: Learning rate of AdamW; None leaves it to the method, by the model's size.
        warmup: Steps in which the learning rate rises linearly.
        anneal: Let the learning rate fall linearly towards zero over all epochs.
        decay: Weight decay. Zero by default: it would move weights that no example speaks for.
        patience: Epochs without improvement before stopping; 0 runs all and keeps the last.
        tolerance: Relative improvement that counts.
        autocast: Compute the losses in bfloat16 where that is safe; weights stay float32. Faster on
            GPUs, and on CPUs that know bfloat16.
    """

    epochs: int | None = 1
    batch: int = 128
    lr: float | None = 1e-5
    warmup: int = 0
    anneal: bool = True
    decay: float = 0.0
    patience: int = 2
    tolerance: float = 0.01
    autocast: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "lr"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise BadInput(f"{name} must be above 0, not {getattr(self, name)}.")

    # What a method says

    @abstractmethod
    def gather(self, model: TextToImage, data: Any, *, seed: int) -> Any:
        """Everything that stays constant while training; computed once, reusable between fits."""

    @abstractmethod
    def lend(self, model: TextToImage, rng: torch.Generator) -> AbstractContextManager[Loan]:
        """The weights to be trained."""

    @abstractmethod
    def steps(self, material: Any) -> int:
        """Steps per epoch."""

    @abstractmethod
    def batches(self, material: Any, epoch: int, rng: torch.Generator) -> Iterator[Any]:
        """The batches of one epoch; the first epoch is 1."""

    @abstractmethod
    def loss(self, model: TextToImage, batch: Any, rng: torch.Generator) -> Loss:
        """What is minimised on one batch."""

    @abstractmethod
    def check(self, model: TextToImage, material: Any) -> dict[str, float]:
        """Figures on held-out data; "objective" (lower is better) decides when to stop."""

    def rate(self, model: TextToImage) -> float:
        """The learning rate on a model."""
        return self.lr or 1e-5

    def passes(self, model: TextToImage) -> int:
        """The number of epochs on a model."""
        return self.epochs or 1

    def optimiser(self, parameters: list[Any], lr: float) -> torch.optim.Optimizer:
        """AdamW, unless a method was published with another."""
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=self.decay)

    def start(self, loan: Loan, rng: torch.Generator) -> None:  # noqa: B027  may stay empty
        """A last word before the first step."""

    def info(self, material: Any) -> dict[str, Any]:
        """What else the patch should remember about how it was made."""
        return {}

    # What every method gets

    def descend(
        self,
        model: TextToImage,
        material: Any,
        *,
        seed: int = 0,
        watch: Watch | None = None,
        meter: Meter | None = None,
        until: int | None = None,
    ) -> Descended:
        """Learn from what `gather` returned; the model is left as it was, whatever happens.

        Args:
            seed: Of every random choice; the same seed on the same machine learns the same.
            watch: Called after each step.
            meter: Started earlier, so that `gather` counts as well.
            until: Break off after this epoch and keep it, for one point of a known descent.

        Raises:
            WorkFailed: The loss is no longer a number.
        """
        meter = meter or Meter(model.device)
        rng = torch.Generator().manual_seed(seed)
        with self.lend(model, rng) as loan:
            self.start(loan, rng)
            run = _descend(self, model, material, loan, rng, watch or (lambda tick: None), until)
            loan.rewind(run.best)
            learnt = loan.learnt()
            count = sum(p.numel() for p in loan.parameters.values())
        info = {
            "seed": seed,
            "lr": self.rate(model),
            "cost": {**meter.read(), "parameters": count},
            "history": run.history,
            "pareto": run.curve,
            "stopped": run.stopped,
            "versions": versions(),
            **self.info(material),
        }
        return Descended(learnt, info)


@dataclass(frozen=True)
class Descended:
    """What was learnt, and what should be remembered about how."""

    learnt: Learnt
    info: dict[str, Any]


def method_name(method: object) -> str:
    """The name in the table, which is the module's name."""
    return type(method).__module__.rpartition(".")[2]


@dataclass
class _Run:
    """What a descent leaves behind."""

    best: Mapping[str, Tensor]
    history: list[dict[str, Any]]
    curve: list[dict[str, Any]]
    stopped: dict[str, Any]


def _descend(
    method: Descent,
    model: TextToImage,
    material: Any,
    loan: Loan,
    rng: torch.Generator,
    watch: Watch,
    until: int | None,
) -> _Run:
    """AdamW on the method's loss, an epoch at a time, until it stops paying."""
    parameters = list(loan.parameters.values())
    adam = method.optimiser(parameters, method.rate(model))
    epochs = method.passes(model)
    total = epochs * method.steps(material)

    def rate(done: int) -> float:
        rising = min(1.0, (done + 1) / (method.warmup + 1))
        return rising * (1 - done / (total + 1) if method.anneal else 1)

    ramp = torch.optim.lr_scheduler.LambdaLR(adam, rate)
    history: list[dict[str, Any]] = []
    curve = [{"epoch": 0, **method.check(model, material)}]
    best, best_at, lowest = {}, 0, math.inf
    why = f"all {epochs} epochs were run"

    for epoch in range(1, epochs + 1):
        for batch in method.batches(material, epoch, rng):
            with torch.autocast(model.device.type, torch.bfloat16, enabled=method.autocast):
                loss = method.loss(model, batch, rng)
            _require_number(loss, len(history) + 1)
            adam.zero_grad(set_to_none=True)
            loss.total.backward()
            adam.step()
            ramp.step()
            history.append({"step": len(history) + 1, "epoch": epoch, **loss.terms})
            watch(Tick(len(history), total, epoch, loss.terms))

        seen = method.check(model, material)
        curve.append({"epoch": epoch, **seen})
        log.info("epoch %d: %s", epoch, seen)
        better = seen["objective"] < lowest - method.tolerance * abs(lowest)
        if epoch == 1 or better or not method.patience or epoch == until:
            best, best_at, lowest = loan.snapshot(), epoch, seen["objective"]
        if epoch == until:
            why = f"asked for epoch {until}"
            break
        if 0 < method.patience <= epoch - best_at:
            why = f"no improvement since epoch {best_at}"
            break

    rule = (
        f"stop when the held-out objective has not improved by {method.tolerance:.1%} for "
        f"{method.patience} epochs; keep the best epoch"
        if method.patience
        else "run all epochs; keep the last"
    )
    return _Run(best, history, curve, {"rule": rule, "kept_epoch": best_at, "why": why})


def _require_number(loss: Loss, step: int) -> None:
    if not math.isfinite(loss.total.item()):
        raise WorkFailed(
            f"the loss is {loss.total.item()} at step {step}; try a smaller lr. "
            "Nothing was changed or saved."
        )


@dataclass
class Meter:
    """Seconds and peak memory since it was made."""

    device: torch.device
    began: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def read(self) -> dict[str, Any]:
        """Cost so far; on a CPU the memory is the whole process's highest."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / 2**20
        else:
            peak = _process_peak()
        return {
            "seconds": round(time.perf_counter() - self.began, 2),
            "peak_memory_mb": round(peak, 1),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
        }


def _process_peak() -> float:
    """The most memory this process has held, in MB; nan where the system does not say."""
    if sys.platform == "win32":
        return math.nan
    import resource

    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def versions() -> dict[str, str]:
    """What a patch was made with."""
    packages = ("safelight", "torch", "transformers", "diffusers", "peft")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
