"""What the stages share: resumable training without pickles, EMA, a log of time and loss."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def warm_start(module: nn.Module, folder: Path, prefix: str) -> None:
    """Begin from the averaged weights of an earlier, possibly narrower, build's stage."""
    old = load_file(folder / "state.safetensors")
    with torch.no_grad():
        for name, p in module.named_parameters():
            before = old.get(f"e.{prefix}.{name}")
            if before is not None and before.dim() == p.dim():
                part = tuple(slice(min(a, b)) for a, b in zip(before.shape, p.shape, strict=True))
                p[part] = before[part]


def place() -> tuple[int, int]:
    """This process's number and how many there are (`torchrun`), 0 of 1 without."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class Loop:
    """Run `step(i) -> loss` until `steps`, saving and resuming at `folder`.

    Several processes each take their own steps and average their weights every eighth (local SGD).

    Everything random in a step must come from its number, so that a resumed run goes on as if
    nothing had happened. Parameters, Adam moments and EMA weights live in one safetensors file.
    """

    def __init__(
        self,
        folder: Path,
        modules: Mapping[str, nn.Module],
        *,
        steps: int,
        lr: float,
        warmup: int = 200,
        ema: float = 0.999,
        clip: float = 1.0,
        weight_decay: float = 0.01,
        save_every: float = 120.0,
        seconds: float | None = None,
    ) -> None:
        self.folder, self.steps, self.lr, self.warmup, self.ema_decay = (
            folder,
            steps,
            lr,
            warmup,
            ema,
        )
        self.clip, self.save_every, self.seconds = clip, save_every, seconds
        folder.mkdir(parents=True, exist_ok=True)
        self.names = [
            (f"{m}.{n}", p)
            for m, module in modules.items()
            for n, p in module.named_parameters()
            if p.requires_grad
        ]
        self.optimizer = torch.optim.AdamW(
            [p for _, p in self.names], lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99)
        )
        self.ema = {n: p.detach().clone() for n, p in self.names}
        self.done, self.spent, self.log = 0, 0.0, []
        if (folder / "state.safetensors").exists():
            self._resume()

    def rate(self, i: int) -> float:
        """Warm-up, then a half cosine over steps (or over time, when a time budget is set)."""
        part = i / self.steps if self.seconds is None else min(1.0, self.spent / self.seconds)
        return (
            self.lr
            * min(1.0, (i + 1) / self.warmup)
            * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * part)))
        )

    def run(self, step: Callable[[int], Tensor]) -> None:
        started, base, saved, losses = time.time(), self.spent, time.time(), []
        rank, ranks = place()
        while self.done < self.steps and (self.seconds is None or self.spent < self.seconds):
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(self.done)
            loss = step(self.done * ranks + rank)
            loss.backward()
            nn.utils.clip_grad_norm_([p for _, p in self.names], self.clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.done += 1
            decay = min(self.ema_decay, (1 + self.done) / (10 + self.done))
            with torch.no_grad():
                torch._foreach_lerp_(
                    list(self.ema.values()), [p.detach() for _, p in self.names], 1 - decay
                )
            losses.append(loss.item())
            if ranks == 1:
                self.spent = base + time.time() - started
            elif self.done % 8 == 0:
                self.spent = self._meet(base + time.time() - started)
            if self.done % 50 == 0 and rank == 0:
                row = {
                    "step": self.done,
                    "seconds": round(self.spent, 1),
                    "loss": round(sum(losses) / len(losses), 5),
                }
                self.log.append(row)
                print(self.folder.name, row, flush=True)
                losses = []
            if time.time() - saved > self.save_every and rank == 0:
                self.save()
                saved = time.time()
        if rank == 0:
            self.save()
            (self.folder / "done").write_text("")

    def _meet(self, spent: float) -> float:
        """Average the weights of all processes; the first one's clock is everybody's."""
        every = nn.utils.parameters_to_vector([p.detach() for _, p in self.names])
        clock = torch.tensor(spent, dtype=torch.float64)
        dist.all_reduce(every)
        dist.broadcast(clock, 0)
        with torch.no_grad():
            nn.utils.vector_to_parameters(every / dist.get_world_size(), [p for _, p in self.names])
        return clock.item()

    @property
    def finished(self) -> bool:
        return (self.folder / "done").exists()

    def save(self) -> None:
        tensors: dict[str, Tensor] = {}
        for n, p in self.names:
            tensors[f"p.{n}"] = p.detach().contiguous()
            tensors[f"e.{n}"] = self.ema[n].contiguous()
            for k in ("exp_avg", "exp_avg_sq"):
                state = self.optimizer.state.get(p)
                if state:
                    tensors[f"{k}.{n}"] = state[k].contiguous()
        meta = {"done": str(self.done), "spent": str(self.spent), "log": json.dumps(self.log)}
        save_file(tensors, self.folder / "state.tmp", metadata=meta)
        os.replace(self.folder / "state.tmp", self.folder / "state.safetensors")

    def _resume(self) -> None:
        from safetensors import safe_open

        path = self.folder / "state.safetensors"
        with safe_open(path, "pt") as f:
            meta = f.metadata()
        tensors = load_file(path)
        self.done, self.spent = int(meta["done"]), float(meta["spent"])
        self.log = json.loads(meta["log"])
        with torch.no_grad():
            for n, p in self.names:
                p.copy_(tensors[f"p.{n}"])
                self.ema[n].copy_(tensors[f"e.{n}"])
                if f"exp_avg.{n}" in tensors:
                    self.optimizer.state[p] = {
                        "step": torch.tensor(float(self.done)),
                        "exp_avg": tensors[f"exp_avg.{n}"].clone(),
                        "exp_avg_sq": tensors[f"exp_avg_sq.{n}"].clone(),
                    }

    def use_ema(self) -> None:
        """Put the averaged weights into the modules (for export)."""
        with torch.no_grad():
            for n, p in self.names:
                p.copy_(self.ema[n])
