"""The worst that small pushes of a prompt's token embeddings can do to its reading.

An encoder that was taught what to do with some words may do the old thing with words near them.
`worst_case` looks for those by projected gradient descent (Madry et al., arXiv:1706.06083) where
words become vectors, before positions and layers:

    delta <- P_r(delta - r * g / |g|),   g = gradient of `far(reading of the pushed prompt)`

with P_r the projection of every token's push to at most r times a word embedding's mean norm.
Start and end marks are not pushed: no attacker can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from safelight.models.base import TextToImage
from safelight.training.embedding import Reading, read

Tokens = Mapping[str, tuple[Tensor, Tensor]]  # ids and mask by encoder
Pushes = Mapping[str, Float[Tensor, "batch token dim"]]


@contextmanager
def pushed(model: TextToImage, pushes: Pushes) -> Iterator[None]:
    """Encoders see their tokens' embeddings moved."""
    with ExitStack() as stack:
        for name, delta in pushes.items():
            hook = model.token_table(name).register_forward_hook(_adds(delta))
            stack.callback(hook.remove)
        yield


def worst_case(
    model: TextToImage,
    tokens: Tokens,
    far: Callable[[Reading], Float[Tensor, " batch"]],
    *,
    radius: float,
    steps: int,
    rng: torch.Generator,
) -> dict[str, Tensor]:
    """Pushes that make `far` small, for each prompt on its own.

    Args:
        tokens: What is pushed, as `model.tokenize` gives it.
        far: How far each reading is from where the pushes try to bring it.
        radius: Of a token's push, in units of the mean norm of a word's embedding.
        steps: Of gradient descent.
        rng: Decides where the pushes start, anywhere within the radius.
    """
    reach = {name: radius * _norm(model, name) for name in tokens}
    free = {name: _free(model, name, *pair) for name, pair in tokens.items()}
    pushes = {name: _start(model, name, free[name], reach[name], rng) for name in tokens}
    for _ in range(steps):
        given = {name: delta.detach().requires_grad_() for name, delta in pushes.items()}
        with pushed(model, given):
            total = far(read(model, tokens)).sum()
        slopes = torch.autograd.grad(total, list(given.values()))
        pushes = {
            name: _step(delta.detach(), slope, free[name], reach[name])
            for (name, delta), slope in zip(given.items(), slopes, strict=True)
        }
    return {name: delta.detach() for name, delta in pushes.items()}


def _step(delta: Tensor, slope: Tensor, free: Tensor, reach: float) -> Tensor:
    """Downhill by the radius per free token, and back into it."""
    size = slope.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None]
    length = reach * free.sum(1).sqrt()[:, None, None]
    delta = delta - length * slope / size * free[..., None]
    return delta * (reach / delta.norm(dim=-1, keepdim=True).clamp(min=1e-12)).clamp(max=1)


def _start(
    model: TextToImage, name: str, free: Tensor, reach: float, rng: torch.Generator
) -> Tensor:
    n, tokens = free.shape
    noise = torch.randn(n, tokens, model.token_table(name).weight.shape[1], generator=rng)
    share = torch.rand(n, 1, 1, generator=rng)
    unit = noise / noise.norm(dim=-1, keepdim=True)
    return (reach * share * unit).to(free) * free[..., None]


def _free(
    model: TextToImage, name: str, ids: Int[Tensor, "batch token"], mask: Int[Tensor, "batch token"]
) -> Float[Tensor, "batch token"]:
    """1 where a token is a word."""
    marks = torch.tensor(model.tokenizers[name].all_special_ids, device=ids.device)
    return (mask.bool() & ~torch.isin(ids, marks)).float()


def _norm(model: TextToImage, name: str) -> float:
    return model.token_table(name).weight.detach().float().norm(dim=1).mean().item()


def _adds(delta: Tensor) -> Callable[[nn.Module, object, Tensor], Tensor]:
    return lambda module, given, out: out + delta.to(out)
