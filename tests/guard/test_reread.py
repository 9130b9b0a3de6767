"""Words that score high are read no more: the sanitizer's `reread`, and how it knows its words."""

import dataclasses

import pytest
import torch
from filters import rows_of, soft

from safelight.attack.tokens import frame, spelled, told, vocabulary
from safelight.errors import BadInput
from safelight.flow import Card, Prompt, Written
from safelight.guard.base import Guard, Guarded
from safelight.guard.sanitizer import Sanitizer
from safelight.guard.wording import Found, Rereading, wished
from safelight.prompts import PromptSet
from safelight.training.data import TextData

BAD = "bomb"
TEXTS = ["a dog on the street", "the big bomb in the park"]
DATA = TextData(
    safe=PromptSet.of(["a dog", "a cat in the park", "a big car"], "safe"),
    unsafe=PromptSet.of(
        [{"prompt": f"a {BAD} {x}", "safe_prompt": f"a fish {x}"} for x in ("here", "there")], "u"
    ),
)
FAST = dict(epochs=1, nearby=0.0, scattered=0.0, led=0.0, variants=0.0)


class Finder(Sanitizer):
    """A sanitizer that rewrites nothing and finds one word wherever it is read."""

    def _strong(self, condition):
        found = {}
        for i in range(len(condition)):
            row = condition.written.rows([i])
            places = {name: self.places(row, name) for name in condition.encoders}
            if any(places.values()):
                found[i] = Found(places, sure=self.strict < 1)
        return found

    def places(self, row, encoder):
        wanted = rows_of(self.model_, encoder, BAD)[-1]
        ids, mask = self.model_.tokenize(encoder, row.texts)
        seen = self.model_.token_table(encoder).weight[ids[0, : int(mask.sum())]]
        at = self.starts_[encoder]
        if row.soft[0]:  # a lone placeholder
            own = row.soft[0][encoder]
            seen = torch.cat([own.new_zeros(at, own.shape[1]), own])
        front = len((row.front[0] or {}).get(encoder, ()))
        same = (seen - wanted).abs().amax(1) < 1e-6
        return [place + front for place in same.nonzero().flatten().tolist()]


def finder(model, subjects=(), said=(), **settings):
    fitted = Sanitizer(**FAST).fit(model, DATA).fitted_
    info = {"subjects": list(subjects), "said": list(said)}
    fitted = dataclasses.replace(fitted, info={**fitted.info, **info})
    return Finder(**FAST | {"reread": True} | settings)._with(fitted)


def states(model, texts):
    return model.encode(texts).states


def test_a_harmful_word_is_read_no_more_and_other_prompts_keep_every_bit(tiny_model):
    guard = finder(tiny_model)
    guarded = Guarded(tiny_model, [guard])
    seen = guard._read_again(tiny_model.encode(TEXTS))
    assert seen.written.texts == ("a dog on the street", "the big in the park")
    torch.testing.assert_close(seen.states[1:], states(tiny_model, ["the big in the park"]))
    assert torch.equal(seen.states[0], tiny_model.encode(TEXTS).states[0])
    assert guarded.condition(TEXTS).prompts == tuple(TEXTS)  # what was asked for is not forgotten
    left = Guarded(tiny_model, [finder(tiny_model, reread=False)]).condition(TEXTS).states
    assert not torch.allclose(left[1:], seen.states[1:])  # the control


def test_words_can_stand_in_place_of_a_run_of_harmful_ones(tiny_model):
    guard = finder(tiny_model, instead="red car")
    guard.prepare(tiny_model)
    seen = guard._read_again(tiny_model.encode(["bomb bomb in the park bomb", "bomb"]))
    assert seen.written.texts == ("red car in the park red car", "red car")


def test_words_stand_in_only_where_no_subject_is_left(tiny_model):
    guard = finder(tiny_model, ["cat"], instead="red car")
    guard.prepare(tiny_model)
    seen = guard._read_again(
        tiny_model.encode(["a bomb with a Cat, big", "a bomb with a big bomb"])
    )
    assert seen.written.texts == ("a with a Cat, big", "a red car with a big red car")


def test_what_benign_prompts_speak_of_is_learnt_with_the_rest(tiny_sd1):
    sizes = ("big", "small", "red", "old", "new")
    safe = PromptSet.of([f"a {size} cat" for size in sizes], "safe")
    bombs = [{"prompt": f"a {size} {BAD}", "safe_prompt": f"a {size} fish"} for size in sizes]
    guard = Sanitizer(**FAST).fit(tiny_sd1, TextData(safe=safe, unsafe=PromptSet.of(bombs, "u")))
    guard.prepare(tiny_sd1)
    assert guard.subjects_ == {"cat"}
    learnt = {"a", "cat", "fish", *sizes}
    assert guard.said_ <= learnt and {"a", "cat", "fish"} <= guard.said_  # some are held out


@pytest.mark.parametrize("strict, sure", [(0.0, True), (0.5, True), (0.95, False), (1.0, False)])
def test_a_score_above_strict_is_sure(tiny_sd1, strict, sure):
    guard = Sanitizer(**FAST, strict=strict, alpha=2.0).fit(tiny_sd1, DATA)
    guard.prepare(tiny_sd1)

    def seen(piece, E, mask):
        s = torch.zeros(E.shape[:2])
        s[1, 3] = 0.9
        return s, E

    guard.__dict__["_seen"] = seen
    found = guard._strong(tiny_sd1.encode(TEXTS))
    assert {i: (one.places, one.sure) for i, one in found.items()} == {1: ({"clip_l": [3]}, sure)}


def test_strictly_only_words_of_benign_prompts_stay_where_one_was_taken_out(tiny_model):
    """A prompt without a harmful word keeps all of its words."""
    texts = ["my dog, a bomb In the zebra park", "my zebra in the park"]
    guard = finder(tiny_model, said=["a", "in", "the", "park", "dog"], strict=0.9)
    guard.prepare(tiny_model)
    seen = guard._read_again(tiny_model.encode(texts))
    assert seen.written.texts == ("dog, a In the park", texts[1])
    lax = finder(tiny_model)
    lax.prepare(tiny_model)
    seen = lax._read_again(tiny_model.encode(texts[:1]))
    assert seen.written.texts == ("my dog, a In the zebra park",)  # the control


def test_nothing_but_harmful_words_is_the_empty_prompt(tiny_model):
    guard = finder(tiny_model)
    guard.prepare(tiny_model)
    seen = guard._read_again(tiny_model.encode(["bomb bomb"]))
    torch.testing.assert_close(seen.states, states(tiny_model, [""]))


def test_what_is_found_only_once_its_neighbours_are_gone_goes_too(tiny_sd1):
    guard = finder(tiny_sd1)
    guard.prepare(tiny_sd1)
    first = guard.places
    guard.__dict__["places"] = lambda row, encoder: (
        first(row, encoder) or ([2] if row.texts[0] == "the big in the park" else [])
    )
    assert guard._read_again(tiny_sd1.encode([TEXTS[1]])).written.texts == ("the in the park",)


@pytest.mark.parametrize("instead", ["", "car"])
def test_gradients_reach_the_words_that_stay(tiny_model, instead):
    guarded = Guarded(tiny_model, [finder(tiny_model, instead=instead)])
    words = vocabulary(tiny_model)
    one = frame(words, "cat in the park", [0, 0])
    picks = torch.tensor([words.words.index(w) for w in (BAD, "big")])
    free = words.table(tiny_model)[picks].clone().requires_grad_()
    text = one.text(spelled(words, picks))
    seen = told(tiny_model, words, [one.rows(tiny_model, words, free)], [text])
    edited = guarded.edited(seen)
    with torch.no_grad():
        painted = guarded.condition([text])
    torch.testing.assert_close(edited.states, painted.states, atol=1e-5, rtol=1e-4)
    edited.states.square().sum().backward()
    assert (free.grad.abs().sum(1) > 0).tolist() == [False, True]


def test_learnt_embeddings_and_those_in_front_are_counted(tiny_sd1):
    guard = finder(tiny_sd1)
    guard.prepare(tiny_sd1)
    hidden = Prompt(id="0", text="<*>", soft=soft(tiny_sd1, BAD))
    seen = guard._read_again(tiny_sd1.encode([hidden.text], soft=[hidden.soft]))
    assert seen.written.texts == ("",)
    front = soft(tiny_sd1, "red car")
    seen = guard._read_again(tiny_sd1.encode([TEXTS[1]], front=[front]))
    assert seen.written.texts == ("the big in the park",) and seen.written.front[0] is front


def test_a_words_tokens_are_counted_with_its_learnt_ones(tiny_sd1):
    two = {"clip_l": rows_of(tiny_sd1, "clip_l", "big bomb")}
    wish = wished(tiny_sd1, Written(("a <*> park",), (two,), (None,), (None,)), "a park")
    assert wish.tokens(tiny_sd1, "clip_l")[1] == 2
    assert wish.order({0, 1}, "x") == [None, 2] and wish.order({0, 1}) == [2]


def test_a_sanitizer_that_does_not_know_what_benign_prompts_say_cannot_be_strict(tiny_sd1):
    with pytest.raises(BadInput, match="train it again"):
        finder(tiny_sd1, strict=0.9).prepare(tiny_sd1)
    finder(tiny_sd1, strict=1.0).prepare(tiny_sd1)


def test_learnt_embeddings_are_no_strange_words(tiny_sd1):
    row = Written(("a <*> , zebra",), (soft(tiny_sd1, "red car"),), (None,), (None,))
    again = Rereading(tiny_sd1, {}, known=frozenset({"a"}))
    assert again._strange(wished(tiny_sd1, row, "")) == {3}


def test_it_must_come_before_guards_that_edit_the_states(tiny_sd1):
    class Doubled(Guard):
        card = Card(title="doubled", source="tests")

        def edit_condition(self, condition):
            return dataclasses.replace(condition, states=2 * condition.states)

    guard = finder(tiny_sd1)
    Guarded(tiny_sd1, [guard, Doubled()]).condition(TEXTS)
    with pytest.raises(BadInput, match="name it before"):
        Guarded(tiny_sd1, [Doubled(), guard]).condition(TEXTS)


def test_alpha_0_reads_nothing_again(tiny_model):
    plain = tiny_model.encode(TEXTS).states
    assert torch.equal(
        Guarded(tiny_model, [finder(tiny_model, alpha=0.0)]).condition(TEXTS).states, plain
    )
