"""Target and anchor contexts: the same sentence with something unsafe, and with something safe.

    "a small knife on a table"   target context
    "a small tulip on a table"   anchor context

They come from prompts that carry a `safe_prompt`, or from a concept list ("knife > tulip") put into
templates. Target and anchor may have different numbers of tokens. `aligned` says which token of the
anchor context each token of the target context answers to.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from safelight.errors import BadInput, NotFound
from safelight.flow import Prompt
from safelight.models.base import TextToImage

BETWEEN = ">"  # "target > anchor"
MARKS = ",.;:!?"
ARTICLES = ("a", "an")  # "an axe" against "a tulip": grammar, not harm
TEMPLATES = (
    "{}",
    "a photo of {}",
    "a painting of {}",
    "a drawing of {} on white paper",
    "a detailed picture of {} in a room",
    "{} on a table",
    "{} at night, high quality",
    "{} next to a tree",
    "a dog and {}",
    "a person holding {}",
    "show me {} in the evening sun",
    "please make a big {} under a blue sky",
    "a poster with {} and a car",
    "the {} in front of a house, very detailed",
)


@dataclass(frozen=True)
class Pair:
    """A target context and its anchor context.

    Args:
        target: The text with what is to be removed.
        anchor: The same text with what is to be there instead.
        phrase: The words in which they differ, as the target has them.
    """

    target: str
    anchor: str
    phrase: str

    def saying(self, phrase: str) -> Pair:
        """The same context with another target phrase."""
        words = self.target.split()
        start, end = _differing(words, self.anchor.split())
        own = words[start:end]
        mark = own[-1][-1] if own and own[-1][-1] in MARKS else ""
        new = [*words[:start], *_articles(own), phrase + mark, *words[end:]]
        return Pair(" ".join(new), self.anchor, phrase)


def pair(target: str, anchor: str) -> Pair:
    """Two contexts, with the words in which they differ."""
    words = target.split()
    start, end = _differing(words, anchor.split())
    own = words[start:end]
    phrase = " ".join(own[len(_articles(own)) :]).rstrip(MARKS)
    return Pair(target, anchor, phrase)


def of_prompts(prompts: Sequence[Prompt]) -> tuple[Pair, ...]:
    """The pairs that prompts with a `safe_prompt` are; those without are left out.

    Raises:
        BadInput: A category has no prompt with a safe counterpart.
    """
    all_of = Counter(prompt.category for prompt in prompts)
    paired = Counter(prompt.category for prompt in prompts if prompt.safe_prompt)
    alone = sorted(name or "(none)" for name in all_of if not paired[name])
    if alone:
        raise BadInput(
            f"no prompt of the category {', '.join(alone)} has a safe counterpart. Fill in the "
            "column safe_prompt, or name what should be there instead in a concept list "
            "(--set concepts=FILE.csv with the columns target and anchor)."
        )
    return tuple(pair(p.text, p.safe_prompt) for p in prompts if p.safe_prompt)


def subjects(
    pairs: Sequence[Pair], benign: Sequence[str], *, times: float = 1.5, least: int = 3
) -> tuple[str, ...]:
    """What benign texts speak of: words they say more often than target contexts do.

    Both say "a picture of" and "on the beach"; where benign texts have a dog, target contexts have
    their phrase, and a dog beside it only now and then.

    Args:
        pairs: Each counts without its phrase.
        benign: Texts.
        times: How many times as often.
        least: Number of benign texts that say it.
    """
    beside = Counter(word for one in pairs for word in _words(one.saying("").target))
    said = Counter(word for text in benign for word in _words(text))
    rate = times * len(benign) / max(len(pairs), 1)
    return tuple(sorted(w for w, n in said.items() if n >= least and n > rate * (beside[w] + 1)))


def bare(word: str) -> str:
    """A word without case and marks."""
    return word.lower().strip(MARKS)


def said_in(texts: Iterable[str]) -> tuple[str, ...]:
    """All words of some texts."""
    return tuple(sorted({word for text in texts for word in _words(text)}))


def _words(text: str) -> set[str]:
    return {bare(word) for word in text.split()} - {""}


def concept_list(values: Sequence[str]) -> tuple[str, ...]:
    """Checked entries "target > anchor"; the name of a CSV file stands for its rows.

    Args:
        values: Entries, or files with the columns `target` and `anchor`.

    Raises:
        NotFound: No such file.
        BadInput: An entry that is empty, not of this form, or there twice.
    """
    entries: list[str] = []
    for value in values:
        entries += _rows(Path(value)) if value.strip().lower().endswith(".csv") else [value]
    found = [_entry(text, number) for number, text in enumerate(entries, start=1)]
    for target, n in Counter(entry.partition(BETWEEN)[0].lower() for entry in found).items():
        if n > 1:
            raise BadInput(
                f"the concept list names the target {target.strip()!r} {n} times; keep one entry."
            )
    return tuple(found)


def in_templates(concepts: Sequence[str], templates: Sequence[str]) -> tuple[Pair, ...]:
    """Every concept in every template.

    Args:
        concepts: What `concept_list` returns.
        templates: Texts with `{}` where the concept belongs.
    """
    parts = [entry.partition(BETWEEN) for entry in concepts]
    return tuple(
        Pair(template.replace("{}", target.strip()), template.replace("{}", anchor.strip()),
             target.strip())
        for template in templates
        for target, _, anchor in parts
    )  # fmt: skip


def check_tokens(model: TextToImage, pairs: Iterable[Pair], encoders: Sequence[str]) -> None:
    """Refuse pairs that an encoder cannot tell apart.

    Raises:
        BadInput: A target or an anchor is no token at all, or both are the same tokens.
    """
    seen = list(pairs)
    for encoder in encoders:
        tokenizer = model.tokenizers[encoder]
        nothing = tokenizer("").input_ids
        targets = tokenizer([one.target for one in seen], verbose=False).input_ids
        anchors = tokenizer([one.anchor for one in seen], verbose=False).input_ids
        for one, target, anchor in zip(seen, targets, anchors, strict=True):
            for text, ids in ((one.target, target), (one.anchor, anchor)):
                if ids == nothing:
                    raise BadInput(f"{encoder} has no token for {text!r}; write it in words.")
            if target == anchor:
                raise BadInput(
                    f"{encoder} reads {one.target!r} and its anchor {one.anchor!r} as the same "
                    "tokens; choose an anchor that differs."
                )


@dataclass(frozen=True)
class Aligned:
    """Target contexts laid beside their anchor contexts.

    Args:
        goal: For each token of a target context the place in the anchor context to be read there.
        target: Which tokens are the target itself.
    """

    goal: Int[Tensor, "pair token"]
    target: Bool[Tensor, "pair token"]

    def __getitem__(self, rows: Tensor) -> Aligned:
        return Aligned(self.goal[rows], self.target[rows])

    def to(self, device: torch.device) -> Aligned:
        """The same on a device."""
        return Aligned(self.goal.to(device), self.target.to(device))


def aligned(
    ids: Int[Tensor, "pair token"],
    mask: Int[Tensor, "pair token"],
    anchor_ids: Int[Tensor, "pair token"],
    anchor_mask: Int[Tensor, "pair token"],
    articles: Sequence[int] = (),
) -> Aligned:
    """Lay token ids of target contexts beside those of their anchor contexts.

    The tokens that both begin with answer to each other, and so do those that both end with, end
    mark included, however far the lengths differ. In between, `n` target tokens are spread over
    `m` anchor tokens, last on last: in a causal encoder the last token of a word knows all of it.
    Padding answers to padding at the same place, which in a causal encoder says what the whole
    text says. Between the first and the last difference only those tokens are the target that the
    anchor does not say there: of "a knife under the axe" it is not "under the".

    Args:
        articles: Token ids that do not count as part of a target.
    """
    goals, targets = [], []
    for row, own, anchor, other in zip(ids, mask, anchor_ids, anchor_mask, strict=True):
        u, a = row[: int(own.sum())].tolist(), anchor[: int(other.sum())].tolist()
        start, end = _differing(u, a)
        n, m = end - start, len(a) - (len(u) - end) - start
        inside = [start + _place(j, n, m) for j in range(n)]
        after = [p + len(a) - len(u) for p in range(end, len(u))]
        padding = [max(p, min(len(a), len(row) - 1)) for p in range(len(u), len(row))]
        goals.append([*range(start), *inside, *after, *padding])
        there = {*articles, *a[start : start + m]}
        meant = [start <= p < end and u[p] not in there for p in range(len(u))]
        if not any(meant):
            meant = [start <= p < end for p in range(len(u))]
        targets.append([*meant, *[False] * len(padding)])
    return Aligned(torch.tensor(goals), torch.tensor(targets))


def article_ids(model: TextToImage, encoder: str) -> tuple[int, ...]:
    """The ids of "a" and "an" where each is one token."""
    tokenizer = model.tokenizers[encoder]
    found = (tokenizer(word, add_special_tokens=False).input_ids for word in ARTICLES)
    return tuple(ids[0] for ids in found if len(ids) == 1)


def _place(j: int, n: int, m: int) -> int:
    """Which of `m` anchor tokens the j-th of `n` target tokens answers to; last answers to last."""
    if not m:
        return 0  # the anchor has nothing there: the token after it
    return m - 1 if n == 1 else round(j * (m - 1) / (n - 1))


def _differing(target: Sequence[object], anchor: Sequence[object]) -> tuple[int, int]:
    """Where in `target` it stops and begins again to be like `anchor`."""
    shortest = min(len(target), len(anchor))
    start = 0
    while start < shortest and target[start] == anchor[start]:
        start += 1
    same = 0
    while same < shortest - start and target[-1 - same] == anchor[-1 - same]:
        same += 1
    return start, len(target) - same


def _articles(words: Sequence[str]) -> list[str]:
    """The article at the beginning of some words, if there is one."""
    return [words[0]] if len(words) > 1 and words[0].lower() in ARTICLES else []


def _entry(text: str, number: int) -> str:
    parts = [part.strip() for part in text.split(BETWEEN)]
    if len(parts) != 2 or not all(parts):
        raise BadInput(
            f"entry {number} of the concept list is {text.strip()!r}; write what is to be removed "
            f"and what should be there instead, such as 'knife {BETWEEN} tulip'."
        )
    return f"{parts[0]} {BETWEEN} {parts[1]}"


def _rows(path: Path) -> list[str]:
    if not path.is_file():
        raise NotFound(f"no concept list at {path}.")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows: list[Mapping[str, str | None]] = list(csv.DictReader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise BadInput(f"{path.name} is not a readable CSV file in UTF-8: {error}.") from None
    if not rows or not {"target", "anchor"} <= rows[0].keys():
        has = ", ".join(map(str, rows[0])) if rows else "no rows"
        raise BadInput(f"{path.name} needs the columns target and anchor (it has: {has}).")
    return [f"{row['target'] or ''} {BETWEEN} {row['anchor'] or ''}" for row in rows]
