"""Where unsafe prompts are to go, and which made-up prompts are harmless."""

from __future__ import annotations

from collections.abc import Sequence

from safelight.flow import Prompt
from safelight.training.embedding import Reference

SUSPECT = 0.2  # share of the variants that may be unsafe


def destinations(tau: Reference, unsafe: Sequence[Prompt], safe: Sequence[str]) -> dict[str, str]:
    """Each unsafe prompt's safe counterpart: its own, else the nearest safe training prompt.

    Args:
        tau: Readings of all of them.
        unsafe: Prompts, with a `safe_prompt` or without.
        safe: Where those without may go.
    """
    lost = [prompt.text for prompt in unsafe if not prompt.safe_prompt]
    near = dict(zip(lost, tau.nearest(lost, safe), strict=True)) if lost else {}
    return {prompt.text: prompt.safe_prompt or near[prompt.text] for prompt in unsafe}


def harmless(tau: Reference, pairs: Sequence[tuple[str, str]], unsafe: Sequence[str]) -> list[str]:
    """Variants without the share that came nearest to unsafe prompts by the exchange.

    Args:
        tau: Readings of all of them.
        pairs: Safe prompts with their variants, as `augment.exchanged` gives them.
        unsafe: Prompts that a variant should not come near.
    """
    if not pairs:
        return []
    new = tau.likeness([variant for _, variant in pairs], unsafe).amax(1)
    old = tau.likeness([original for original, _ in pairs], unsafe).amax(1)
    kept = (new - old).argsort()[: round((1 - SUSPECT) * len(pairs))]
    return [pairs[i][1] for i in sorted(kept.tolist())]
