"""The worst that an attacker can do to a prompt's reading: pushes of its words, words before it.

An encoder that was taught what to do with some words may do the old thing with words near them, or
with the same words behind others. `worst_case` looks for both at once, by the gradient `g` of
`far(reading)` where words become vectors, before positions and layers:

    delta <- P_r(delta - r * g / |g|)                   for the prompt's own words
    v     <- one of the `CHOICES` least  g . e_v        for `slots` words put in front of it

The first is projected gradient descent (Madry et al., arXiv:1706.06083), with P_r the projection of
every token's push to at most r times a word embedding's mean norm; the second exchanges whole words
by their linear effect (HotFlip, Ebrahimi et al., arXiv:1712.06751), as searches for prompts do.
Start and end marks are not touched: no attacker can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from safelight.models.base import TextToImage
from safelight.training.embedding import Reading, read

Tokens = Mapping[str, tuple[Tensor, Tensor]]  # ids and mask by encoder
Pushes = Mapping[str, Float[Tensor, "batch token dim"]]

Front = Mapping[str, Int[Tensor, "batch slot"]]  # ids of words in front, by encoder

CHOICES = 16  # best exchanges, of which one is drawn


@dataclass(frozen=True)
class Vocabulary:
    """What may stand in front of a prompt, and where that is; looked up once per model.

    Args:
        ids: Everything in an encoder's table that is no mark, by encoder.
        first: Where a text's own tokens begin, by encoder.
    """

    ids: Mapping[str, Int[Tensor, " word"]]
    first: Mapping[str, int]

    @classmethod
    def of(cls, model: TextToImage, encoders: Sequence[str]) -> Vocabulary:
        """The vocabularies of some encoders."""
        return cls(
            {name: _words(model, name) for name in encoders},
            {name: len(model.tokenizers[name]("").input_ids) - 1 for name in encoders},
        )

    def random(self, n: int, slots: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Words for `n` prompts, drawn at random."""
        return {
            name: ids[torch.randint(len(ids), (n, slots), generator=rng)]
            for name, ids in self.ids.items()
        }

    def in_front(self, tokens: Tokens, slots: int) -> dict[str, Tensor]:
        """The first `slots` words of each prompt."""
        return {
            name: ids[:, self.first[name] : self.first[name] + slots]
            for name, (ids, _) in tokens.items()
        }


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
    words: Vocabulary,
    front: Front | None = None,
) -> tuple[Tokens, Pushes]:
    """Tokens and pushes that make `far` small, for each prompt on its own.

    Args:
        tokens: The prompts, as `model.tokenize` gives them.
        far: How far each reading is from where the attack tries to bring it.
        radius: Of a token's push, in units of the mean norm of a word's embedding.
        steps: Of gradient descent.
        rng: Decides where the pushes start, and which of the best words is taken.
        words: What words in front are exchanged for.
        front: Words that are put in front of each prompt at first; a prompt that becomes too long
            loses its end. None puts nothing there.
    """
    free = {name: _free(model, name, *pair) for name, pair in tokens.items()}
    slots = 0
    if front:
        slots = next(iter(front.values())).shape[1]
        tokens = {n: _behind(pair, front[n], words.first[n]) for n, pair in tokens.items()}
        free = {name: _moved(one, slots, words.first[name]) for name, one in free.items()}
    reach = {name: radius * _norm(model, name) for name in tokens}
    pushes = {name: _start(model, name, free[name], reach[name], rng) for name in tokens}
    for _ in range(steps):
        given = {name: delta.detach().requires_grad_() for name, delta in pushes.items()}
        with pushed(model, given):
            total = far(read(model, tokens)).sum()
        slopes = dict(zip(given, torch.autograd.grad(total, list(given.values())), strict=True))
        pushes = {
            name: _step(delta.detach(), slopes[name], free[name], reach[name])
            for name, delta in given.items()
        }
        if slots:
            tokens = {
                name: _exchanged(model, name, pair, slopes[name], slots, words, rng)
                for name, pair in tokens.items()
            }
    return tokens, {name: delta.detach() for name, delta in pushes.items()}


def _behind(
    pair: tuple[Tensor, Tensor], words: Int[Tensor, "batch slot"], first: int
) -> tuple[Tensor, Tensor]:
    """The tokens behind some words, cut to length before the end mark."""
    ids, mask = pair
    slots, words = words.shape[1], words.to(ids)
    end = ids[torch.arange(len(ids), device=ids.device), mask.sum(1) - 1]
    ids = torch.cat([ids[:, :first], words, ids[:, first:-slots]], dim=1)
    mask = torch.cat([mask[:, :first], torch.ones_like(words), mask[:, first:-slots]], dim=1)
    ids[:, -1] = torch.where(mask[:, -1].bool(), end, ids[:, -1])
    return ids, mask


def _moved(free: Tensor, slots: int, first: int) -> Tensor:
    """The same words' places behind the slots; the last place may hold the end mark."""
    moved = torch.cat([free[:, :first], free.new_zeros(len(free), slots), free[:, first:-slots]], 1)
    moved[:, -1] = 0
    return moved


def _exchanged(
    model: TextToImage,
    name: str,
    pair: tuple[Tensor, Tensor],
    slope: Float[Tensor, "batch token dim"],
    slots: int,
    words: Vocabulary,
    rng: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Some slots' words exchanged for one of those that lead downhill, to first order."""
    ids, mask = pair
    first, known = words.first[name], words.ids[name].to(ids.device)
    table = model.token_table(name).weight.detach()[known].to(slope)
    best = (slope[:, first : first + slots] @ table.T).topk(CHOICES, dim=-1, largest=False).indices
    pick = torch.randint(best.shape[-1], (*best.shape[:2], 1), generator=rng).to(ids.device)
    new = known[best.gather(-1, pick)[..., 0]]
    # Words are judged one by one as if the others stayed, so about half of them do.
    stay = (torch.rand(new.shape, generator=rng) < 0.5).to(ids.device)
    front = torch.where(stay, ids[:, first : first + slots], new)
    return torch.cat([ids[:, :first], front, ids[:, first + slots :]], dim=1), mask


def _words(model: TextToImage, name: str) -> Int[Tensor, " word"]:
    """Ids of everything in the table that is no mark."""
    size = model.token_table(name).weight.shape[0]
    known = torch.zeros(size, dtype=torch.bool)
    known[[i for i in model.tokenizers[name].get_vocab().values() if i < size]] = True
    known[[i for i in model.tokenizers[name].all_special_ids if i < size]] = False
    return known.nonzero().flatten()


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
