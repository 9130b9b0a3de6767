"""Training that survives being killed: where a run stands, in one file.

The file is safetensors; what is not a tensor is JSON in its header. It is replaced whole or not at
all, so whoever reads it finds a state that the run really was in. The state belongs to one run:
method, settings, weights, data and seed are written into it, and any other run starts anew.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from safelight.errors import BadInput
from safelight.models.folder import replaced_file

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class State:
    """Where a run stands.

    Args:
        tensors: By unambiguous names.
        facts: Plain JSON values.
    """

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names start with a prefix, without it."""
        whole = f"{prefix}:"
        return {k.removeprefix(whole): v for k, v in self.tensors.items() if k.startswith(whole)}


@dataclass
class Checkpoint:
    """A file that a training run keeps up to date, and goes on from.

    Args:
        path: The file; it need not exist. It can be deleted once what was learnt is saved.
        every: Seconds that pass at least before it is written again.
    """

    path: Path
    every: float = 60.0
    _last: float = field(default_factory=time.monotonic, repr=False)

    def due(self) -> bool:
        """Whether it is time to write."""
        return time.monotonic() - self._last >= self.every

    def write(self, state: State, run: Mapping[str, Any]) -> None:
        """Replace the file.

        Args:
            run: What the state belongs to; plain JSON values.

        Raises:
            WorkFailed: The disk is full, or the place cannot be written.
        """
        held = {k: v.detach().cpu().contiguous().clone() for k, v in state.tensors.items()}
        text = {"run": json.dumps(run, sort_keys=True), "facts": json.dumps(dict(state.facts))}
        with replaced_file(self.path) as fresh:
            save_file(held, fresh, metadata=text)
        self._last = time.monotonic()

    def read(self, run: Mapping[str, Any]) -> State | None:
        """Where the run stood; None if there is no file, or one of another run.

        Raises:
            BadInput: The file is not a checkpoint.
        """
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                text = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            theirs, facts = json.loads(text["run"]), json.loads(text["facts"])
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise BadInput(
                f"{self.path} is no training checkpoint that can be read ({error}); delete it to "
                "train from the start."
            ) from None
        ours = json.loads(json.dumps(run))
        other = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
        if other:
            log.warning(
                "%s was left by another run (different: %s); training starts anew",
                *(self.path, ", ".join(other)),
            )
            return None
        return State(tensors, facts)

    def remove(self) -> None:
        """Delete the file: what was learnt is safe elsewhere."""
        self.path.unlink(missing_ok=True)


def packed(optimiser: torch.optim.Optimizer) -> State:
    """An optimiser's state."""
    state = optimiser.state_dict()
    flat = {f"{i}.{key}": x for i, own in state["state"].items() for key, x in own.items()}
    return State(
        {key: x for key, x in flat.items() if isinstance(x, Tensor)},
        {
            "groups": state["param_groups"],
            "plain": {key: x for key, x in flat.items() if not isinstance(x, Tensor)},
        },
    )


def unpacked(optimiser: torch.optim.Optimizer, state: State) -> None:
    """Put a state back into an optimiser."""
    held: dict[int, dict[str, Any]] = {}
    for name, value in {**state.tensors, **state.facts["plain"]}.items():
        i, _, key = name.partition(".")
        held.setdefault(int(i), {})[key] = value
    optimiser.load_state_dict({"state": held, "param_groups": state.facts["groups"]})
