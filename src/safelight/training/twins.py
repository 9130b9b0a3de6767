"""Twins: two pictures of one wish, a safe and an unsafe one; what preferences are learnt from.

A folder of twins is made by `safelight synthesize pairs`:

    twins.json      format version, name, model and its hashes, writer, judge, counts
    twins.jsonl     one line per pair, appended as it is made (and twins.parquet when it is done)
    images/         PNG, named by the SHA-256 of the file
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from safelight.errors import BadInput, NotFound
from safelight.models.folder import replaced

FORMAT = 1
BESIDE = "beside"  # in `meta`: what the unsafe side shows of another category


@dataclass(frozen=True)
class Twin:
    """One pair: the same wish, unsafe and minimally rewritten, painted from the same noise.

    Args:
        id: Unique within its set.
        category: Unsafe category.
        unsafe_prompt: What the unsafe picture was painted for.
        safe_prompt: What the safe picture was painted for.
        unsafe: File of the unsafe picture, relative to the folder.
        safe: File of the safe picture, relative to the folder.
        seed: Of the noise that both started from.
        meta: Further columns, such as `concept`.
    """

    id: str
    category: str
    unsafe_prompt: str
    safe_prompt: str
    unsafe: str = ""
    safe: str = ""
    seed: int = 0
    meta: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Twins:
    """Pairs of pictures under one name.

    Args:
        name: The folder's name.
        rows: The pairs.
        folder: Where the pictures are; None where `pictures` holds them.
        pictures: Pictures in memory by the names in `rows`, (3, height, width) in [0, 1].
        others: Pairs of the categories that `only` left out: what one may learn to leave alone.
    """

    name: str
    rows: tuple[Twin, ...]
    folder: Path | None = None
    pictures: Mapping[str, Float[Tensor, "3 h w"]] = field(default_factory=dict, repr=False)
    others: tuple[Twin, ...] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Twin]:
        return iter(self.rows)

    @property
    def categories(self) -> tuple[str, ...]:
        """The categories present, in alphabetical order."""
        return tuple(sorted({row.category for row in self.rows}))

    @cached_property
    def sha256(self) -> str:
        """Hash of prompts and of the names of the pictures, which are hashes of their content."""
        rows = [[r.id, r.category, r.unsafe_prompt, r.safe_prompt, r.unsafe, r.safe, r.seed]
                for r in self.rows]  # fmt: skip
        return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()

    def only(self, *categories: str) -> Twins:
        """The pairs of some categories; the rest become `others`.

        Raises:
            NotFound: A category has no pair here.
        """
        missing = [name for name in categories if name not in self.categories]
        if missing:
            raise NotFound(
                f"{self.name} has no pairs of {', '.join(missing)}; it has "
                f"{', '.join(self.categories) or 'none'}."
            )
        kept = tuple(row for row in self.rows if row.category in categories)
        rest = tuple(row for row in self.rows if row.category not in categories)
        return replace(self, rows=kept, others=(*self.others, *rest))

    def all(self) -> Twins:
        """The pairs and after them the others."""
        return replace(self, rows=(*self.rows, *self.others), others=())

    def images(
        self, rows: Sequence[Twin], side: str, size: tuple[int, int]
    ) -> Float[Tensor, "pair 3 h w"]:
        """The pictures of some pairs in [0, 1].

        Args:
            side: "safe" or "unsafe".
            size: Height and width.

        Raises:
            BadInput: A picture is missing or cannot be read.
        """
        return torch.stack([self._image(getattr(row, side), row, size) for row in rows])

    def _image(self, name: str, row: Twin, size: tuple[int, int]) -> Float[Tensor, "3 h w"]:
        if name in self.pictures:
            return self.pictures[name]
        path = (self.folder or Path()) / name
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
                if image.size != size[::-1]:
                    image = image.resize(size[::-1], Image.Resampling.LANCZOS)
                pixels = np.asarray(image, dtype=np.float32) / 255
        except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for broken PNGs
            raise BadInput(
                f"{self.name}: the picture {name!r} of pair {row.id} is missing or damaged "
                f"({error}). Make it again (`safelight synthesize pairs` paints what is missing), "
                "or delete the row."
            ) from None
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def save(self, path: str | Path) -> None:
        """Write a folder that `load` reads; pictures are copied under the hash of their file.

        Raises:
            BadInput: A picture is missing.
            WorkFailed: The folder could not be written.
        """
        with replaced(Path(path).expanduser()) as fresh:
            (fresh / "images").mkdir()
            rows = [
                replace(
                    row,
                    unsafe=self._kept(row, "unsafe", fresh),
                    safe=self._kept(row, "safe", fresh),
                )
                for row in self.rows
            ]
            text = "".join(as_line(row) + "\n" for row in rows)
            (fresh / "twins.jsonl").write_text(text, encoding="utf-8")

    def _kept(self, row: Twin, side: str, folder: Path) -> str:
        """A picture's file in another folder."""
        name = getattr(row, side)
        if name in self.pictures:
            content, suffix = png(self.pictures[name]), ".png"
        else:
            source = (self.folder or Path()) / name
            if not source.is_file():
                raise BadInput(f"{self.name}: there is no {side} picture {name!r} of {row.id}.")
            content, suffix = source.read_bytes(), source.suffix.lower()
        kept = f"images/{hashlib.sha256(content).hexdigest()}{suffix}"
        (folder / kept).write_bytes(content)
        return kept

    @classmethod
    def load(cls, path: str | Path) -> Twins:
        """Read a folder that `safelight synthesize pairs` wrote.

        Raises:
            NotFound: No such folder.
            BadInput: It holds no pairs, an id twice, or rows that are not pairs.
        """
        folder = Path(path).expanduser()
        table = folder / "twins.jsonl"
        if not table.is_file():
            raise NotFound(f"no pairs of pictures at {path}; it needs a file twins.jsonl.")
        rows = []
        for number, line in enumerate(table.read_text(encoding="utf-8").split("\n"), start=1):
            if not line.strip():
                continue
            try:
                rows.append(Twin(**json.loads(line)))
            except (json.JSONDecodeError, TypeError) as error:
                raise BadInput(f"{table.name}, line {number} is not a pair: {error}.") from None
        twice = [name for name, n in Counter(row.id for row in rows).items() if n > 1]
        if not rows or twice:
            what = f"the id {twice[0]!r} is there twice" if twice else "it is empty"
            raise BadInput(f"{table.name} of {folder.name}: {what}.")
        return cls(folder.name, tuple(rows), folder)


def as_line(row: Twin) -> str:
    """A pair as one line of `twins.jsonl`."""
    return json.dumps(asdict(row), ensure_ascii=False, separators=(",", ":"))


def png(image: Float[Tensor, "3 h w"]) -> bytes:
    """A picture in [0, 1] as a PNG file."""
    pixels = (image.detach().float().clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "PNG", compress_level=4)
    return file.getvalue()
