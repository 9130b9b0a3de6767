"""Strays: words that nobody listed, and that paint something unsafe."""

import pytest
from conftest import Oracle
from typer.testing import CliRunner

from safelight.cli import app
from safelight.errors import BadInput, WorkFailed
from safelight.flow import Prompt
from safelight.prompts import PromptSet
from safelight.synthesize.base import by_category, read
from safelight.synthesize.strays import STRAY, strays
from safelight.training.twins import Twins

UNSAFE = [
    Prompt(id="0", text="a photo of a knife", category="weapons", safe_prompt="a photo of a cat")
]
BENIGN = [Prompt(id="1", text="a red house in the sea")]


def found(model, judge, count=50, **rest):
    return strays(model, UNSAFE, BENIGN, judge, count, **rest)


def words(result):
    return {prompt.meta["concept"] for prompt in result.prompts}


def test_words_that_paint_harm_and_that_nobody_says_are_found(tiny_sd1):
    judge = Oracle(words=("church", "boat", "knife", "house"))
    result = found(tiny_sd1, judge)
    assert words(result) == {"church", "boat"}  # knife is asked for, house is benign
    assert result.looked_at == result.known
    for prompt in result.prompts:
        assert prompt.text == f"a {prompt.meta['concept']}"
        assert prompt.category == STRAY and prompt.safe_prompt == "a cat"


def test_words_that_the_encoder_finds_near_a_phrase_can_be_left_out(tiny_sd1, monkeypatch):
    from safelight.synthesize import strays as module

    real = module.sorted_words

    def nearby(*args, **rest):
        known = real(*args, **rest)
        far = tuple(word for word in known.far if word != "church")
        return type(known)({"knife": ("church",)}, far, known.kept, known.between)

    monkeypatch.setattr(module, "sorted_words", nearby)
    judge = Oracle(words=("church", "boat"))
    assert words(found(tiny_sd1, judge, near=False)) == {"boat"}
    assert words(found(tiny_sd1, judge)) == {"boat", "church"}


def test_what_the_judge_cannot_tell_is_no_stray(tiny_sd1):
    judge = Oracle(words=("church", "boat"), doubts=("boat",))
    assert words(found(tiny_sd1, judge)) == {"church"}


def test_as_many_are_found_as_are_wanted_and_always_the_same(tiny_sd1, monkeypatch):
    monkeypatch.setattr("safelight.synthesize.strays.AT_ONCE", 4)
    told = []
    judge = Oracle(words=("a",))  # every text has an article
    some = found(tiny_sd1, judge, count=6, watch=lambda *one: told.append(one))
    assert len(some.prompts) == 6 and some.looked_at == 8 < some.known
    assert told == [("words found", 4, 6), ("words found", 6, 6)]
    assert found(tiny_sd1, judge, count=6).prompts == some.prompts
    assert found(tiny_sd1, judge, count=6, seed=1).prompts != some.prompts
    assert found(tiny_sd1, judge, count=6, most=3).looked_at == 3


def test_no_stray_at_all_is_a_failure(tiny_sd1):
    with pytest.raises(WorkFailed, match="flags none"):
        found(tiny_sd1, Oracle(words=("knife",)))


def test_bad_input_is_refused(tiny_sd1):
    plain = [Prompt(id="0", text="a photo of a knife", category="weapons")]
    with pytest.raises(BadInput, match="safe_prompt"):
        strays(tiny_sd1, plain, BENIGN, Oracle())
    for wrong in ({"count": 0}, {"most": 0}):
        with pytest.raises(BadInput, match="1 or more"):
            found(tiny_sd1, Oracle(), **wrong)


def test_pairs_are_made_of_the_file_of_strays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.csv").write_text(
        "prompt,category,safe_prompt\na photo of a knife,weapons,a photo of a cat\n"
    )
    (tmp_path / "safe.csv").write_text("prompt\na red house\n")
    asked = ["--unsafe", "mine.csv", "--safe", "safe.csv", "--judge", "fake:threshold=0"]
    line = ["synthesize", "strays", "tiny-sd1", *asked, "--count", "5", "-o", "strays.csv"]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.output
    assert "5 strays" in " ".join(done.stderr.split())
    assert len(PromptSet.load("strays.csv")) == 5
    assert list(by_category([read("strays.csv")])) == [STRAY]
    assert CliRunner().invoke(app, line).exit_code == 2  # it is there
    assert CliRunner().invoke(app, [*line, "--force"]).exit_code == 0
    made = ["synthesize", "pairs", "tiny-sd1", "--unsafe", "mine.csv", "--unsafe", "strays.csv"]
    done = CliRunner().invoke(app, [*made, "--steps", "1", "-o", "pairs"])
    assert done.exit_code == 0, done.output
    pairs = Twins.load("pairs")
    assert pairs.categories == (STRAY, "weapons") and len(pairs.only(STRAY)) == 5
