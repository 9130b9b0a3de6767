"""Guards act in order, refuse politely, and fail closed: if one breaks there is no picture."""

import dataclasses

import pytest
import torch

from safelight import names
from safelight.errors import BadInput, GuardFailed, Unsupported
from safelight.flow import Card, Prompt, Verdict
from safelight.guard import TABLE
from safelight.guard.base import Guard, Guarded
from safelight.guard.screen import Screen
from safelight.judge.fake import FakeJudge

PROMPTS = ["a cat", "a bomb", "a dog"]


class Scripted(Guard):
    """Does what its functions say."""

    card = Card(title="scripted", source="tests")

    def __init__(self, **acts):
        for name, act in acts.items():
            setattr(self, name, act)


def forbid(word):
    def screen(prompts):
        return [Verdict(word in prompt, 1.0, "words", word) for prompt in prompts]

    return Scripted(screen_prompts=screen)


def opinion(flagged, score=0.5):
    def screen(images, prompts):
        return [Verdict(flagged, score, "scripted")] * len(prompts)

    return Scripted(screen_images=screen)


@pytest.mark.parametrize("name", TABLE)
def test_every_guard_has_a_complete_card(name):
    guard = names.find("guard", name)
    assert guard.card.title and guard.card.source and guard.card.families


def test_without_guards_the_pictures_are_the_models_own(tiny_model):
    bare = tiny_model(PROMPTS, seed=3, steps=2)
    guarded = Guarded(tiny_model)(PROMPTS, seed=3, steps=2)
    for a, b in zip(bare, guarded, strict=True):
        assert (a.prompt, a.seed, a.verdicts) == (b.prompt, b.seed, b.verdicts)
        torch.testing.assert_close(a.image, b.image, atol=0, rtol=0)


def test_a_refused_prompt_costs_nothing_and_the_others_are_painted(tiny_sd1):
    bare = tiny_sd1(PROMPTS, seed=3, steps=2)
    first, second, third = Guarded(tiny_sd1, [forbid("bomb")])(PROMPTS, seed=3, steps=2)
    assert second.refused and second.verdicts[0].why == "bomb"
    for outcome, untouched in ((first, bare[0]), (third, bare[2])):
        assert not outcome.refused and outcome.verdicts[0].flagged is False
        torch.testing.assert_close(outcome.image, untouched.image, atol=1e-5, rtol=0)


def test_when_all_prompts_are_refused_nothing_is_painted(tiny_sd1):
    def never(*args):
        raise AssertionError("painted")

    guards = [forbid("a"), Scripted(edit_condition=never)]
    assert all(o.refused for o in Guarded(tiny_sd1, guards)(PROMPTS, steps=1))


@pytest.mark.parametrize("flagged, refused", [(True, True), (None, True), (False, False)])
def test_a_picture_that_is_flagged_or_cannot_be_judged_is_held_back(tiny_sd1, flagged, refused):
    outcome = Guarded(tiny_sd1, [opinion(flagged)])(["a cat"], steps=1)[0]
    assert outcome.refused is refused and outcome.verdicts[0].flagged is flagged


def test_screen_turns_a_judge_into_a_guard(tiny_sd1):
    harsh = Guarded(tiny_sd1, [Screen(FakeJudge(threshold=0.0))])(["a cat"], steps=1)[0]
    kind = Guarded(tiny_sd1, [Screen(FakeJudge(threshold=1.0))])(["a cat"], steps=1)[0]
    assert harsh.refused and not kind.refused
    assert harsh.verdicts[0].by == "screen/fake"


def broken(*args):
    raise RuntimeError("no such layer")


@pytest.mark.parametrize(
    "guard, words",
    [
        (Scripted(screen_prompts=broken), "no such layer"),
        (Scripted(edit_condition=broken), "no such layer"),
        (Scripted(screen_images=broken), "no such layer"),
        (Scripted(screen_prompts=lambda prompts: [Verdict(False, 0.0, "x")]), "1 verdicts for 3"),
        (opinion(False, float("nan")), "not a number"),
        (
            Scripted(edit_condition=lambda c: dataclasses.replace(c, states=c.states * torch.nan)),
            "NaN",
        ),
        (Scripted(edit_condition=lambda c: dataclasses.replace(c, states=c.states[:1])), "shape"),
        (Screen(broken), "no such layer"),
    ],
)
def test_whatever_breaks_in_a_guard_gives_no_pictures(tiny_sd1, guard, words):
    with pytest.raises(GuardFailed, match=words):
        Guarded(tiny_sd1, [guard])(PROMPTS, steps=1)


def test_a_guard_that_breaks_on_the_noise_gives_no_pictures(tiny_sd1):
    class Noisy(Guard):
        card = Card(title="noisy", source="tests")

        def edit_noise(self, noise, step):
            return noise * torch.nan

    with pytest.raises(GuardFailed, match="NaN"):
        Guarded(tiny_sd1, [Noisy()])(["a cat"], steps=1)


def test_guards_edit_in_order(tiny_sd1):
    seen = []

    def note(name):
        def edit(condition):
            seen.append(name)
            return condition

        return Scripted(edit_condition=edit)

    Guarded(tiny_sd1, [note("first"), note("second")])(["a cat"], steps=1)
    assert seen == ["first", "second"]


def test_a_guard_for_another_family_is_refused(tiny_sd1):
    guard = Scripted()
    guard.card = Card(title="other", source="tests", families=("flux",))
    with pytest.raises(Unsupported, match="supports flux; this model is sd1"):
        Guarded(tiny_sd1, [guard])


def test_seeds_must_fit_the_prompts(tiny_sd1):
    with pytest.raises(BadInput, match="3 prompts but 2 seeds"):
        Guarded(tiny_sd1)(PROMPTS, seed=[1, 2], steps=1)


def test_a_guard_that_edits_the_states_makes_them_unwritten(tiny_sd1):
    def double(condition):
        return dataclasses.replace(condition, states=2 * condition.states)

    assert Guarded(tiny_sd1, [Scripted()]).condition(["a cat"]).written.texts == ("a cat",)
    assert Guarded(tiny_sd1, [Scripted(edit_condition=double)]).condition(["a cat"]).written is None


def test_a_guard_may_look_below_the_words(tiny_sd1):
    seen = []

    class Deep(Guard):
        card = Card(title="deep", source="tests")

        def screen_learnt(self, prompts, soft):
            seen.extend(zip(prompts, soft, strict=True))
            return [Verdict(bool(one), 1.0, "deep") for one in soft]

    v = {"clip_l": torch.ones(1, 32)}
    prompts = [Prompt(id="0", text="a <*>", soft=v), Prompt(id="1", text="a cat")]
    first, second = Guarded(tiny_sd1, [Deep()]).show(prompts, [0, 1], steps=1)
    assert first.refused and not second.refused and seen == [("a <*>", v), ("a cat", None)]
    # The control: a guard for words alone is given what words there are.
    assert not any(o.refused for o in Guarded(tiny_sd1, [forbid("<*>")]).show(prompts, [0, 1]))
