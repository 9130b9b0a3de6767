"""Write one card per method from the method's own file: `python docs/cards.py [--check]`.

Nothing is imported to do it, so it takes a moment and needs no weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

from safelight.cards import Entry, entries

FOLDER = Path(__file__).parent / "cards"
KINDS = {
    "align": "Alignments: change weights, once",
    "guard": "Guards: act while pictures are made",
    "judge": "Judges: look at pictures",
    "metric": "Metrics: figures from records",
}
NOTE = "<!-- Written by docs/cards.py from the method's own file. Change it there. -->\n"


def pages() -> dict[str, str]:
    """Every page by its path below `docs/cards`."""
    found = {"index.md": index()}
    for kind in KINDS:
        for one in entries(kind):
            if one.card:
                found[f"{kind}/{one.name}.md"] = card(one)
    return found


def index() -> str:
    parts = [NOTE, "# Cards\n"]
    for kind, title in KINDS.items():
        parts.append(f"\n## {title}\n\n| name | what it does | source |\n|---|---|---|")
        for one in entries(kind):
            name = f"[{one.name}]({kind}/{one.name}.md)" if one.card else f"`{one.name}`"
            parts.append(f"| {name} | {cell(one.summary)} | {one.source} |")
    return "\n".join(parts) + "\n"


def card(one: Entry) -> str:
    """Source, claims, settings and the algorithm of one method."""
    assert one.card is not None
    lines = [
        NOTE,
        f"# {one.card.title}\n",
        f"`{one.name}` · {one.summary}\n",
        "| | |\n|---|---|",
        f"| source | {one.card.source} |",
        f"| families | {', '.join(one.card.families)} |",
        f"| needs | {', '.join(one.card.needs) or 'nothing'} |",
    ]
    if one.card.claims:
        lines.append("\n## What its authors claim\n\n| claim | figure |\n|---|---|")
        lines += [f"| {cell(text)} | {figure:g} |" for text, figure in one.card.claims.items()]
    if one.settings:
        lines.append("\n## Settings\n\n| name | type | default | meaning |\n|---|---|---|---|")
        lines += [
            f"| `{s.name}` | {cell(s.type)} | `{cell(s.default)}` | {cell(s.help)} |"
            for s in one.settings
        ]
    lines.append(f"\n## How it works\n\n```text\n{one.about}\n```")
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> int:
    wanted = pages()
    there = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.md")}
    stale = [
        name
        for name, text in wanted.items()
        if name not in there or (FOLDER / name).read_text(encoding="utf-8") != text
    ]
    gone = sorted(there - set(wanted))
    if "--check" in sys.argv[1:]:
        if stale or gone:
            print(f"out of date: {', '.join(stale + gone)}; run `make docs`.")
        return bool(stale or gone)
    for name in stale:
        (FOLDER / name).parent.mkdir(parents=True, exist_ok=True)
        (FOLDER / name).write_text(wanted[name], encoding="utf-8")
    for name in gone:
        (FOLDER / name).unlink()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
