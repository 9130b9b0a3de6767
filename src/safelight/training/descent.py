"""The one training loop that everything trained shares.

A `Descent` says what is trained and what the loss is; this file owns the rest: AdamW, batches,
validation, early stopping, the history of every step, the cost, that Ctrl-C leaves nothing
half-changed, that a killed run goes on where it was (`training.checkpoint`), and that several
processes can train together (`training.team`). `align.base.Trained` makes a patch of what was
learnt, `guard.trained.TrainedGuard` a guard.
"""

from __future__ import annotations

import json
import logging
import math
import platform
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from safelight.errors import BadInput, Unsupported, WorkFailed
from safelight.models.base import TextToImage
from safelight.training.checkpoint import Checkpoint, State, packed, unpacked
from safelight.training.team import Team
from safelight.training.weights import Learnt, Loan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tick:
    """How far a training run is, for whoever draws the progress bar.

    Args:
        step, total: Steps of the descent, or, before it, texts of what is `doing`.
        epoch: 0 before the descent.
        terms: Un-weighted loss terms.
        doing: What takes its time before the descent; "" in it.
    """

    step: int
    total: int
    epoch: int
    terms: Mapping[str, float]
    doing: str = ""


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
        accumulate: Into how many pieces a batch is cut that go through the model one after the
            other: less memory, the same step. Not every method can.
        clip: The largest norm of a step's gradient; 0 is no limit.
        ema: Decay of a moving average of the weights, which is checked and kept in their place;
            0 is none.
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
    accumulate: int = 1
    clip: float = 0.0
    ema: float = 0.0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "lr", "accumulate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise BadInput(f"{name} must be above 0, not {getattr(self, name)}.")
        if not 0 <= self.ema < 1:
            raise BadInput(f"ema must be at least 0 and below 1, not {self.ema}.")

    # What a method says

    @abstractmethod
    def gather(
        self, model: TextToImage, data: Any, *, seed: int, watch: Watch | None = None
    ) -> Any:
        """Everything that stays constant while training; computed once, reusable between fits.

        Args:
            seed: Of every random choice.
            watch: Told of work that takes long.
        """

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

    def pieces(self, batch: Any, n: int) -> Sequence[tuple[float, Any]]:
        """A batch in `n` pieces, each with its share: sum(share * loss) is the batch's loss.

        A method that has this draws everything random in `batches` and nothing in `loss`. Then
        `accumulate` and several processes give the steps that one pass in one process gives, and
        a killed run goes on in the middle of an epoch instead of at its beginning.

        Raises:
            Unsupported: The method cannot.
        """
        raise Unsupported(
            f"{method_name(self)} needs every batch whole, in one process: use accumulate=1 and "
            "no launcher, or a smaller batch."
        )

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
        checkpoint: Checkpoint | None = None,
    ) -> Descended:
        """Learn from what `gather` returned; the model is left as it was, whatever happens.

        Args:
            seed: Of every random choice; the same seed on the same machine learns the same.
            watch: Called after each step.
            meter: Started earlier, so that `gather` counts as well.
            until: Break off after this epoch and keep it, for one point of a known descent.
            checkpoint: Where to keep how far it is, and to go on from if it was killed.

        Raises:
            WorkFailed: The loss is no longer a number.
            Unsupported: A batch cannot be shared out as `accumulate` or the launcher ask for.
        """
        meter = meter or Meter(model.device)
        rng = torch.Generator().manual_seed(seed)
        with self.lend(model, rng) as loan:
            self.start(loan, rng)
            run = _Run(self, model, material, loan, rng, meter)
            if checkpoint is not None:
                run.keep(checkpoint, seed)
            run.through(until, watch or (lambda tick: None))
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


class _Run:
    """A method's descent on some weights, an epoch at a time, until it stops paying.

    Where it stands is `epoch`, `done` batches of it, and the generator as the epoch found it.
    """

    def __init__(
        self,
        method: Descent,
        model: TextToImage,
        material: Any,
        loan: Loan,
        rng: torch.Generator,
        meter: Meter,
    ) -> None:
        self.method, self.model, self.material = method, model, material
        self.loan, self.rng, self.meter = loan, rng, meter
        self.team = Team.here()
        self.cuts = self.team.size * method.accumulate
        self.parameters = list(loan.parameters.values())
        self.adam = method.optimiser(self.parameters, method.rate(model))
        self.epochs = method.passes(model)
        self.total = self.epochs * method.steps(material)
        self.ramp = torch.optim.lr_scheduler.LambdaLR(self.adam, self._rate)
        self.average = loan.snapshot() if method.ema else {}
        self.history: list[dict[str, Any]] = []
        self.curve: list[dict[str, Any]] = []
        self.best: Mapping[str, Tensor] = {}
        self.best_at, self.lowest = 0, math.inf
        self.epoch, self.done, self.began_with = 1, 0, rng.get_state()
        self.why = ""
        self.checkpoint: Checkpoint | None = None
        self.identity: dict[str, Any] = {}

    def _rate(self, done: int) -> float:
        rising = min(1.0, (done + 1) / (self.method.warmup + 1))
        return rising * (1 - done / (self.total + 1) if self.method.anneal else 1)

    def through(self, until: int | None, watch: Watch) -> None:
        """All epochs that are left."""
        if not self.curve:
            self.curve = [{"epoch": 0, **self._checked()}]
        while not self._over(until):
            self.rng.set_state(self.began_with)
            batches = self.method.batches(self.material, self.epoch, self.rng)
            for _ in range(self.done):
                next(batches)
            for batch in batches:
                terms = self._step(batch)
                self.history.append({"step": len(self.history) + 1, "epoch": self.epoch, **terms})
                self.done += 1
                if self.team.index == 0:
                    watch(Tick(len(self.history), self.total, self.epoch, terms))
                if self.cuttable:
                    self._save()
            self._judge(until)
            self.epoch, self.done, self.began_with = self.epoch + 1, 0, self.rng.get_state()
            self._save()

    @property
    def cuttable(self) -> bool:
        """Whether the method's batches can be drawn again without their losses."""
        return type(self.method).pieces is not Descent.pieces

    def _step(self, batch: Any) -> dict[str, float]:
        """One step of the optimiser; the loss's un-weighted terms."""
        pieces = self.method.pieces(batch, self.cuts) if self.cuts > 1 else [(1.0, batch)]
        self.adam.zero_grad(set_to_none=True)
        sums: dict[str, float] = {}
        total = 0.0
        for share, piece in pieces[self.team.index :: self.team.size]:
            device = self.model.device.type
            with torch.autocast(device, torch.bfloat16, enabled=self.method.autocast):
                loss = self.method.loss(self.model, piece, self.rng)
            if self.team.size == 1:
                _require_number(loss.total.item(), len(self.history) + 1)
            (loss.total * share).backward()
            total += share * loss.total.item()
            for name, value in loss.terms.items():
                sums[name] = sums.get(name, 0.0) + share * value
        if self.team.size > 1:
            total, sums = self._added_up(total, sums)
            _require_number(total, len(self.history) + 1)
        if self.method.clip:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.method.clip)
        self.adam.step()
        self.ramp.step()
        self._follow()
        return sums

    def _added_up(self, total: float, terms: dict[str, float]) -> tuple[float, dict[str, float]]:
        """Loss, terms and gradients over all processes."""
        for p in self.parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        grads = [p.grad for p in self.parameters if p.grad is not None]
        figures = torch.tensor([total, *terms.values()], device=self.model.device)
        *sums, whole = self.team.total([*grads, figures])
        for grad, value in zip(grads, sums, strict=True):
            grad.copy_(value)
        total, *each = whole.tolist()
        return total, dict(zip(terms, each, strict=True))

    @torch.no_grad()
    def _follow(self) -> None:
        """The moving average, which starts fast: it forgets the beginning within a few steps."""
        n = len(self.history) + 1
        decay = min(self.method.ema, n / (n + 9))
        for name, value in self.average.items():
            value.lerp_(self.loan.parameters[name].detach(), 1 - decay)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The average in the weights' place, where there is one."""
        now = self.loan.snapshot() if self.average else {}
        self.loan.rewind(self.average)
        try:
            yield
        finally:
            self.loan.rewind(now)

    def _checked(self) -> dict[str, float]:
        return self.team.agreed(self.method.check(self.model, self.material))

    def _judge(self, until: int | None) -> None:
        """Look at held-out data; remember the weights if they are the best so far."""
        with self._averaged():
            seen = self._checked()
            self.curve.append({"epoch": self.epoch, **seen})
            log.info("epoch %d: %s", self.epoch, seen)
            better = seen["objective"] < self.lowest - self.method.tolerance * abs(self.lowest)
            last = self.epoch == until
            if self.epoch == 1 or better or not self.method.patience or last:
                self.best, self.best_at = self.loan.snapshot(), self.epoch
                self.lowest = seen["objective"]

    def _over(self, until: int | None) -> bool:
        past = self.epoch - 1
        if past and past == until:
            self.why = f"asked for epoch {until}"
        elif past and 0 < self.method.patience <= past - self.best_at:
            self.why = f"no improvement since epoch {self.best_at}"
        elif past == self.epochs:
            self.why = f"all {self.epochs} epochs were run"
        return bool(self.why)

    @property
    def stopped(self) -> dict[str, Any]:
        """When and why it ended, and which epoch was kept."""
        rule = (
            f"stop when the held-out objective has not improved by {self.method.tolerance:.1%} for "
            f"{self.method.patience} epochs; keep the best epoch"
            if self.method.patience
            else "run all epochs; keep the last"
        )
        return {"rule": rule, "kept_epoch": self.best_at, "why": self.why}

    # Killed, and started again

    def keep(self, checkpoint: Checkpoint, seed: int) -> None:
        """Write a checkpoint from time to time; go on from what it says of this very run."""
        self.checkpoint = checkpoint
        run = {
            "method": method_name(self.method),
            "settings": asdict(self.method),
            "base": self.model.hashes(),
            "seed": seed,
            "made from": self.method.info(self.material),
            "processes": self.team.size,
            "versions": versions(),
        }
        self.identity = json.loads(json.dumps(run, default=str))
        state = checkpoint.read(self.identity)
        if state is not None:
            self._restore(state)
            log.info("going on after step %d, from %s", len(self.history), checkpoint.path)

    def _save(self) -> None:
        if self.checkpoint is None or self.team.index or not self.checkpoint.due():
            return
        adam, device = packed(self.adam), self.model.device
        held: dict[str, Mapping[str, Tensor]] = {
            "weights": self.loan.snapshot(),
            "average": self.average,
            "best": self.best,
            "adam": adam.tensors,
            "rng": {"run": self.began_with, "torch": torch.get_rng_state()},
        }
        if device.type == "cuda":
            held["rng"] = {**held["rng"], "cuda": torch.cuda.get_rng_state(device)}
        facts = {
            "adam": adam.facts,
            "ramp": {k: v for k, v in self.ramp.state_dict().items() if k != "lr_lambdas"},
            "seconds": self.meter.read()["seconds"],
            **{name: getattr(self, name) for name in _FACTS},
        }
        tensors = {f"{part}:{k}": v for part, own in held.items() for k, v in own.items()}
        self.checkpoint.write(State(tensors, facts), self.identity)

    def _restore(self, state: State) -> None:
        self.loan.rewind(state.under("weights"))
        device = self.model.device
        self.average = {name: x.to(device) for name, x in state.under("average").items()}
        self.best = state.under("best")
        unpacked(self.adam, State(state.under("adam"), state.facts["adam"]))
        self.ramp.load_state_dict({**self.ramp.state_dict(), **state.facts["ramp"]})
        self.meter.began -= state.facts["seconds"]
        for name in _FACTS:
            setattr(self, name, state.facts[name])
        rng = state.under("rng")
        self.began_with = rng["run"]
        torch.set_rng_state(rng["torch"])
        if "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"], device)


_FACTS = ("history", "curve", "best_at", "lowest", "epoch", "done")  # of a run, plain values


def _require_number(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise WorkFailed(
            f"the loss is {loss} at step {step}; try a smaller lr. Nothing was changed or saved."
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
