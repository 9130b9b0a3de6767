"""What the denoiser reads of a prompt, remembered once, and distances between two such readings.

A reading has one `Piece` per tensor that the denoiser is given: an encoder's token states, and its
pooled vector where the family uses one. `distance` compares two pieces row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from safelight.models.base import TextToImage

Distance = Literal["euclidean", "squared_l2", "neg_cosine", "neg_abs_cosine", "per_token_cosine"]
Reduction = Literal["flatten", "per_token_mean", "eos_only", "non_pad_only"]


@dataclass(frozen=True)
class Piece:
    """One tensor that the denoiser reads, and which of its tokens are content or end mark."""

    states: Float[Tensor, "batch token dim"]
    mask: Int[Tensor, "batch token"]

    def __getitem__(self, rows: slice | Tensor) -> Piece:
        return Piece(self.states[rows], self.mask[rows])

    def to(self, device: torch.device) -> Piece:
        """The same piece on a device."""
        return Piece(self.states.to(device), self.mask.to(device))


Reading = Mapping[str, Piece]
Tokens = Mapping[str, tuple[Tensor, Tensor]]  # encoder -> ids, mask
Reader = Callable[[TextToImage, Tokens], dict[str, Piece]]


def read(model: TextToImage, tokens: Tokens) -> dict[str, Piece]:
    """What the denoiser is told about some token ids; differentiable.

    Args:
        tokens: Ids and mask by encoder, as `model.tokenize` gives them.
    """
    pieces = {}
    for name, (ids, mask) in tokens.items():
        seen = model.read(name, ids, mask)
        if seen.states is not None:
            pieces[name] = Piece(seen.states.float(), mask)
        if seen.pooled is not None:
            pieces[f"{name}.pooled"] = Piece(seen.pooled.float()[:, None], mask[:, :1])
    return pieces


@dataclass(frozen=True)
class Reference:
    """The original encoders' readings of many prompts, as values.

    This is the frozen copy of `tau`: nothing that is trained or wrapped later can reach it.

    Args:
        rows: Each prompt's row in the tensors.
        tokens: Ids and masks by encoder, so that no prompt is tokenised twice.
        pieces: The readings, on the CPU.
        device: Where they are needed.
        reader: How they were read.
    """

    rows: Mapping[str, int]
    tokens: Tokens
    pieces: Reading
    device: torch.device
    reader: Reader = read

    def __call__(self, prompts: Sequence[str]) -> dict[str, Piece]:
        """The original readings of some prompts."""
        rows = self.rows_of(prompts)
        return {name: piece[rows].to(self.device) for name, piece in self.pieces.items()}

    def piece(self, name: str, prompts: Sequence[str]) -> Piece:
        """One piece of the original readings of some prompts."""
        return self.pieces[name][self.rows_of(prompts)].to(self.device)

    def now(self, model: TextToImage, prompts: Sequence[str]) -> dict[str, Piece]:
        """The readings of the same prompts with the weights that the model has now."""
        return self.reader(model, self.tokens_of(prompts))

    def tokens_of(self, prompts: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """Ids and masks by encoder of some prompts."""
        rows = self.rows_of(prompts)
        return {
            name: (ids[rows].to(self.device), mask[rows].to(self.device))
            for name, (ids, mask) in self.tokens.items()
        }

    def nearest(self, prompts: Sequence[str], among: Sequence[str]) -> list[str]:
        """For each prompt the one of `among` whose reading has the highest cosine to its own."""
        return [among[i] for i in self.likeness(prompts, among).argmax(1).tolist()]

    def likeness(
        self, prompts: Sequence[str], others: Sequence[str]
    ) -> Float[Tensor, "prompt other"]:
        """Cosine of every prompt's reading to every other's, averaged over the pieces."""
        here, there = self(prompts), self(others)
        each = [_unit(here[name]) @ _unit(there[name]).T for name in self.pieces]
        return torch.stack(each).mean(0)

    def rows_of(self, prompts: Sequence[str]) -> Int[Tensor, " prompt"]:
        """Where some prompts are in the tensors."""
        return torch.tensor([self.rows[text] for text in prompts], dtype=torch.long)


@torch.no_grad()
def remember(
    model: TextToImage,
    prompts: Sequence[str],
    encoders: Sequence[str],
    *,
    batch: int = 64,
    reader: Reader = read,
) -> Reference:
    """Read every distinct prompt once with the model as it is now.

    Args:
        reader: What is read; by default what the denoiser is told.
    """
    unique = list(dict.fromkeys(prompts))
    parts = []
    for i in range(0, len(unique), batch):
        tokens = {name: model.tokenize(name, unique[i : i + batch]) for name in encoders}
        parts.append((tokens, reader(model, tokens)))
    tokens = {
        name: (
            torch.cat([part[name][0].cpu() for part, _ in parts]),
            torch.cat([part[name][1].cpu() for part, _ in parts]),
        )
        for name in encoders
    }
    pieces = {
        name: Piece(
            torch.cat([part[name].states.cpu() for _, part in parts]),
            torch.cat([part[name].mask.cpu() for _, part in parts]),
        )
        for name in parts[0][1]
    }
    rows = {text: i for i, text in enumerate(unique)}
    return Reference(rows, tokens, pieces, model.device, reader)


def readable(model: TextToImage, texts: Iterable[str], encoders: Sequence[str]) -> set[str]:
    """Those texts that all of these encoders read to their end."""
    found = set(texts)
    for name in encoders:
        known = sorted(found)
        ids = model.tokenizers[name](known, verbose=False).input_ids if known else []
        found = {t for t, own in zip(known, ids, strict=True) if len(own) <= model.tokens[name]}
    return found


def distance(a: Piece, b: Piece, metric: Distance, reduction: Reduction) -> Float[Tensor, " batch"]:
    """How far `a` is from `b`, for each row.

    Cosines are negative, so that larger is farther for every metric: -1 means "the same direction".
    Every metric has a finite gradient where `a` equals `b`.
    """
    by_token = metric == "per_token_cosine"
    mask = a.mask | b.mask
    x, weight = reduce(Piece(a.states, mask), reduction, by_token, a.mask)
    y, _ = reduce(Piece(b.states, mask), reduction, by_token, b.mask)
    match metric:
        case "euclidean":
            apart = torch.linalg.vector_norm(x - y, dim=-1)  # its subgradient at 0 is 0
        case "squared_l2":
            apart = (x - y).square().sum(-1)
        case "neg_cosine" | "per_token_cosine":
            apart = -F.cosine_similarity(x, y, dim=-1)
        case "neg_abs_cosine":
            apart = -F.cosine_similarity(x, y, dim=-1).abs()
    return (weight * apart).sum(-1)


def size(piece: Piece, reduction: Reduction) -> Float[Tensor, " batch"]:
    """The norm of each row as a distance with this reduction sees it."""
    x, weight = reduce(piece, reduction, False, piece.mask)
    return (weight * torch.linalg.vector_norm(x, dim=-1)).sum(-1)


def reduce(
    piece: Piece, reduction: Reduction, by_token: bool, own: Int[Tensor, "batch token"]
) -> tuple[Float[Tensor, "batch part dim"], Float[Tensor, "batch part"]]:
    """The vectors that are compared, and their weights, which sum to 1 in each row.

    Args:
        piece: What is reduced; its mask may be shared with the piece it is compared to.
        reduction: `flatten` joins all tokens, `non_pad_only` those that are not padding;
            `per_token_mean` compares token by token; `eos_only` looks at the last content token.
        by_token: Compare token by token under any reduction.
        own: The piece's own mask, which says where its last content token is.
    """
    x, mask = piece.states, piece.mask
    if reduction == "eos_only":
        places = torch.arange(own.shape[1], device=own.device)
        last = (own * places).argmax(1)
        x = x[torch.arange(len(x), device=x.device), last][:, None]
        return x, x.new_ones(len(x), 1)
    if reduction == "non_pad_only":
        x = x * mask[..., None]
        weight = mask / mask.sum(1, keepdim=True)
    else:
        weight = torch.full_like(x[..., 0], 1 / x.shape[1])
    if by_token or reduction == "per_token_mean":
        return x, weight.to(x.dtype)
    return x.flatten(1)[:, None], x.new_ones(len(x), 1)


def _unit(piece: Piece) -> Float[Tensor, "batch _"]:
    return F.normalize(piece.states.flatten(1), dim=1)
