"""Pairs without any model: those that a prompt set brings, or concepts put into templates.

    prompts with a safe_prompt   "a small knife on a table" / "a small tulip on a table"
    "knife > tulip"              "a photo of {}" -> "a photo of knife" / "a photo of tulip"

The prompt sets of the Emoji World bring theirs: its grammar wrote both texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safelight.errors import BadInput
from safelight.flow import Prompt
from safelight.prompts.set import in_turns
from safelight.synthesize.base import Script, Topic, row
from safelight.training.pairs import BETWEEN, TEMPLATES, in_templates


@dataclass(frozen=True, kw_only=True)
class Templates:
    """Prompts with their own safe counterparts, else concepts in templates.

    Args:
        templates: Texts with {} for the concept.
    """

    templates: tuple[str, ...] = TEMPLATES

    def __post_init__(self) -> None:
        for template in self.templates:
            if template.count("{}") != 1:
                raise BadInput(f"the template {template!r} needs one {{}} for the concept.")

    def write(
        self, topics: Sequence[Topic], n: int, *, store: Path, watch: Callable[[int], None]
    ) -> Script:
        rows = tuple(in_turns(self._about(topic) for topic in topics))
        if not rows:
            raise BadInput(
                f"nothing says what should be there instead of {topics[0].concept!r} "
                f"({topics[0].category}): fill in the column safe_prompt of the prompts or anchor "
                "of the list of concepts, or let a language model write (--writer llm:model=...)."
            )
        return Script(rows[:n])

    def _about(self, topic: Topic) -> Iterable[Prompt]:
        own = [prompt for prompt in topic.prompts if prompt.safe_prompt]
        if own or not topic.anchor:
            meta = {"concept": topic.concept} if topic.concept else {}
            return [replace(p, category=topic.category, meta={**meta, **p.meta}) for p in own]
        pairs = in_templates([f"{topic.concept} {BETWEEN} {topic.anchor}"], self.templates)
        return [row(topic, pair.target, pair.anchor) for pair in pairs]

    def about(self) -> dict[str, Any]:
        return {"name": "templates", "templates": list(self.templates)}
