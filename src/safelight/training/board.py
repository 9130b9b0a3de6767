"""Training curves in TensorBoard's files, for whoever wants to look while it learns.

    with board(Path("logs")) as watch:
        patch = DPO().fit(model, twins, watch=watch)

`tensorboard --logdir logs` draws them. A run that was killed and goes on writes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safelight.models.networks import package
from safelight.training.descent import Tick, Watch


@contextmanager
def board(folder: Path, also: Watch | None = None) -> Iterator[Watch]:
    """A watch that writes every step's un-weighted loss terms, as `train/TERM` by step.

    Args:
        folder: Where TensorBoard's event files go; made if there is none.
        also: Told as well, such as a progress bar.

    Raises:
        MissingExtra: tensorboard is not installed.
    """
    package("tensorboard", "tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:

        def watch(tick: Tick) -> None:
            for name, value in tick.terms.items():  # before the descent there are none
                writer.add_scalar(f"train/{name}", value, tick.step)
            if also is not None:
                also(tick)

        yield watch
