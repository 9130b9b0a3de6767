"""Suites are strict: a typo is an error with a suggestion, never another measurement."""

import pytest

from safelight.bench.suite import read, shipped
from safelight.errors import BadInput, NotFound

GOOD = """
title = "Small"
model = "tiny-sd1"
judges = ["fake"]

[size.quick]
prompts = 4
attacked = 2

[size.full]
prompts = 8
attacked = 4
seeds = [0, 1]

[[rows]]
name = "bare"

[[rows]]
name = "screened"
guards = [{ name = "screen", judge = "emoji" }]

[[columns]]
prompts = ["unsafe.csv", "emoji/safe/test"]
attacks = ["replay", { name = "mma", label = "short mma", slots = 4, budget = { steps = 3 } }]
"""


@pytest.fixture
def suite(tmp_path):
    (tmp_path / "unsafe.csv").write_text("prompt,category\na cat,red\n")

    def write(text=GOOD, size="quick"):
        (tmp_path / "small.toml").write_text(text)
        return read(tmp_path / "small.toml", size)

    return write


def test_rows_and_columns_are_read(suite):
    one = suite()
    assert (one.name, one.title) == ("small", "Small")
    assert ([judge.name for judge in one.judges], one.attack_judge.name) == (["fake"], "emoji")
    assert [row.name for row in one.rows] == ["bare", "screened"]
    assert [row.protects for row in one.rows] == [False, True]
    assert one.rows[1].guards[0].settings["judge"].name == "emoji"
    assert [column.name for column in one.columns] == [
        "unsafe.csv / replay",
        "unsafe.csv / short mma",
        "emoji/safe/test / replay",
        "emoji/safe/test / short mma",
    ]
    attack = one.columns[1].attack
    assert (attack.settings, attack.budget) == ({"slots": 4}, {"steps": 3})


def test_the_size_says_how_much(suite):
    assert suite().size.seeds == (0,)
    assert (suite(size="full").size.prompts, suite(size="full").size.seeds) == (8, (0, 1))
    with pytest.raises(BadInput, match="no size named 'standard'"):
        suite(size="standard")


@pytest.mark.parametrize(
    "old, new, error, words",
    [
        ("title", "titel", BadInput, "Did you mean 'title'"),
        ("attacks =", "attack =", BadInput, "Did you mean 'attacks'"),
        ("guards =", "guard =", BadInput, "Did you mean 'guards'"),
        ("attacked = 2", "attaked = 2", BadInput, "Did you mean 'attacked'"),
        ("[size.quick]", "[size.quik]", BadInput, "Did you mean 'quick'"),
        ("attacked = 2", "attacked = 0", BadInput, "at least 1"),
        ("prompts = 4", 'prompts = "4"', BadInput, "whole number"),
        ('"mma"', '"mmma"', NotFound, "Did you mean 'mma'"),
        ('"screen"', '"scren"', NotFound, "Did you mean 'screen'"),
        ('["fake"]', '["fke"]', NotFound, "Did you mean 'fake'"),
        ("emoji/safe/test", "emoji/save/test", NotFound, "Did you mean 'emoji/safe/test'"),
        ("steps = 3", "stepps = 3", BadInput, "Did you mean 'steps'"),
        ('name = "screened"', 'name = "bare"', BadInput, "two rows are named 'bare'"),
        ('name = "bare"', "", BadInput, "'name' is missing"),
        ("[[rows]]", "[[rows]", BadInput, "not readable TOML"),
        ('["fake"]', '"fake"', BadInput, "a list is expected"),
        ('["fake"]', "[]", BadInput, "name at least one"),
        ('["fake"]', '["fake", { name = "fake" }]', BadInput, "two judges are named 'fake'"),
        ('["fake"]', '[{ name = "fke" }]', NotFound, "Did you mean 'fake'"),
        ('["fake"]', "[{ threshold = 0.3 }]", BadInput, "a name is missing"),
        ('judge = "emoji"', 'judge = { name = "emojy" }', NotFound, "Did you mean 'emoji'"),
    ],
)
def test_what_is_wrong_is_said(suite, old, new, error, words):
    assert old in GOOD
    with pytest.raises(error, match=words):
        suite(GOOD.replace(old, new, 1))


def test_a_judge_may_be_a_table_and_its_files_lie_beside_the_suite(suite, tmp_path):
    (tmp_path / "policy.toml").write_text('weapons = "a gun"\n')
    text = GOOD.replace(
        '["fake"]',
        """[
  { name = "vlm", model = "eyes", url = "http://127.0.0.1:9/v1", categories = "policy.toml" },
  { name = "vlm", label = "strict", model = "eyes", categories = "policy.toml" },
  { name = "nudenet", classes = "9" },
]
attack_judge = { name = "fake", threshold = 0.3 }""",
    )
    text = text.replace('judge = "emoji"', 'judge = { name = "opennsfw", threshold = 0.8 }')
    one = suite(text)
    assert [judge.label for judge in one.judges] == ["vlm", "strict", "nudenet"]
    assert one.judges[0].settings == {
        "model": "eyes",
        "url": "http://127.0.0.1:9/v1",
        "categories": str(tmp_path / "policy.toml"),
    }
    assert (one.attack_judge.name, one.attack_judge.settings) == ("fake", {"threshold": 0.3})
    looks = one.rows[1].guards[0].settings["judge"]
    assert (looks.name, looks.settings) == ("opennsfw", {"threshold": 0.8})


def test_what_ships_is_found_by_name_and_reads():
    assert set(shipped()) == {
        "emoji-dpo",
        "emoji-quick",
        "emoji-safetext",
        "emoji-standard",
        "emoji-text-side",
        "emoji-weapons",
        "sd1-template",
        "sdxl-template",
    }
    for size in ("quick", "standard", "full"):
        for name in (one for one in shipped() if one.startswith("emoji-")):
            assert read(name, size).rows[0].protects is False
    with pytest.raises(NotFound, match="Did you mean 'emoji-quick'"):
        read("emoji-quik")


def test_templates_read_once_their_files_are_there(tmp_path):
    for name in ("sd1-template", "sdxl-template"):
        path = tmp_path / f"{name}.toml"
        path.write_text(shipped()[name].read_text())
        for file in ("unsafe.csv", "benign.csv"):
            (tmp_path / file).write_text("prompt\na cat\n")
        assert len(read(path, "standard").columns) == 5


def test_an_attack_with_controls_stands_for_the_same_search_once_more_each(suite):
    old = '{ name = "mma", label = "short mma", slots = 4, budget = { steps = 3 } }'
    controls = 'controls = ["words", "seeds"]'
    new = '{ name = "unlearn_diff_atk", k = 2, budget = { steps = 3 }, ' + controls + " }"
    assert old in GOOD
    found = [column.attack for column in suite(GOOD.replace(old, new)).columns if column.attack]
    assert [(a.label, dict(a.settings), dict(a.budget)) for a in found[:3]] == [
        ("unlearn_diff_atk", {"k": 2}, {"steps": 3}),
        ("unlearn_diff_atk, words", {"k": 2, "control": "words"}, {"steps": 3}),
        ("unlearn_diff_atk, seeds", {"k": 2, "control": "seeds"}, {"steps": 3}),
    ]
    with pytest.raises(BadInput, match="controls"):
        suite(GOOD.replace(old, new.replace('["words", "seeds"]', '"words"')))
