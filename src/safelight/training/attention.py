"""The attention of a denoiser, by the names that diffusers gives its layers."""

from __future__ import annotations

from torch import nn

# The parts of an attention in diffusers 0.42; the last row are those of joint attention over the
# text's own tokens.
PARTS = (
    "to_q", "to_k", "to_v", "to_out.0",
    "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
)  # fmt: skip
OWN = "attn1"  # where a picture reads itself, in denoisers that read the text elsewhere


def parts(denoiser: nn.Module, own: bool = False) -> tuple[str, ...]:
    """The ends of the names of all attention layers that a denoiser has.

    Args:
        own: Only those of self-attention, in denoisers that keep it apart; others have no such
            layers, and all of theirs are meant.
    """
    paths = [path for path, layer in denoiser.named_modules() if isinstance(layer, nn.Linear)]
    wanted: tuple[str, ...] = PARTS
    if own and any(f".{OWN}." in path for path in paths):
        wanted = tuple(f"{OWN}.{part}" for part in PARTS)
    return tuple(part for part in wanted if any(path.endswith(f".{part}") for path in paths))
