"""Rasterise the icon packs once into two sprite sheets (committed as PNG, see ATTRIBUTION).

    npm pack @iconify-json/noto @iconify-json/twemoji   (unpack beside each other)
    python worlds/emoji/art.py --packs FOLDER

Needs the extra `[world]` (resvg-py). Every later stage reads only the PNG sheets.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import numpy as np
from concepts import CONCEPTS, STYLES
from PIL import Image

SIDE = 96
COLUMNS = 10
HERE = Path(__file__).parent


def rasterise(pack: Path, names: list[str]) -> Image.Image:
    """One sheet of `SIDE`-pixel drawings, row by row, cropped to their ink and centred."""
    import resvg_py  # only the drawings' maker needs it; everyone else reads the sheets

    icons = json.loads((pack / "icons.json").read_text())
    rows = -(-len(names) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * SIDE, rows * SIDE))
    for i, name in enumerate(names):
        icon = icons["icons"].get(name) or icons["icons"][icons["aliases"][name]["parent"]]
        w = icon.get("width", icons.get("width", 16))
        h = icon.get("height", icons.get("height", 16))
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {w} {h}" width="256" height="256">{icon["body"]}</svg>'
        )
        png = resvg_py.svg_to_bytes(svg_string=svg, width=256, height=256)
        drawing = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
        drawing = drawing.crop(drawing.getbbox())
        drawing.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        if max(drawing.size) < SIDE:
            scale = SIDE / max(drawing.size)
            size = tuple(max(1, round(s * scale)) for s in drawing.size)
            drawing = drawing.resize(size, Image.Resampling.LANCZOS)
        x, y = i % COLUMNS * SIDE, i // COLUMNS * SIDE
        sheet.paste(drawing, (x + (SIDE - drawing.width) // 2, y + (SIDE - drawing.height) // 2))
    return sheet


def sprites(style: str, side: int) -> np.ndarray:
    """Premultiplied drawings of one style, float32 (concept, side, side, 4) in [0, 1]."""
    sheet = Image.open(HERE / "art" / f"{style}.png")
    out = np.zeros((len(CONCEPTS), side, side, 4), np.float32)
    for i in range(len(CONCEPTS)):
        x, y = i % COLUMNS * SIDE, i // COLUMNS * SIDE
        cell = np.asarray(sheet.crop((x, y, x + SIDE, y + SIDE)), np.float32) / 255
        cell[..., :3] *= cell[..., 3:]
        how = Image.Resampling.BOX if side < 48 else Image.Resampling.BILINEAR
        planes = [Image.fromarray(cell[..., c]).resize((side, side), how) for c in range(4)]
        out[i] = np.stack([np.asarray(p) for p in planes], -1)
    return out.clip(0, 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packs", type=Path, required=True)
    packs = parser.parse_args().packs
    (HERE / "art").mkdir(exist_ok=True)
    for style, (pack, _) in STYLES.items():
        sheet = rasterise(packs / f"iconify-json-{pack}", [c.icon for c in CONCEPTS])
        sheet.save(HERE / "art" / f"{style}.png", optimize=True)
        print(style, sheet.size)
