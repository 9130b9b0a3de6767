"""Several processes that train one thing together, each on its part of every batch.

    accelerate launch --cpu --num_processes 2 -m safelight align dpo ...

All of them draw the same batches from the same seed; gradients are added up over the processes
before a step, so that all take the same one and their weights stay equal.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Team:
    """The processes of a run.

    Args:
        index: Of this process; 0 is the one that writes files and draws progress bars.
        size: How many there are.
    """

    index: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> Team:
        """The processes that a launcher has started; this one alone if there was none."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        from accelerate import PartialState

        state = PartialState()  # also gives every process a GPU of its own
        return cls(state.process_index, state.num_processes)

    def total(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums over all processes."""
        if self.size == 1 or not tensors:
            return list(tensors)
        from accelerate.utils import reduce

        flat: Any = reduce(torch.cat([x.flatten() for x in tensors]), "sum")
        parts = flat.split([x.numel() for x in tensors])
        return [part.view_as(x) for part, x in zip(parts, tensors, strict=True)]

    def agreed(self, figures: dict[str, float]) -> dict[str, float]:
        """What the first process says, so that all draw the same conclusions from it."""
        if self.size == 1:
            return figures
        from accelerate import PartialState
        from accelerate.utils import broadcast

        own = torch.tensor([*figures.values()], dtype=torch.float64, device=PartialState().device)
        theirs: Any = broadcast(own)
        return dict(zip(figures, theirs.tolist(), strict=True))
