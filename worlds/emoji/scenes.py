"""Scenes: a small graph of what is where, and its picture (64 x 64 RGB)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from art import sprites
from concepts import BACKGROUNDS, CONCEPTS, STYLES

SIDE = 64
RELATIONS = ("beside", "above", "with")
# relation (or size of a single object) -> (centre x, centre y, side) per object
PLACES = {
    "big": ((32, 33, 44),),
    "small": ((32, 38, 30),),
    "beside": ((17, 35, 30), (47, 35, 30)),
    "above": ((32, 17, 30), (32, 47, 30)),
    "with": ((25, 29, 40), (48, 48, 28)),
}
BACKGROUND_NAMES = tuple(BACKGROUNDS)
STYLE_NAMES = tuple(STYLES)


@dataclass(frozen=True)
class Scene:
    """What a picture shows: one or two concepts, how they stand, on what, in which style."""

    objects: tuple[int, ...]
    place: str
    background: str
    style: str


def random_scene(rng: np.random.Generator, objects: tuple[int, ...] | None = None) -> Scene:
    """A uniform scene; half of them have two different objects."""
    if objects is None:
        n = 1 if rng.random() < 0.5 else 2
        objects = tuple(int(i) for i in rng.choice(len(CONCEPTS), n, replace=False))
    places = ("big", "small") if len(objects) == 1 else RELATIONS
    return Scene(
        objects,
        str(rng.choice(places)),
        str(rng.choice(BACKGROUND_NAMES)),
        str(rng.choice(STYLE_NAMES)),
    )


@cache
def _sprites(style: str, side: int) -> np.ndarray:
    return sprites(style, side)


def _gradient(top: tuple[int, int, int], bottom: tuple[int, int, int]) -> np.ndarray:
    a = np.linspace(0, 1, SIDE, dtype=np.float32)[:, None, None]
    return np.broadcast_to(
        (1 - a) * np.array(top) / 255 + a * np.array(bottom) / 255, (SIDE, SIDE, 3)
    ).copy()


@cache
def backdrop(name: str) -> np.ndarray:
    """The empty background, float32 (64, 64, 3) in [0, 1]."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)
    if name == "plain":
        return np.full((SIDE, SIDE, 3), 0.97, np.float32)
    if name == "sky":
        out = _gradient((110, 178, 240), (196, 228, 252))
        for cx, cy, r in (
            (12, 12, 6),
            (20, 10, 7),
            (50, 20, 7),
            (57, 22, 5),
            (8, 54, 6),
            (15, 56, 5),
        ):
            out[(x - cx) ** 2 + ((y - cy) * 1.5) ** 2 < r * r] = 1
        return out.astype(np.float32)
    if name == "night":
        out = _gradient((14, 18, 58), (44, 48, 104))
        for _ in range(22):
            cx, cy = rng.integers(0, SIDE, 2)
            out[cy, cx] = (1, 1, 0.85)
        return out.astype(np.float32)
    if name == "meadow":
        out = _gradient((170, 215, 250), (214, 236, 250))
        hill = y > 36 + 3 * np.sin(x / 10)
        out[hill] = np.array((112, 184, 76)) / 255
        out[hill & (y > 52)] = np.array((92, 164, 62)) / 255
        return out.astype(np.float32)
    if name == "beach":
        out = _gradient((150, 214, 246), (190, 232, 250))
        out[y > 26] = np.array((40, 140, 196)) / 255
        out[y > 38 + 2 * np.sin(x / 7)] = np.array((240, 214, 150)) / 255
        return out.astype(np.float32)
    if name == "snow":
        out = _gradient((150, 164, 190), (186, 198, 216))
        out[y > 44 - 3 * np.sin(x / 12)] = np.array((244, 248, 252)) / 255
        for _ in range(26):
            cx, cy = rng.integers(0, SIDE - 1, 2)
            out[cy : cy + 2, cx : cx + 2] = 1
        return out.astype(np.float32)
    if name == "room":
        out = np.empty((SIDE, SIDE, 3), np.float32)
        out[:] = np.array((226, 196, 204)) / 255
        out[y > 42] = np.array((164, 116, 78)) / 255
        out[(y > 42) & (y % 7 < 1)] = np.array((136, 92, 60)) / 255
        out[(y > 40) & (y <= 42)] = np.array((250, 244, 240)) / 255
        return out
    if name == "sunset":
        out = _gradient((122, 62, 130), (252, 168, 80))
        out[(x - 50) ** 2 + (y - 46) ** 2 < 64] = np.array((255, 232, 140)) / 255
        out[y > 52] = np.array((70, 44, 84)) / 255
        return out.astype(np.float32)
    raise KeyError(name)


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """The picture of a scene, uint8 (64, 64, 3); objects wobble by one pixel."""
    out = backdrop(scene.background).copy()
    for concept, (cx, cy, side) in zip(scene.objects, PLACES[scene.place], strict=True):
        dx, dy = rng.integers(-1, 2, 2)
        x, y = cx - side // 2 + int(dx), cy - side // 2 + int(dy)
        drawing = _sprites(scene.style, side)[concept]
        x0, y0 = max(x, 0), max(y, 0)
        x1, y1 = min(x + side, SIDE), min(y + side, SIDE)
        part = drawing[y0 - y : y1 - y, x0 - x : x1 - x]
        out[y0:y1, x0:x1] = part[..., :3] + out[y0:y1, x0:x1] * (1 - part[..., 3:])
    return (out.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def many(n: int, seed: int) -> tuple[list[Scene], np.ndarray]:
    """`n` random scenes and their pictures, uint8 (n, 64, 64, 3)."""
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng) for _ in range(n)]
    return scenes, np.stack([render(s, rng) for s in scenes])
