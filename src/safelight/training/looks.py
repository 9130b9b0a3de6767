"""What the untouched model paints for words and sentences, and what a judge says about it.

An encoder puts "hammer" near "axe". Whether the model then paints something unsafe only a picture
can tell. One picture each, few steps, in bfloat16 where the CPU computes in it: this says what a
text is good for, it is not art.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from safelight.flow import Verdict
from safelight.models.base import TextToImage
from safelight.training.descent import Tick, Watch

SHARE = 5  # of the steps that a picture usually takes
BATCH = 32
SEED = 2**30  # far from those of any evaluation
APART = 2**20  # and those of one look from those of the next

Judging = Callable[[Tensor, Sequence[str]], Sequence[Verdict]]


@torch.no_grad()
def paints_unsafe(
    model: TextToImage,
    texts: Sequence[str],
    judge: Judging,
    *,
    looks: int = 1,
    steps: int | None = None,
    watch: Watch | None = None,
) -> list[bool | None]:
    """For each text whether the judge flags what the untouched model paints for it.

    Args:
        looks: How many pictures of a text have to be unsafe, each with noise of its own. Of a text
            that says little to a model, some pictures are unsafe by chance.
        steps: Of the sampler; None is a fifth of the model's own, four at least.
        watch: Told after each batch.

    Returns:
        True where all pictures are flagged, False where the first is not; None where they differ
        or the judge cannot tell.
    """
    steps = steps or max(4, model.sampling.steps // SHARE)
    found = _look(model, texts, judge, steps, SEED, watch)
    for n in range(1, looks):
        flagged = [i for i, flag in enumerate(found) if flag]
        again = _look(model, [texts[i] for i in flagged], judge, steps, SEED + n * APART, watch)
        for i, flag in zip(flagged, again, strict=True):
            found[i] = True if flag else None
    return found


def _look(
    model: TextToImage,
    texts: Sequence[str],
    judge: Judging,
    steps: int,
    seed: int,
    watch: Watch | None,
) -> list[bool | None]:
    """What the judge says of one picture of each text."""
    found: list[bool | None] = []
    for part, pictures in painted(model, texts, steps, seed, rough=True, watch=watch):
        found += [verdict.flagged for verdict in judge(pictures, part)]
    return found


def painted(
    model: TextToImage,
    texts: Sequence[str],
    steps: int,
    seed: int = SEED,
    *,
    rough: bool = False,
    watch: Watch | None = None,
) -> Iterator[tuple[Sequence[str], Float[Tensor, "text 3 height width"]]]:
    """The untouched model's pictures of texts, by batches; text i starts from noise `seed + i`.

    Args:
        rough: In bfloat16 where the CPU computes in it.
        watch: Told after each batch.
    """
    with model.unpatched():
        for start in range(0, len(texts), BATCH):
            part = texts[start : start + BATCH]
            seeds = [seed + start + i for i in range(len(part))]
            condition = model.encode(part)
            fast = rough and _faster_in_bfloat16(model)
            with torch.autocast("cpu", torch.bfloat16, enabled=fast):
                pictures = model.decode(model.sample(condition, seed=seeds, steps=steps))
            yield part, pictures.float()
            if watch is not None:
                watch(Tick(start + len(part), len(texts), 0, {}, "painting for the witness"))


def _faster_in_bfloat16(model: TextToImage) -> bool:
    """Whether the model runs on a CPU with instructions for bfloat16; others only emulate it."""
    ask = getattr(torch.cpu, "get_capabilities", dict)  # since torch 2.11
    known: Mapping[str, object] = ask()
    return model.device.type == "cpu" and bool(known.get("avx512_bf16") or known.get("amx_bf16"))
