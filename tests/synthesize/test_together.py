"""Pairs whose unsafe side shows two kinds of harm, and whose safe side shows neither."""

import pytest
import torch

from safelight.errors import BadInput
from safelight.flow import Prompt
from safelight.synthesize.base import read
from safelight.synthesize.pairs import synthesize
from safelight.synthesize.together import together


def row(category, text, safe):
    return Prompt(id=text, text=text, category=category, safe_prompt=safe)


ROWS = [
    row("weapons", "a small knife on a table", "a small tulip on a table"),
    row("weapons", "a bomb at night", "a ball at night"),
    row("death", "a skull in the snow, nice", "a cat in the snow, nice"),
]


def drawn(rows=ROWS, n=8):
    return together(rows, n, torch.Generator().manual_seed(0))


def test_both_harms_are_asked_for_and_both_are_replaced():
    unsafe = {"weapons": ("knife", "bomb"), "death": ("skull",)}
    made = drawn()
    assert {one.category for one in made} == {"weapons", "death"}
    for one in made:
        for words in unsafe.values():
            assert any(word in one.text.split() for word in words), one.text
            assert not any(word in one.safe_prompt.split() for word in words), one.safe_prompt
        assert one.meta["concept"] in unsafe[one.category]
        assert one.meta["beside"] not in unsafe[one.category]
        assert one.meta["concept"] in one.text and one.meta["beside"] in one.text
    assert len({one.id for one in made}) == len(made)


def test_some_keep_the_rest_of_their_sentence_and_some_do_not():
    texts = [one.text for one in drawn() if one.category == "death"]
    assert any(text.endswith("in the snow, nice") for text in texts)
    assert any("snow" not in text for text in texts)


def test_as_many_as_are_wanted_of_each_category_and_none_of_a_single_one():
    made = drawn(n=2)
    assert [one.category for one in made].count("weapons") == 2
    assert drawn(ROWS[:2]) == [] and drawn(n=0) == []


def test_they_pass_the_minors_filter_like_all_others(tiny_sd1, listed, tmp_path, monkeypatch):
    refused = "safelight.synthesize.pairs.about_minors"
    monkeypatch.setattr(refused, lambda one: "beside" in one.meta)
    made = synthesize(tiny_sd1, listed, tmp_path / "pairs", per_category=2, together=3, batch=4)
    assert len(made.twins) == 4 and made.about["prompts"]["minors"] == 6


@pytest.fixture
def listed(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("target,anchor,category\nknife,tulip,weapons\nskull,cat,death\n")
    return [read(path)]


def test_they_are_painted_after_the_others_which_stay_as_they_are(tiny_sd1, listed, tmp_path):
    few = {"per_category": 2, "batch": 4}
    plain = synthesize(tiny_sd1, listed, tmp_path / "plain", **few)
    more = synthesize(tiny_sd1, listed, tmp_path / "more", together=3, **few)
    assert more.twins.rows[: len(plain.twins)] == plain.twins.rows
    rest = more.twins.rows[len(plain.twins) :]
    assert sorted(one.category for one in rest) == ["death"] * 3 + ["weapons"] * 3
    assert more.about["together"] == 3 and "together" not in plain.about
    assert more.about["categories"]["death"]["pairs"] == 5
    assert "another category beside: 3 of each" in (tmp_path / "more" / "README.md").read_text()
    with pytest.raises(BadInput, match="different: together"):
        synthesize(tiny_sd1, listed, tmp_path / "plain", together=3, **few)
    with pytest.raises(BadInput, match="together must be at least 0"):
        synthesize(tiny_sd1, listed, tmp_path / "none", together=-1)
