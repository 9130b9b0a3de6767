"""A short DPO training as a process of its own, to be killed or launched several times.

python pairs_run.py RESULT [--checkpoint FILE] [--kill STEP]
"""

import argparse
import os
import signal
from pathlib import Path

import torch

from safelight.align.base import Checkpoint
from safelight.align.dpo import DPO
from safelight.models.tiny import tiny
from safelight.training.team import Team
from safelight.training.twins import Twin, Twins

METHOD = DPO(iterations=6, epochs=2, batch=4, ema=0.9, lr=1e-3)


def twins():
    """Six pairs."""
    rng = torch.Generator().manual_seed(0)
    rows, pictures = [], {}
    for i in range(6):
        safe, unsafe = f"s{i}", f"u{i}"
        pictures |= {name: torch.rand(3, 16, 16, generator=rng) for name in (safe, unsafe)}
        rows.append(Twin(str(i), "weapons", f"a knife {i}", f"a fish {i}", unsafe, safe, i))
    return Twins("six", tuple(rows), pictures=pictures)


def learn(checkpoint=None, watch=None):
    """The patch."""
    return METHOD.fit(tiny("sd1"), twins(), seed=2, checkpoint=checkpoint, watch=watch)


if __name__ == "__main__":
    torch.set_num_threads(1)
    ask = argparse.ArgumentParser()
    ask.add_argument("result", type=Path)
    ask.add_argument("--checkpoint", type=Path)
    ask.add_argument("--kill", type=int, default=0)
    given = ask.parse_args()

    def watch(tick):
        if tick.step == given.kill:
            os.kill(os.getpid(), signal.SIGKILL)

    keep = Checkpoint(given.checkpoint, every=0.0) if given.checkpoint else None
    patch = learn(keep, watch)
    if Team.here().index == 0:
        patch.save(given.result)
