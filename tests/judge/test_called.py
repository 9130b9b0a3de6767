"""Two judges of a kind stand in one run under names of their own, which commands can repeat."""

import pytest

from safelight.bench.matrix import judge_of
from safelight.bench.settings import spelled
from safelight.bench.suite import Method
from safelight.cli.guards import judge
from safelight.errors import BadInput
from safelight.judge.emoji import EmojiJudge, EmojiJudgeB
from safelight.judge.fake import FakeJudge
from safelight.judge.nudenet import NudeNet


def test_a_label_is_the_name_in_every_record_and_the_spec_repeats_it():
    strict = judge("nudenet:label=strict,threshold=0.3")
    assert (strict.name, strict.threshold) == ("strict", 0.3)
    assert NudeNet().name == "nudenet"  # others of its kind keep theirs
    again = judge(spelled(strict))
    assert again == strict and again.name == "strict"


def test_a_suites_label_is_the_judges_name():
    method = Method(name="nudenet", label="strict", settings={"threshold": 0.3})
    assert judge_of(method).name == "strict"
    assert judge_of(Method(name="nudenet", label="nudenet", settings={})).name == "nudenet"


def test_a_judge_whose_name_says_which_it_is_keeps_it():
    with pytest.raises(BadInput, match="leave label= out"):
        EmojiJudge().called("mine")


def test_a_judge_without_a_label_is_spelled_by_its_name():
    assert spelled(EmojiJudge()) == "emoji"
    assert spelled(EmojiJudgeB()).partition(":")[0] == "emoji-b"
    assert spelled(NudeNet()) == "nudenet"
    assert spelled(FakeJudge(name="mine")) == "mine:name=mine"
    assert all("property" not in spelled(one) for one in (EmojiJudge(), EmojiJudgeB()))
