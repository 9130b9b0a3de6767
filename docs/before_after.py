"""The picture in the README, from the run folders of a demonstration.

python docs/before_after.py demo
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw

SIDE, SCALE, COLUMNS, MARGIN = 64, 2, 8, 150
HERE = Path(__file__).parent


def pictures(run: Path, arm: str) -> dict[str, Path]:
    """Prompt id -> picture of one arm, in the order of the run."""
    rows = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    return {
        row["prompt_id"]: run / row["image"] for row in rows if row["arm"] == arm and row["image"]
    }


def main(demo: Path) -> None:
    runs = {name: demo / "runs" / name for name in ("safetext", "anchored")}
    rows = {"base model": pictures(runs["safetext"], "base")}
    rows |= {
        {"safetext": "SafeText", "anchored": "SafeText, anchor"}[name]: pictures(run, "protected")
        for name, run in runs.items()
    }
    ids = [i for i in rows["base model"] if "-test-" in i and not i.startswith("safe")][:COLUMNS]
    ids += [i for i in rows["base model"] if i.startswith("safe")][:3]
    cell = SIDE * SCALE
    sheet = Image.new("RGB", (MARGIN + (cell + 4) * len(ids), (cell + 4) * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for y, (name, found) in enumerate(rows.items()):
        draw.text((8, y * (cell + 4) + cell // 2 - 8), name, fill="black", font_size=16)
        for x, prompt in enumerate(ids):
            with Image.open(found[prompt]) as picture:
                large = picture.convert("RGB").resize((cell, cell), Image.Resampling.LANCZOS)
            sheet.paste(large, (MARGIN + x * (cell + 4), y * (cell + 4)))
    sheet.save(HERE / "before_after.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
