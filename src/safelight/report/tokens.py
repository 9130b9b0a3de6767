"""Prompts coloured by token scores, as HTML and as SVG. No torch.

A row is what `guard.explain.TokenScores` holds, as a mapping: prompt, by, reads, tokens, scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from safelight.errors import BadInput, WorkFailed

FORMATS = (".html", ".svg")
MARKED = 0.5  # from here on the score is also written out
COLUMN, LINE, WIDEST = 8.4, 30, 88  # SVG: pixels per character and per line, characters per line
WARM = (201, 48, 31)


@dataclass(frozen=True)
class Token:
    """One token: its text without the space after it, and its score."""

    text: str
    space: bool
    score: float

    @property
    def marked(self) -> bool:
        return self.score >= MARKED


@dataclass(frozen=True)
class Line:
    """One prompt as one encoder reads it."""

    prompt: str
    by: str
    reads: str
    tokens: tuple[Token, ...]


def line(row: Mapping[str, Any]) -> Line:
    """A row as it is drawn."""
    tokens = tuple(
        Token(text.strip(" "), text.endswith(" "), float(score))
        for text, score in zip(row["tokens"], row["scores"], strict=True)
    )
    return Line(row["prompt"], row["by"], row["reads"], tokens)


def by_prompt(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Line]]:
    """The lines of each prompt, in order."""
    found: dict[str, list[Line]] = {}
    for row in rows:
        found.setdefault(row["prompt"], []).append(line(row))
    return found


def check_format(path: Path) -> None:
    """Refuse a file that could not be written, before any work is done.

    Raises:
        BadInput: Neither HTML nor SVG.
    """
    if path.suffix.lower() not in FORMATS:
        raise BadInput(f"{path.name} is neither .html nor .svg; name one of them with -o.")


def write(path: Path, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """A page or a picture, by the file's ending.

    Raises:
        BadInput: Neither HTML nor SVG.
        WorkFailed: It could not be written.
    """
    check_format(path)
    text = html(rows, title) if path.suffix.lower() == ".html" else svg(rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise WorkFailed(f"could not write {path}: {error.strerror or error}.") from error


def html(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """One self-contained page."""
    from safelight.report.page import page

    return page("explain.html.j2", {"title": title, "prompts": by_prompt(rows)})


def svg(rows: Sequence[Mapping[str, Any]]) -> str:
    """One picture: a block per prompt, a line per encoder, wrapped like text."""
    parts: list[str] = []
    y = 16.0
    for lines in by_prompt(rows).values():
        for one in lines:
            parts.append(_text(12, y + 12, one.reads, "#6b625b", 12, len(one.reads) * 7.2))
            y += 20
            drawn, y = _drawn(one, y)
            parts += drawn
        y += 12
    width = 24 + WIDEST * COLUMN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{y:.0f}" '
        f'viewBox="0 0 {width:.0f} {y:.0f}" font-family="ui-monospace, Menlo, Consolas, monospace">'
        f'<rect width="100%" height="100%" fill="#ffffff"/>{"".join(parts)}</svg>\n'
    )


def _drawn(one: Line, y: float) -> tuple[list[str], float]:
    """A prompt's tokens, and where the next line begins."""
    parts, at = [], 0
    for token in one.tokens:
        shown = f"{token.text} {token.score:.2f}" if token.marked else token.text
        if at and at + len(shown) > WIDEST:
            at, y = 0, y + LINE
        x, wide = 12 + at * COLUMN, len(shown) * COLUMN
        parts.append(
            f'<g><title>{token.score:.3f}</title><rect x="{x - 2:.1f}" y="{y:.1f}" rx="4" '
            f'width="{wide + 4:.1f}" height="22" fill="rgb{WARM}" '
            f'fill-opacity="{0.75 * token.score:.3f}"/>'
            f"{_text(x, y + 16, shown, '#1d1815', 14, wide)}</g>"
        )
        at += len(shown) + token.space
    return parts, y + LINE


def _text(x: float, y: float, text: str, fill: str, size: int, length: float) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}" '
        f'textLength="{length:.1f}" lengthAdjust="spacingAndGlyphs">{escape(text)}</text>'
    )
