"""The Emoji World's prompt sets keep test words and templates out of training."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest

WORLD = Path(__file__).parents[2] / "worlds" / "emoji"
CATEGORIES = ("weapons", "gore", "death", "drugs", "alcohol", "gesture")
SIZES = {"train": 500, "test": 200, "paraphrase": 100, "mixed": 100}


@pytest.fixture(scope="module")
def builder() -> Iterator[None]:
    """The build scripts can be imported."""
    sys.path.insert(0, str(WORLD))
    yield
    sys.path.remove(str(WORLD))


def rows(name: str) -> list[dict[str, str]]:
    path = Path(str(files("safelight"))) / "world" / "prompts" / "emoji" / f"{name}.csv"
    with path.open(newline="") as f:
        return list(csv.DictReader(f))


def training_texts() -> list[str]:
    names = ["safe/train", *(f"{c}/train" for c in CATEGORIES)]
    return [row["prompt"] for name in names for row in rows(name)]


def test_every_set_has_its_size():
    assert len(rows("safe/train")) == 1000
    assert len(rows("safe/test")) == len(rows("neighbours/test")) == 300
    for category in CATEGORIES:
        for kind, n in SIZES.items():
            assert len(rows(f"{category}/{kind}")) == n


def test_held_out_words_never_occur_in_training(builder):
    from concepts import UNSAFE

    texts = [f" {text} " for text in training_texts()]
    for concept in UNSAFE:
        for word in concept.held_out:
            assert not any(f" {word} " in text or f" {word}," in text for text in texts), word


def test_paraphrases_use_only_held_out_words(builder):
    from concepts import UNSAFE

    for category in CATEGORIES:
        for row in rows(f"{category}/paraphrase"):
            concept = next(c for c in UNSAFE if c.label == row["unsafe_objects"])
            assert any(word in row["prompt"] for word in concept.held_out), row["prompt"]


def test_held_out_templates_never_occur_in_training(builder):
    from captions import HELD_OUT_PREFIXES

    texts = training_texts()
    for prefix in (*HELD_OUT_PREFIXES, "you can find"):
        assert not any(text.startswith(prefix) or f" {prefix} " in text for text in texts), prefix
    for category in CATEGORIES:
        for row in rows(f"{category}/test"):
            starts = any(row["prompt"].startswith(prefix) for prefix in HELD_OUT_PREFIXES)
            assert starts or "you can find" in row["prompt"], row["prompt"]


def test_a_safe_prompt_names_no_unsafe_object(builder):
    from concepts import UNSAFE

    for category in CATEGORIES:
        for row in rows(f"{category}/train"):
            words = {word for c in UNSAFE for word in c.train if len(word.split()) > 1}
            assert not any(word in row["safe_prompt"] for word in words), row["safe_prompt"]


def test_the_shipped_sets_are_what_the_script_makes(builder, tmp_path):
    from prompts import build

    build(tmp_path)
    shipped = Path(str(files("safelight"))) / "world" / "prompts"
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.csv"))
    assert made == sorted(path.relative_to(shipped) for path in shipped.rglob("*.csv"))
    for name in made:
        assert (tmp_path / name).read_bytes() == (shipped / name).read_bytes(), name
