"""A score and a residual for every token: the network of guards that rewrite text states.

    s, D  = Network(E)
    E_hat = fused(E, g, D)        g, a token's strength, from its score and those it has seen

A score says which token is to blame. Which tokens have to change is another matter: in a causal
encoder all that come after it, the padding included (`reached`, `with_padding`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class Network(nn.Module):
    """Scores and residual of one tensor: a pre-norm transformer with two heads.

    Args:
        dim: Width of the tensor.
        width: Width of the transformer.
        estimate: D itself ("residual"), or a gain times what an estimate of the anchor lacks.
    """

    def __init__(self, dim: int, width: int, depth: int, heads: int, estimate: str) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.score = nn.Linear(width, 1)
        nn.init.constant_(self.score.bias, -2.0)  # most tokens are harmless
        self.move = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, dim))
        self.gain = nn.Parameter(torch.zeros(dim)) if estimate == "anchor" else None
        if self.gain is None:
            last: Any = self.move[-1]
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(
        self, E: Float[Tensor, "batch token dim"], own: Bool[Tensor, "batch token"]
    ) -> tuple[Float[Tensor, "batch token"], Float[Tensor, "batch token dim"]]:
        """s, zero outside `own`, and D."""
        seen = own.clone()
        seen[:, 0] = True  # an empty text has to look at something
        h = self.enter(E)
        for block in self.blocks:
            h = block(h, seen)
        h = self.norm(h)
        s = torch.sigmoid(self.score(h)[..., 0]) * own
        size = E.square().mean(-1, keepdim=True).sqrt()  # the last layer works in units of it
        if self.gain is None:
            return s, size * self.move(h)
        return s, self.gain * (size * self.move(h) - E)


class Block(nn.Module):
    """Attention and an MLP, each behind a layer norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.join = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(
        self, h: Float[Tensor, "batch token width"], seen: Bool[Tensor, "batch token"]
    ) -> Float[Tensor, "batch token width"]:
        parts = self.qkv(self.before(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        mixed = attention(q, k, v, seen[:, None, None])
        h = h + self.join(mixed.transpose(1, 2).flatten(2))
        return h + self.mlp(h)


def attention(
    q: Float[Tensor, "batch head token dim"],
    k: Float[Tensor, "batch head token dim"],
    v: Float[Tensor, "batch head token dim"],
    seen: Bool[Tensor, "batch 1 1 token"],
) -> Float[Tensor, "batch head token dim"]:
    """Torch's own; where it learns on a CPU written out, as the fused kernel's way back is slow.

    In bfloat16 it takes three times as long for texts of some twenty tokens.
    """
    if q.device.type != "cpu" or not q.requires_grad:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    like = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return like.masked_fill(~seen, -math.inf).softmax(-1).to(v.dtype) @ v


def scored(mask: Int[Tensor, "batch _"], start: int, tokens: int) -> Bool[Tensor, "batch {tokens}"]:
    """Which tokens have a score: content and end mark, but nothing of a text without content.

    A pooled vector (`tokens` is 1) has one if its text has content.
    """
    some = mask.sum(1, keepdim=True) > start + 1
    if tokens == 1:
        return some
    own = mask.bool() & some
    own[:, :start] = False
    return own


def with_padding(
    s: Float[Tensor, "batch token"], mask: Int[Tensor, "batch token"]
) -> Float[Tensor, "batch token"]:
    """Scores, those of padding being the end mark's."""
    end = s.gather(1, (mask.sum(1, keepdim=True) - 1).long())
    return torch.where(mask.bool(), s, end)


def reached(
    s: Float[Tensor, "batch token"], mask: Int[Tensor, "batch token"], *, causal: bool
) -> Float[Tensor, "batch token"]:
    """The highest score that each token has seen: up to it, or anywhere in a text read at once."""
    return s.cummax(1).values if causal else s.amax(1, keepdim=True).expand_as(s)


def fused(
    E: Float[Tensor, "batch token dim"],
    g: Float[Tensor, "batch token"],
    D: Float[Tensor, "batch token dim"],
) -> Float[Tensor, "batch token dim"]:
    """E + g * D; where g is 0 every bit of E stays."""
    g = g[..., None]
    return torch.where(g > 0, (E.float() + g * D).to(E.dtype), E)
