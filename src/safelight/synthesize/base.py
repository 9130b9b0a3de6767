"""What pairs are to be written about, and what a writer of pairs promises.

    category -> topics (a concept each) -> writer -> rows: (unsafe prompt, safe prompt, concept)

A row is a `Prompt` with a `safe_prompt`, its concept in `meta`. Every row of every writer passes
the minors filter with both of its texts.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from safelight.errors import BadInput, NotFound
from safelight.flow import Prompt
from safelight.names import table
from safelight.prompts import PromptSet
from safelight.prompts.minors import names_a_minor_in_harm
from safelight.training.pairs import BETWEEN, concept_list, pair

Watch = Callable[[str, int, int], None]  # what is being done, how much of it, of how much


@dataclass(frozen=True)
class Topic:
    """One concept of a category, and what is already known about it.

    Args:
        category: The unsafe category.
        concept: A short phrase.
        anchor: What should be there instead, where that is known.
        prompts: Prompts that exist already.
    """

    category: str
    concept: str
    anchor: str = ""
    prompts: tuple[Prompt, ...] = ()


@dataclass(frozen=True)
class Source:
    """Where topics come from: a prompt set or a list of concepts.

    Args:
        name: Of the set or file.
        sha256: Of its content.
        topics: What it names, without what the minors filter dropped.
        minors: How many prompts and concepts that were.
    """

    name: str
    sha256: str
    topics: tuple[Topic, ...]
    minors: int = 0


@dataclass(frozen=True)
class Script:
    """What a writer wrote for one category.

    Args:
        rows: Prompts with a `safe_prompt`.
        counts: What else happened, such as answers that were no use.
        skipped: Concepts that were given up, and why.
    """

    rows: tuple[Prompt, ...]
    counts: Mapping[str, int] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)


class Writer(Protocol):
    """Writes pairs of prompts about the concepts of a category."""

    def write(
        self, topics: Sequence[Topic], n: int, *, store: Path, watch: Callable[[int], None]
    ) -> Script:
        """Up to `n` pairs about one category's topics, in turns.

        Args:
            store: A folder of the writer's own, where it may keep what need not be asked twice.
            watch: Told how many pairs there are so far.

        Raises:
            BadInput: It cannot write about such topics.
            WorkFailed: It could not do its work.
        """

    def about(self) -> dict[str, Any]:
        """Its name, and every setting that its rows depend on."""


def row(topic: Topic, unsafe: str, safe: str) -> Prompt:
    """A new pair, with an id made from its texts."""
    said = json.dumps([topic.category, unsafe, safe])
    return Prompt(
        id=hashlib.sha256(said.encode()).hexdigest()[:12],
        text=unsafe,
        category=topic.category,
        safe_prompt=safe,
        meta={"concept": topic.concept},
    )


def about_minors(one: Prompt) -> bool:
    """Whether either text of a pair pairs an age term with sexual or violent content."""
    texts = (one.text, one.safe_prompt or "")
    return any(names_a_minor_in_harm(text, one.category) for text in texts)


def by_category(sources: Sequence[Source]) -> dict[str, tuple[Topic, ...]]:
    """All topics by category, in alphabetical order; a concept that came twice is one topic.

    Raises:
        BadInput: There is no topic at all.
    """
    found: dict[str, dict[str, Topic]] = {}
    for topic in (topic for source in sources for topic in source.topics):
        known = found.setdefault(topic.category, {})
        old = known.get(topic.concept, topic)
        prompts = topic.prompts if old is topic else (*old.prompts, *topic.prompts)
        known[topic.concept] = replace(old, anchor=old.anchor or topic.anchor, prompts=prompts)
    if not found:
        dropped = sum(source.minors for source in sources)
        raise BadInput(f"there is nothing to write about ({dropped} dropped by the minors filter).")
    return {category: tuple(found[category].values()) for category in sorted(found)}


# Reading


def read(name: str | Path) -> Source:
    """The topics of a prompt set, by name or as a file, or of a list of concepts.

    Args:
        name: A built-in set, a prompt file, the published CoProV2 table, or a CSV file with a
            column `target` (a concept) and optionally `anchor` (what should be there instead) and
            `category` (else the file's name is the category).

    Raises:
        NotFound: There is no such set or file.
        BadInput: An empty concept, or a prompt that names neither its concept nor a safe
            counterpart.
    """
    path = Path(name).expanduser()
    if str(name) in table("prompts") or path.suffix.lower() != ".csv":
        return of_prompts(PromptSet.load(name))
    columns = csv_rows(path)[0].keys()
    if "target" in columns:
        return of_concepts(path)
    if {"prompt", "image", "category"} <= columns:
        from safelight.synthesize.coprov2 import of_coprov2

        return of_coprov2(path)
    return of_prompts(PromptSet.load(name))


def of_prompts(prompts: PromptSet) -> Source:
    """Topics of a prompt set: its prompts by concept."""
    groups: dict[tuple[str, str], list[Prompt]] = {}
    for prompt in prompts:
        category = prompt.category or Path(prompts.name).stem
        groups.setdefault((category, _concept(prompt, prompts.name)), []).append(prompt)
    topics = tuple(Topic(*key, prompts=tuple(some)) for key, some in groups.items())
    return Source(prompts.name, prompts.sha256, topics, prompts.dropped)


def _concept(prompt: Prompt, where: str) -> str:
    """What a prompt says it asks for, or the words in which it differs from its counterpart."""
    said = prompt.meta.get("concept") or prompt.meta.get("unsafe_objects")
    found = said or (prompt.safe_prompt and pair(prompt.text, prompt.safe_prompt).phrase)
    if not found:
        raise BadInput(
            f"{where}: the prompt {prompt.id!r} has no safe counterpart and names no concept. Fill "
            "in the column safe_prompt or concept, or give a list of concepts (a CSV file with the "
            "columns target and anchor)."
        )
    return found


def of_concepts(path: Path) -> Source:
    """Topics of a list of concepts."""
    groups: dict[str, list[Mapping[str, str]]] = {}
    for one in csv_rows(path, "target"):
        groups.setdefault(one.get("category", "").strip() or path.stem, []).append(one)
    topics = [topic for category, some in groups.items() for topic in _topics(category, some)]
    kept = [t for t in topics if not names_a_minor_in_harm(f"{t.concept} {t.anchor}", t.category)]
    said = json.dumps([[t.category, t.concept, t.anchor] for t in topics], ensure_ascii=False)
    digest = hashlib.sha256(said.encode()).hexdigest()
    return Source(path.name, digest, tuple(kept), len(topics) - len(kept))


def _topics(category: str, rows: Sequence[Mapping[str, str]]) -> list[Topic]:
    """With anchors as `concept_list` checks them, or without any."""
    if "anchor" in rows[0]:
        entries = concept_list([f"{r['target']} {BETWEEN} {r['anchor']}" for r in rows])
        parts = (entry.split(f" {BETWEEN} ") for entry in entries)
        return [Topic(category, concept, anchor) for concept, anchor in parts]
    concepts = [one["target"].strip() for one in rows]
    if "" in concepts:
        number = concepts.index("") + 1
        raise BadInput(f"entry {number} of the concepts of {category!r} is empty; write a concept.")
    twice = [name for name, n in Counter(concepts).items() if n > 1]
    if twice:
        raise BadInput(f"{category!r} names the concept {twice[0]!r} twice; keep one entry.")
    return [Topic(category, concept) for concept in concepts]


def csv_rows(path: Path, *needed: str) -> list[dict[str, str]]:
    """The rows of a CSV file.

    Raises:
        NotFound: There is no such file.
        BadInput: It cannot be read, has no rows, or lacks a column.
    """
    if not path.is_file():
        raise NotFound(f"no file at {path}.")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            read = list(csv.DictReader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise BadInput(f"{path.name} is not a readable CSV file in UTF-8: {error}.") from None
    rows = [{key: value or "" for key, value in one.items() if key} for one in read]
    if not rows:
        raise BadInput(f"{path.name} has no rows.")
    if not set(needed) <= rows[0].keys():
        has = ", ".join(rows[0])
        raise BadInput(f"{path.name} needs the columns {', '.join(needed)} (it has: {has}).")
    return rows
