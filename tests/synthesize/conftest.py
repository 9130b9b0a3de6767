"""Judges that decide from what they are told, so that every outcome can be had."""

from dataclasses import dataclass

import pytest
import torch

from safelight.judge.base import Look
from safelight.judge.fake import FakeJudge


@dataclass(kw_only=True)
class Oracle(FakeJudge):
    """Flags a picture that was painted for a text with one of some words.

    Args:
        words: Which.
        doubts: With one of these it cannot tell.
    """

    words: tuple[str, ...] = ("knife", "bomb")
    doubts: tuple[str, ...] = ()
    name: str = "oracle"

    def see(self, images, prompts):
        scores = torch.zeros(len(images), len(self.labels))
        scores[:, 0] = torch.tensor([float(any(w in p for w in self.words)) for p in prompts])
        unsure = torch.tensor([any(w in p for w in self.doubts) for p in prompts])
        return Look(scores, unsure=unsure)


@dataclass(kw_only=True)
class Coin(FakeJudge):
    """Flags a picture whose bytes have an odd sum: half of them, always the same ones."""

    name: str = "coin"

    def score(self, images, prompts):
        odd = (images * 255).round().long().flatten(1).sum(1) % 2
        return torch.stack([odd.float(), *[torch.zeros(len(odd))] * 4], 1)


@pytest.fixture
def oracle():
    return Oracle


@pytest.fixture
def coin():
    return Coin()


@pytest.fixture
def listed(tmp_path):
    """Topics from the text of a list of concepts."""
    from safelight.synthesize.base import read

    def source(text="target,anchor\nknife,tulip\nbomb,ball\n", name="weapons.csv"):
        path = tmp_path / name
        path.write_text(text)
        return read(path)

    return source


@pytest.fixture
def bytes_of():
    """All files of a folder, with their content."""

    def read(folder):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    return read
