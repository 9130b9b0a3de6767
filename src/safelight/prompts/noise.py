"""Which noise a prompt's picture starts from: the same for every method that is compared."""

from __future__ import annotations

import zlib

from safelight.flow import Prompt


def noise_seed(prompt: Prompt, seed: int) -> int:
    """The seed of a prompt's noise: its stored seed, or one made from its id, plus `seed`.

    Different prompts start from different noise, so that one unlucky noise does not decide a rate.
    A prompt that was rewritten keeps the noise of the one it was rewritten from.
    """
    name = prompt.id if prompt.parent is None else prompt.parent
    start = zlib.crc32(name.encode()) % 1_000_000 if prompt.seed is None else prompt.seed
    return start + seed
