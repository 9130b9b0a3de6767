"""A judge answers for every picture, or fails loudly; it never breaks into "safe"."""

from dataclasses import dataclass

import pytest
import torch

from safelight.errors import GuardFailed, NotFound, Unsupported
from safelight.flow import Card
from safelight.judge.base import Judge, Look
from safelight.judge.fake import FakeJudge

RED = torch.tensor([0.9, 0.1, 0.1]).view(3, 1, 1).expand(3, 8, 8)
GREY = torch.full((3, 8, 8), 0.4)
PAIR = torch.stack([RED, GREY])


@dataclass(kw_only=True)
class Scripted(Judge):
    """Answers what it is told to."""

    card = Card(title="scripted", source="tests")
    name = "scripted"
    labels = ("object:bomb", "object:cat")
    groups = {"weapons": ("object:bomb",)}

    answer: object

    def score(self, images, prompts):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def see(self, images, prompts):
        return self.answer if isinstance(self.answer, Look) else super().see(images, prompts)


def test_a_picture_is_flagged_by_an_unsafe_label_and_by_no_other():
    answer = torch.tensor([[0.7, 0.1], [0.1, 0.9]])
    first, second = Scripted(answer=answer)(PAIR, ["x", "y"])
    assert (first.flagged, first.score, first.by) == (True, 0.7, "scripted")
    assert (second.flagged, second.score) == (False, 0.1)
    assert second.scores == {"object:bomb": 0.1, "object:cat": 0.9}


def test_the_stored_score_decides_as_the_live_one_did():
    barely = Scripted(answer=torch.tensor([[0.499_96, 0.0], [0.499_94, 0.0]]))(PAIR, ["x", "y"])
    assert [v.flagged for v in barely] == [v.score >= 0.5 for v in barely] == [True, False]


@pytest.mark.parametrize(
    "answer, words",
    [
        (torch.tensor([[float("nan"), 0.0], [0.0, 0.0]]), "not a number"),
        (torch.tensor([[float("inf"), 0.0], [0.0, 0.0]]), "not a number"),
        (torch.zeros(1, 2), "shape"),
        (torch.zeros(2, 3), "shape"),
        (torch.zeros(0, 2), "shape"),
        (RuntimeError("out of memory"), "out of memory"),
        (KeyError("weights"), "KeyError"),
        (Look(torch.zeros(2, 2), unsure=torch.zeros(1, dtype=torch.bool)), "unsure"),
        (Look(torch.zeros(2, 2), features=torch.zeros(3, 4)), "features"),
    ],
)
def test_a_broken_judge_is_an_error_and_never_safe(answer, words):
    with pytest.raises(GuardFailed, match=words):
        Scripted(answer=answer)(PAIR, ["x", "y"])


def test_a_judge_without_its_weights_says_what_to_do():
    with pytest.raises(NotFound, match="reinstall"):
        Scripted(answer=NotFound("no weights; reinstall"))(PAIR, ["x", "y"])


def test_a_judge_is_not_asked_about_pictures_that_are_not_pictures():
    with pytest.raises(GuardFailed, match="NaN"):
        FakeJudge()(torch.full((1, 3, 8, 8), float("nan")), ["x"])
    with pytest.raises(GuardFailed, match="2 pictures"):
        FakeJudge()(PAIR, ["x"])


def test_a_judge_that_cannot_tell_says_none():
    unsure = Look(torch.zeros(2, 2), unsure=torch.tensor([True, False]))
    first, second = Scripted(answer=unsure)(PAIR, ["x", "y"])
    assert first.flagged is None and second.flagged is False


def test_the_fake_judge_sees_red():
    red, grey = FakeJudge()(PAIR, ["x", "y"])
    assert (red.flagged, grey.flagged) == (True, False)


def test_equal_pictures_are_at_distance_zero_and_others_are_not():
    judge = FakeJudge()
    assert judge.perceptual(PAIR, PAIR).tolist() == [0.0, 0.0]
    assert (judge.perceptual(PAIR, PAIR.flip(0)) > 0.01).all()
    assert judge.features(PAIR).shape == (2, 12)


def test_a_judge_without_features_says_so():
    with pytest.raises(Unsupported, match="no feature"):
        Scripted(answer=torch.zeros(2, 2)).features(PAIR)
    with pytest.raises(Unsupported, match="no feature"):
        Scripted(answer=torch.zeros(2, 2)).perceptual(PAIR, PAIR)


def test_a_judge_that_implements_nothing_is_a_failed_judge():
    @dataclass(kw_only=True)
    class Empty(Judge):
        labels = ("object:bomb",)
        groups = {"weapons": labels}
        name: str = "empty"

    with pytest.raises(GuardFailed, match="RecursionError"):
        Empty()(PAIR, ["x", "y"])
