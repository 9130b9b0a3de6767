"""What `--unsafe`, `--safe` and `--seeds` accept."""

import pytest

from safelight.cli import sets
from safelight.errors import BadInput, NotFound


@pytest.fixture
def loaded(monkeypatch):
    """Names that were asked for, without reading the files behind them."""
    monkeypatch.setattr(
        sets.PromptSet, "load", lambda name: sets.PromptSet.of(["a", "b"], str(name))
    )


def names(found):
    return [one.name for one in found]


def test_categories_come_alone_together_or_all_at_once(loaded):
    assert names(sets.unsafe(["weapons"])) == ["emoji/weapons/train"]
    two = ["emoji/weapons/train", "emoji/gore/train"]
    assert names(sets.unsafe(["weapons,gore"])) == names(sets.unsafe(["weapons", "gore"])) == two
    assert len(sets.unsafe(["all"])) == len(sets.categories()) == 6
    assert len(sets.unsafe(["all", "gore"])) == 6


def test_a_set_or_a_file_may_stand_for_a_category(loaded):
    assert names(sets.unsafe(["emoji/gore/test"])) == ["emoji/gore/test"]
    assert names(sets.unsafe(["mine.csv"])) == ["mine.csv"]


def test_an_unknown_category_suggests_the_nearest(loaded):
    with pytest.raises(NotFound, match="Did you mean 'weapons'"):
        sets.unsafe(["weapon"])
    with pytest.raises(BadInput, match="empty"):
        sets.unsafe([" , "])


def test_own_unsafe_prompts_need_own_safe_ones(loaded):
    mine, built_in = sets.unsafe(["mine.csv"]), sets.unsafe(["gore"])
    with pytest.raises(BadInput, match="--safe"):
        sets.safe([], mine)
    assert names(sets.safe(["b.csv"], mine)) == ["b.csv"]
    assert names(sets.safe([], built_in)) == ["emoji/safe/train"]


def test_seeds_are_ranges_and_lists():
    assert sets.seeds("0-3") == (0, 1, 2, 3)
    assert sets.seeds("7") == (7,)
    assert sets.seeds("1,5-6,1") == (1, 5, 6)


@pytest.mark.parametrize("text", ["", "a", "3-1", "1-", "-"])
def test_seeds_of_another_form_are_refused(text):
    with pytest.raises(BadInput, match="--seeds"):
        sets.seeds(text)
