"""A language model writes pairs: an unsafe prompt, and the same with as little changed as possible.

    system: the instruction         user: category, concept, how many, what is there already
    answer: {"pairs": [{"unsafe": "...", "safe": "..."}, ...]}    or    {"refused": "why"}

The recipe of CoProV2 (arXiv:2412.10493), in one question instead of two; the authors' instruction
and model are not published. Category by category, the concepts with the fewest pairs are asked
about, round by round, until there are enough. The answer is read to the letter. Of its pairs those
are left out that pair an age term with harm, that still name the concept on the safe side, whose
texts have too little in common, or that are there already. An answer without one new pair is a bad
one; after `patience` of them a concept is skipped, and named.

Every answer is kept as a file, named after the question and everything else that it depends on, so
that a resumed run asks nothing twice.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from safelight.bench.records import write
from safelight.errors import BadInput, NotFound, WorkFailed
from safelight.flow import Prompt
from safelight.models.chat import Endpoint, Local, Messages, strict_json
from safelight.prompts.set import LONGEST, in_turns
from safelight.synthesize.base import Script, Topic, about_minors, row

INSTRUCTIONS = """You write training data that teaches text-to-image models to be safe. For one \
unsafe concept you write pairs of prompts.
"unsafe": a prompt for a picture that shows the concept. Name it plainly; be no more explicit than \
that. Nobody in it is under age.
"safe": the same prompt with as few words changed as possible, so that nothing of the unsafe \
category is left while scene, people, layout and style stay.
Vary scenes, styles and lengths. Answer with one JSON object and nothing else:
{"pairs": [{"unsafe": "...", "safe": "..."}, ...]}
If you will not write about the concept, answer {"refused": "why"}."""
KNOWN = 20  # prompts that the model is reminded of, so that it writes others


@dataclass(frozen=True, kw_only=True)
class LLM:
    """A language model behind any OpenAI-compatible endpoint, or loaded by transformers.

    Args:
        model: Name at the endpoint; without `url` a folder or hub id that transformers loads.
        url: Of an OpenAI-compatible endpoint, up to and with its version, such as
            "http://localhost:8000/v1"; "" for a local model.
        instructions: What the model is told; a text, or the name of a .txt file.
        temperature: Of sampling; 0 always takes the likeliest word.
        seed: Of sampling.
        each: Pairs asked for at a time.
        alike: Least share of words that both texts of a pair have in common.
        patience: Bad answers after which a concept is skipped.
        key: Environment variable that holds the endpoint's key; the key itself is never stored.
        tokens: Longest answer, in tokens.
        timeout: Seconds to wait for one answer.
        tries: How often an endpoint that is busy or unreachable is asked.
        pause: Seconds before the second try; doubled for each that follows.
        parallel: Questions asked at a time.
    """

    model: str = ""
    url: str = ""
    instructions: str = INSTRUCTIONS
    temperature: float = 1.0
    seed: int = 0
    each: int = 5
    alike: float = 0.4
    patience: int = 3
    key: str = "OPENAI_API_KEY"
    tokens: int = 1000
    timeout: float = 120.0
    tries: int = 4
    pause: float = 1.0
    parallel: int = 4

    def __post_init__(self) -> None:
        if not self.model:
            raise BadInput(
                "llm needs a model: model=NAME and url=http://HOST:PORT/v1 for an endpoint, or "
                "model=FOLDER for a local one."
            )
        for name in ("each", "patience", "tries", "parallel"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} must be at least 1, not {getattr(self, name)}.")

    def about(self) -> dict[str, Any]:
        names = ("model", "url", "temperature", "seed", "each", "alike", "patience", "tokens")
        settings = {name: getattr(self, name) for name in names}
        return {"name": "llm", **settings, "instructions": self.told}

    @cached_property
    def told(self) -> str:
        """The instruction itself."""
        if not self.instructions.endswith(".txt"):
            return self.instructions
        try:
            return Path(self.instructions).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise NotFound(f"no file with instructions at {self.instructions}.") from None

    @cached_property
    def asker(self) -> Endpoint | Local:
        if not self.url:
            return Local(self.model)
        return Endpoint(
            url=self.url,
            model=self.model,
            key=self.key,
            timeout=self.timeout,
            tries=self.tries,
            pause=self.pause,
        )

    def write(
        self, topics: Sequence[Topic], n: int, *, store: Path, watch: Callable[[int], None]
    ) -> Script:
        if not all(topic.concept for topic in topics):
            raise BadInput(f"llm writes about concepts; {topics[0].category!r} has none by name.")
        drafts = [Draft(topic) for topic in topics]
        open_, number = drafts, 0
        with ThreadPoolExecutor(self.parallel if self.url else 1) as some:
            while open_ and (missing := n - sum(len(draft.rows) for draft in drafts)) > 0:
                poorest = sorted(open_, key=lambda draft: len(draft.rows))[:missing]
                share = min(self.each, -(-missing // len(poorest)))
                ask = partial(self._answer, share, number, store)
                for draft, answer in zip(poorest, some.map(ask, poorest), strict=True):
                    draft.add(answer, share, self.alike)
                open_ = [draft for draft in open_ if draft.bad < self.patience]
                number += 1
                watch(min(n, sum(len(draft.rows) for draft in drafts)))
        rows = tuple(in_turns(draft.rows for draft in drafts))[:n]
        counts = sum((draft.counts for draft in drafts), Counter())
        skipped = {d.topic.concept: d.why for d in drafts if d.bad >= self.patience}
        return Script(rows, dict(sorted(counts.items())), skipped)

    def _messages(self, draft: Draft, n: int) -> Messages:
        topic = draft.topic
        lines = [f"Category: {topic.category}", f"Concept: {topic.concept}"]
        if topic.anchor:
            lines.append(f"What should be there instead: {topic.anchor}")
        lines.append(f"Pairs: {n}")
        if draft.rows:
            lines += ["There are already:", *(f"- {one.text}" for one in draft.rows[-KNOWN:])]
        return (
            {"role": "system", "content": self.told},
            {"role": "user", "content": "\n".join(lines)},
        )

    def _answer(self, n: int, number: int, store: Path, draft: Draft) -> str:
        """What the model says in a round, asked once ever."""
        messages = self._messages(draft, n)
        settings: dict[str, Any] = {
            "temperature": self.temperature,
            "max_tokens": self.tokens,
            "seed": self.seed + number,
        }
        question = json.dumps([self.model, settings, messages], sort_keys=True)
        path = store / f"{hashlib.sha256(question.encode()).hexdigest()}.txt"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        try:
            answer = self.asker.ask(messages, **settings)
        except WorkFailed as error:
            raise WorkFailed(
                f"writer 'llm': {error}. The answers so far are kept; the same command goes on."
            ) from error
        content = answer.encode("utf-8", "replace")
        write(path, content)
        return content.decode("utf-8")


@dataclass
class Draft:
    """The pairs of one concept so far.

    Args:
        topic: The concept.
        rows: Good pairs.
        counts: Answers, and what was wrong with them or with their pairs.
        bad: Answers that brought no new pair.
        why: What was wrong with the last of these.
    """

    topic: Topic
    rows: list[Prompt] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    bad: int = 0
    why: str = ""

    def add(self, answer: str, n: int, alike: float) -> None:
        """Take up to `n` pairs from an answer."""
        self.counts["answers"] += 1
        before = len(self.rows)
        try:
            for unsafe, safe in read(answer):
                if len(self.rows) < before + n:
                    self._take(row(self.topic, unsafe, safe), alike)
        except Refused as error:
            self.counts["refused"] += 1
            self.why = f"refused: {error}"
        except ValueError as error:
            self.counts["unreadable"] += 1
            self.why = f"{error}: {answer[:60]!r}"
        self.bad += len(self.rows) == before

    def _take(self, one: Prompt, alike: float) -> None:
        fault = self._fault(one, alike)
        if fault:
            self.counts[fault] += 1
            self.why = f"pairs were left out ({fault})"
        else:
            self.rows.append(one)

    def _fault(self, one: Prompt, alike: float) -> str:
        """Why a pair is of no use; "" if it is."""
        if about_minors(one):
            return "minors"
        safe = one.safe_prompt or ""
        if re.search(rf"\b{re.escape(self.topic.concept)}\b", safe, re.IGNORECASE):
            return "safe side names the concept"
        words = one.text.lower().split(), safe.lower().split()
        if words[0] == words[1] or SequenceMatcher(None, *words, False).ratio() < alike:
            return "no minimal rewriting"
        return "repeated" if one.id in {other.id for other in self.rows} else ""


class Refused(ValueError):
    """The model said that it will not write about a concept."""


def read(answer: str) -> list[tuple[str, str]]:
    """The pairs of an answer, by the letter of its form.

    Raises:
        Refused: The model said so in the form it was told.
        ValueError: An answer of any other form.
    """
    try:
        said = strict_json(answer)
    except ValueError:
        raise ValueError("no readable answer") from None
    if isinstance(said, dict) and set(said) == {"refused"}:
        raise Refused(str(said["refused"])[:60])
    if not isinstance(said, dict) or set(said) != {"pairs"} or not isinstance(said["pairs"], list):
        raise ValueError("an answer of another form")
    return [_texts(one) for one in said["pairs"]]


def _texts(one: Any) -> tuple[str, str]:
    if not isinstance(one, dict) or set(one) != {"unsafe", "safe"}:
        raise ValueError("a pair of another form")
    unsafe, safe = (" ".join(str(one[side]).split()) for side in ("unsafe", "safe"))
    strings = isinstance(one["unsafe"], str) and isinstance(one["safe"], str)
    if not strings or not all(0 < len(x) <= LONGEST and x.isprintable() for x in (unsafe, safe)):
        raise ValueError("a text that is empty, too long or not printable")
    return unsafe, safe
