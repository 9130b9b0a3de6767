"""Prompts as words that can be deleted one by one, whether they are text or learnt embeddings.

What guards need that encode a prompt again without some of its words. Where an attack searches
words by gradients (a lone `<*>` in `Written.texts`, the words in `Condition.prompts`), each word
keeps its embeddings, so that gradients reach those that stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from safelight.flow import Condition, Written
from safelight.models.base import TextToImage
from safelight.models.soft import PLACEHOLDER, without
from safelight.training.pairs import bare

READINGS = 3  # a word may be found harmful only once its neighbours are gone


@dataclass(frozen=True)
class Found:
    """What somebody finds harmful in a prompt.

    Args:
        places: By encoder the places of harmful tokens.
        sure: Whether one of them says enough about whoever wrote the rest.
    """

    places: Mapping[str, Sequence[int]]
    sure: bool = False


@dataclass(frozen=True)
class Wish:
    """A prompt as words that can be deleted one by one.

    Args:
        row: The prompt as the encoders are given it, one row.
        words: Its words; `<*>` is one of them where learnt embeddings stand.
        pieces: Where the embeddings are those of the words: per encoder how many each word has.
    """

    row: Written
    words: tuple[str, ...]
    pieces: dict[str, tuple[int, ...]] | None = None

    def keeping(
        self, deleted: Iterable[int], instead: str = "", model: TextToImage | None = None
    ) -> Written:
        """The prompt without some words, as one row; without any it says nothing.

        Args:
            deleted: Their places.
            instead: Words that stand where one or more in a row were deleted.
            model: Whose embeddings of `instead` are taken where the words' embeddings are given.
        """
        gone = set(deleted)
        soft = self.row.soft[0]
        if len(gone) >= len(self.words) and not instead:
            return Written(("",), (None,), self.row.front, self.row.behind)
        if self.pieces is not None and soft is not None:
            kept = {
                name: self._kept(name, value, gone, _embedded(model, name, instead))
                for name, value in soft.items()
            }
            return Written((PLACEHOLDER,), (kept,), self.row.front, self.row.behind)
        text = self.said(gone, instead)
        own = soft if PLACEHOLDER in text else None
        return Written((text,), (own,), self.row.front, self.row.behind)

    def said(self, deleted: Iterable[int], instead: str = "") -> str:
        """The words that stay."""
        order = self.order(deleted, instead)
        return " ".join(instead if i is None else self.words[i] for i in order)

    def order(self, deleted: Iterable[int], instead: str = "") -> list[int | None]:
        """The places of the words that stay; None where `instead` stands."""
        gone = set(deleted)
        found: list[int | None] = []
        for i in range(len(self.words)):
            if i not in gone:
                found.append(i)
            elif instead and i - 1 not in gone:
                found.append(None)
        return found

    def owners(
        self, model: TextToImage, encoder: str, deleted: Iterable[int], instead: str = ""
    ) -> list[int | None]:
        """The word that each token of what stays belongs to; None for those of `instead`."""
        counts = self.tokens(model, encoder)
        (new,) = _pieces(model, encoder, [instead])
        order = self.order(deleted, instead)
        return [i for i in order for _ in range(new if i is None else counts[i])]

    def tokens(self, model: TextToImage, encoder: str) -> tuple[int, ...]:
        """How many tokens of an encoder each word is."""
        soft = self.row.soft[0] or {}
        if self.pieces is not None:
            return self.pieces.get(encoder, (0,) * len(self.words))
        plain = _pieces(model, encoder, [without(word) if soft else word for word in self.words])
        own = len(soft.get(encoder, ()))
        counts = [word.count(PLACEHOLDER) * own for word in self.words]
        return tuple(sum(both) for both in zip(plain, counts, strict=True))

    def _kept(
        self,
        encoder: str,
        value: Float[Tensor, "token dim"],
        gone: set[int],
        instead: Float[Tensor, "more dim"] | None,
    ) -> Float[Tensor, "_ dim"]:
        assert self.pieces is not None
        parts = value.split(self.pieces[encoder])
        new = value[:0] if instead is None else instead
        order = self.order(gone, PLACEHOLDER)
        return torch.cat([new if i is None else parts[i] for i in order])


@dataclass(frozen=True)
class Rereading:
    """How prompts are read again without the words that somebody finds harmful.

    Args:
        model: Whose encoders read.
        starts: How many marks each encoder puts before a text.
        instead: Words that stand where others were taken out, if no subject is left.
        subjects: Words about which a prompt can be.
        known: Words that may stay in a prompt in which something was surely found.
    """

    model: TextToImage
    starts: Mapping[str, int]
    instead: str = ""
    subjects: frozenset[str] = frozenset()
    known: frozenset[str] = frozenset()

    def read(
        self, condition: Condition, harmful: Callable[[Condition], Mapping[int, Found]]
    ) -> Condition:
        """Prompts without their harmful words, until none is found or `READINGS` are over.

        Args:
            condition: As the encoders said it: `written` is there.
            harmful: What is found, by row.
        """
        assert condition.written is not None
        wishes: dict[int, Wish] = {}
        gone: dict[int, frozenset[int]] = {}
        now = condition
        for _ in range(READINGS):
            more = {}
            for i, found in harmful(now).items():
                row = condition.written.rows([i])
                wishes.setdefault(i, wished(self.model, row, condition.prompts[i]))
                more[i] = self._words(wishes[i], gone.get(i, frozenset()), found)
            rows = [i for i, words in more.items() if words]
            if not rows:
                break
            gone |= {i: gone.get(i, frozenset()) | more[i] for i in rows}
            new = joined([self._left(wishes[i], gone[i]) for i in rows])
            now = now.put(rows, self.model.encode_written(new, tuple(condition.layout)))
        return now

    def _words(self, wish: Wish, gone: frozenset[int], found: Found) -> frozenset[int]:
        """The words, of those that are not gone yet, to which tokens belong; strange ones too."""
        words = self._strange(wish) - gone if found.sure else frozenset()
        for encoder, tokens in found.places.items():
            owner = wish.owners(self.model, encoder, gone, self._instead(wish, gone))
            first = self.starts[encoder] + len((wish.row.front[0] or {}).get(encoder, ()))
            own = (owner[t - first] for t in tokens if 0 <= t - first < len(owner))
            words |= {i for i in own if i is not None}
        return words

    def _strange(self, wish: Wish) -> frozenset[int]:
        """The words that nobody knows; learnt embeddings are no words."""
        return frozenset(
            i
            for i, word in enumerate(wish.words)
            if PLACEHOLDER not in word and bare(word) and bare(word) not in self.known
        )

    def _left(self, wish: Wish, gone: frozenset[int]) -> Written:
        return wish.keeping(gone, self._instead(wish, gone), self.model)

    def _instead(self, wish: Wish, gone: frozenset[int]) -> str:
        """Nothing, if what is left still has a subject."""
        left = (word for i, word in enumerate(wish.words) if i not in gone)
        return "" if any(bare(word) in self.subjects for word in left) else self.instead


def wished(model: TextToImage, row: Written, words: str) -> Wish:
    """A prompt's words; those of an attack that searches words keep their embeddings."""
    soft, text = row.soft[0], row.texts[0]
    if soft and text == PLACEHOLDER and words:
        own = tuple(words.split())
        pieces = {name: _pieces(model, name, own) for name in soft}
        if all(sum(pieces[name]) == len(value) for name, value in soft.items()):
            return Wish(row, own, pieces)
    return Wish(row, tuple(text.split()))


def joined(rows: Sequence[Written]) -> Written:
    """Several single rows as one."""
    texts, soft, front, behind = (
        tuple(getattr(row, name)[0] for row in rows)
        for name in ("texts", "soft", "front", "behind")
    )
    return Written(texts, soft, front, behind)


def _pieces(model: TextToImage, encoder: str, words: Sequence[str]) -> tuple[int, ...]:
    tokenizer = model.tokenizers[encoder]
    found = tokenizer(list(words), add_special_tokens=False, verbose=False).input_ids
    return tuple(len(ids) for ids in found)


def _embedded(
    model: TextToImage | None, encoder: str, words: str
) -> Float[Tensor, "token dim"] | None:
    """The embeddings of words as an encoder looks them up."""
    if model is None or not words:
        return None
    table = model.token_table(encoder)
    ids = model.tokenizers[encoder](words, add_special_tokens=False, verbose=False).input_ids
    return table(torch.tensor(ids, device=table.weight.device))
