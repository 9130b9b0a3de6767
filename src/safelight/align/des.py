"""DES: distort the embedding space so that unsafe prompts read as far-away safe ones.

With `u_i`, `s_i` the flattened original readings of unsafe and safe prompts, `n` that of the
concept's own prompt and `e_0` that of "", a tilde for the encoder in training, and
cosdist(a, b) = 1 - cos(a, b):

    n_hat = n / |n|                                                 over the flattened tensor
    s*_i  = argmin over safe prompts s of cos(s, u_i)               the codebook's farthest entry
    t_i   = s*_i - alpha n_hat                                      s* as it is, not normalised

    L_u = mean cosdist(u~_i, t_i)
    L_s = mean [cosdist(s~_i, s_i) + cosdist(s~_i + alpha n_hat, s_i)]
    L_n = cosdist(n~, e_0)
    L   = lambda L_s + (1 - lambda) (L_u + L_n)

Targets use the original encoder only and are computed once. Safe and unsafe prompts are zipped
lists, no pairs; the shorter is repeated.

Source: Ahn, Jung, "Mitigating Sexual Content Generation via Embedding Distortion in
Text-conditioned Diffusion Models", NeurIPS 2025, arXiv:2501.18877; written from the formulas, with
the settings of the published training script (lambda 0.3, alpha 200, AdamW 1e-5, 2 epochs of 128).

Ours, beyond the paper:
- *Several categories.* Each has a concept of its own; an unsafe prompt, and the safe one beside it,
  use their category's direction, and L_n is averaged over the concepts.
- *alpha* is a norm. A layer-normed CLIP-L reading has one of about 243, so 200 is 0.82 of it, and
  encoders of other sizes get that share of theirs. It is called `alpha_n`: `alpha` is LoRA's.
- *Small encoders* take lambda 0.6, alpha 50 and batches of 32 where nothing else is asked for.
- *Empty prompt.* L_0 = cosdist(e~_0, e_0) joins L_s: every guided picture is painted against "".
- *All encoders.* The terms are on what the denoiser really reads: token states of the layer it is
  given, and pooled vectors. Each has its own codebook.

Needs two lists of prompts, a word for each concept, and gradients of the text encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from safelight.align.distortion import Distortion, Recipe
from safelight.flow import Card


@dataclass(frozen=True, kw_only=True)
class DES(Distortion):
    """Send unsafe prompts to the farthest safe reading, less the concept; hold safe prompts."""

    card: ClassVar[Card] = Card(
        title="DES",
        source="arXiv:2501.18877",
        summary="sends unsafe prompts to the farthest safe embedding, less the concept",
        needs=("prompts", "concept words", "gradients"),
        claims={
            "I2P, NudeNet detections, SD 1.5 (untouched 851)": 16,
            "ASR under four attacks on average, SD 1.5": 0.0052,
            "ASR under four adaptive white-box attacks on average, SD 1.5": 0.0647,
            "FID on COCO-10k, SD 1.5 (untouched 16.57)": 15.44,
            "CLIPScore on COCO-10k, SD 1.5 (untouched 26.46)": 25.52,
            "mean ASR, FLUX.1": 0.0947,
        },
    )

    published: ClassVar[Recipe] = Recipe(lam=0.3, alpha_n=200.0, batch=128)
