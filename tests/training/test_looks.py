"""Texts are judged by what the untouched model paints for them."""

import dataclasses

import pytest
import torch

from safelight.flow import Verdict
from safelight.guard.sanitizer import Sanitizer
from safelight.models.patch import Patch
from safelight.prompts import PromptSet
from safelight.training.augment import neighbours, vocabulary
from safelight.training.data import TextData
from safelight.training.looks import paints_unsafe

PHRASES, BENIGN = ["sky"], ["a cat on a hill", "a red house"]


def rng():
    return torch.Generator().manual_seed(0)


def seen_by(model, texts, flag):
    """What a judge is shown for some texts, and what comes of its verdicts."""
    shown = []

    def judge(images, texts):
        shown.append(images)
        return [Verdict(flag(text), 0.5, "judge") for text in texts]

    return paints_unsafe(model, texts, judge, steps=2), torch.cat(shown)


def test_every_text_gets_the_judges_answer_in_its_place(tiny_sd1):
    answers = {"a cat": False, "a sword": True, "a fog": None}
    found, shown = seen_by(tiny_sd1, ["a cat", "a sword", "a fog"] * 15, answers.get)
    assert found == [False, True, None] * 15 and len(shown) == 45


def test_who_draws_a_progress_bar_is_told_of_every_batch(tiny_sd1):
    ticks = []

    def judge(images, texts):
        return [Verdict(True, 0.5, "judge") for _ in texts]

    paints_unsafe(tiny_sd1, ["a cat"] * 33, judge, looks=2, steps=2, watch=ticks.append)
    assert [(tick.step, tick.total) for tick in ticks] == [(32, 33), (33, 33)] * 2
    assert all(tick.doing and not tick.epoch for tick in ticks)


def test_what_is_unsafe_by_chance_is_not_taken_for_unsafe(tiny_sd1):
    """Flagged texts are painted again with other noise; one harmless picture makes them unclear."""
    seen = []

    def judge(images, texts):
        seen.extend(zip(texts, images, strict=True))
        times = [sum(text == one for text, _ in seen) for one in texts]
        safe_at = {"a cat": 1, "a rock": 2, "a sword": 9}
        return [Verdict(n < safe_at[text], 0.5, "judge")
                for text, n in zip(texts, times, strict=True)]  # fmt: skip

    texts = ["a sword", "a rock", "a cat"]  # the sword is always first: only looks tell its noises
    assert paints_unsafe(tiny_sd1, texts, judge, looks=3, steps=2) == [True, None, False]
    assert [text for text, _ in seen] == [*texts, "a sword", "a rock", "a sword"]
    swords = [image for text, image in seen if text == "a sword"]
    assert not torch.equal(swords[0], swords[1]) and not torch.equal(swords[1], swords[2])
    seen.clear()
    assert paints_unsafe(tiny_sd1, texts, judge, steps=2) == [True, True, False]  # control


@pytest.mark.parametrize("known", [{}, {"avx512_bf16": True}, {"amx_bf16": True}])
def test_pictures_are_painted_in_bfloat16_only_where_the_cpu_computes_in_it(
    tiny_sd1, monkeypatch, known
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    precise = []
    forward = tiny_sd1.denoiser.register_forward_hook(
        lambda *_: precise.append(not torch.is_autocast_enabled("cpu"))
    )
    _, shown = seen_by(tiny_sd1, ["a cat"], lambda text: False)
    forward.remove()
    assert set(precise) == {not known} and shown.dtype == torch.float32


def test_the_untouched_model_is_looked_at(tiny_sd1):
    weight = next(name for name in tiny_sd1.parameters() if name.startswith("denoiser"))
    patch = Patch(full={weight: torch.randn(tiny_sd1.parameters()[weight].shape)}, method="x",
                  family="sd1")  # fmt: skip
    _, plain = seen_by(tiny_sd1, ["a cat"], lambda text: False)
    with tiny_sd1.patched(patch):
        _, patched = seen_by(tiny_sd1, ["a cat"], lambda text: False)
    assert torch.equal(plain, patched)


def test_pictures_decide_about_doubtful_words_and_about_words_of_the_phrases(tiny_sd1):
    asked = []

    def look(words):
        asked.extend(words)
        return [(True, False, None)[i % 3] for i in range(len(words))]

    found = neighbours(tiny_sd1, "clip_l", PHRASES, BENIGN, (), rng(), look=look)
    flagged, kept, unclear = (set(asked[i::3]) for i in range(3))
    near = {word for words in found.near.values() for word in words}
    assert near == flagged and set(found.kept) == kept and set(found.between) == unclear
    assert "sky" in asked and not set(found.far) & set(asked)
    everything = {*near, *found.kept, *found.between, *found.far}
    assert everything <= set(vocabulary(tiny_sd1.tokenizers["clip_l"])) - {"cat", "house"}
    plain = neighbours(tiny_sd1, "clip_l", PHRASES, BENIGN, (), rng())
    assert not plain.kept and "sky" not in {*plain.far, *plain.between}  # control


def test_only_words_worth_a_picture_are_looked_at_and_the_rest_stays_open(tiny_sd1):
    def sorted_with(**doubt):
        asked = []

        def look(words):
            asked.extend(words)
            return [False] * len(words)

        found = neighbours(tiny_sd1, "clip_l", PHRASES, BENIGN, (), rng(), look=look, **doubt)
        return found, set(asked)

    _, wide = sorted_with()
    found, some = sorted_with(doubt=(0.3, 0.0))
    assert some and some < wide and not sorted_with(doubt=(1.1, 0.0))[1]
    assert set(found.kept) == some and set(found.between) == wide - some


def test_what_is_most_like_a_word_of_a_phrase_is_harmless_and_another_word(tiny_sd1):
    def look(words):
        return [i % 2 == 0 for i in range(len(words))]

    found = neighbours(tiny_sd1, "clip_l", PHRASES, BENIGN, (), rng(), look=look)
    parts = {word for phrase in PHRASES for word in phrase.split() if len(word) > 2}
    assert set(found.akin) == parts
    for part, words in found.akin.items():
        assert words and part not in words and set(words) <= {*found.far, *found.kept}


def test_a_sanitizer_holds_words_that_look_harmless_and_removes_those_that_do_not(
    tiny_sd1, monkeypatch
):
    asked = []

    def paints(model, words, judge, *, looks, watch):
        if watch is not None and words:
            watch("told")
        asked.extend(words)
        return [i % 2 == 0 for i in range(len(words))]

    monkeypatch.setattr("safelight.guard.sanitizer.paints_unsafe", paints)
    data = TextData(
        safe=PromptSet.of(BENIGN * 2, "safe"),
        unsafe=PromptSet.of(
            [
                {"prompt": f"a {c} sword", "safe_prompt": f"a {c} tulip", "category": "x"}
                for c in ("red", "old", "new", "big")
            ],
            "unsafe",
        ),
    )
    method = Sanitizer(witness="fake", nearby=4.0, scattered=0.0, led=0.0, scenes=0)
    ticks = []
    material = method.gather(tiny_sd1, data, seed=0, watch=ticks.append)
    assert ticks == ["told"]
    made = {one.phrase for one in material.pairs[: material.learnt]} - {"sword"}
    assert made and made <= {text[2:] for text in asked[::2]}
    said = {word for text in material.benign for word in text.split()}
    flagged, kept = ({text[2:] for text in asked[i::2]} for i in range(2))
    assert kept <= said and not flagged & said


def test_scenes_that_paint_something_unsafe_are_targets_and_the_others_are_held(
    tiny_sd1, monkeypatch
):
    looked = {}

    def paints(model, texts, judge, *, looks, watch):
        flags = [(True, False, None)[i % 3] for i in range(len(texts))]
        looked.update(zip(texts, flags, strict=True))
        return flags

    monkeypatch.setattr("safelight.guard.sanitizer.paints_unsafe", paints)
    pairs = [{"prompt": f"a {c} sword", "safe_prompt": f"a {c} tulip", "category": "x"}
             for c in ("red", "old", "new", "big")]  # fmt: skip
    safe = [f"{text} by {place}" for text in BENIGN for place in ("day", "night", "car", "train")]
    data = TextData(safe=PromptSet.of(safe, "safe"), unsafe=PromptSet.of(pairs, "unsafe"))
    method = Sanitizer(witness="fake", nearby=0.0, scattered=0.0, led=0.0, scenes=24, again=2)
    material = method.gather(tiny_sd1, data, seed=0)
    scenes = {text: flag for text, flag in looked.items() if len(text.split()) > 2}
    bad = [text for text, flag in scenes.items() if flag]
    learnt = [one for one in material.pairs[: material.learnt] if one.target in scenes]
    assert sorted(one.target for one in learnt) == sorted(2 * bad)
    assert all(one.anchor in safe for one in learnt)
    assert {text for text, flag in scenes.items() if flag is False} <= set(material.benign)
    assert not {text for text, flag in scenes.items() if flag is not False} & set(material.benign)


def test_a_look_takes_a_fifth_of_the_models_steps_and_never_fewer_than_four(tiny_sd1, monkeypatch):
    taken = []

    def sample(model, condition, *, seed, steps):
        taken.append(steps)
        return torch.zeros(len(seed), *model.latent_shape(model.default_size))

    monkeypatch.setattr(type(tiny_sd1), "sample", sample)
    for usual in (50, 8):
        own = dataclasses.replace(tiny_sd1.sampling, steps=usual)
        monkeypatch.setattr(tiny_sd1, "sampling", own)
        paints_unsafe(tiny_sd1, ["a cat"], lambda images, texts: [Verdict(False, 0.0, "judge")])
    assert taken == [10, 4]


def test_made_up_texts_that_would_be_cut_off_are_left_out(tiny_sd1, monkeypatch, caplog):
    def paints(model, texts, judge, *, looks, watch):
        return [i % 3 == 0 for i in range(len(texts))]

    def tokens(texts):
        return [len(ids) for ids in tiny_sd1.tokenizers["clip_l"](list(texts)).input_ids]

    said = "a nice red {} on a hill"
    safe = [said.format(word) for word in ("cat", "dog", "fox", "hen")]
    unsafe = [said.format(word) for word in ("sword", "knife", "gun", "bomb")]
    room = max(tokens([*safe, *unsafe])) + 4
    monkeypatch.setattr("safelight.guard.sanitizer.paints_unsafe", paints)
    monkeypatch.setitem(tiny_sd1.tokens, "clip_l", room)
    rows = [{"prompt": text, "safe_prompt": safe[0], "category": "x"} for text in unsafe]
    data = TextData(safe=PromptSet.of(safe, "safe"), unsafe=PromptSet.of(rows, "unsafe"))
    method = Sanitizer(witness="fake", led=8.0, scattered=0.0, nearby=0.0, scenes=80)
    material = method.gather(tiny_sd1, data, seed=0)
    pairs = [text for one in material.pairs for text in (one.target, one.anchor)]
    assert room - 4 < max(tokens(pairs)) <= room and max(tokens(material.benign)) <= room
    assert material.learnt > 4 and "cut off" not in caplog.text


def test_a_sanitizer_looks_at_few_words_and_at_phrases_with_a_word_like_theirs(
    tiny_sd1, monkeypatch
):
    asked = []

    def paints(model, texts, judge, *, looks, watch):
        asked.append(list(texts))
        return [False] * len(texts)

    monkeypatch.setattr("safelight.guard.sanitizer.paints_unsafe", paints)
    rows = [
        {"prompt": f"a {c} sky knife", "safe_prompt": f"a {c} tulip", "category": "x"}
        for c in ("red", "old", "new", "big")
    ]
    data = TextData(safe=PromptSet.of(BENIGN * 2, "safe"), unsafe=PromptSet.of(rows, "unsafe"))
    method = Sanitizer(witness="fake", scattered=0.0, led=0.0, scenes=40)
    plain = method.gather(tiny_sd1, data, seed=0)
    words, scenes = asked
    wide = neighbours(
        tiny_sd1, "clip_l", ["sky knife"], [*BENIGN, *(f"a {r} tulip" for r in ("red", "old"))], (),
        rng(), look=lambda texts: [False] * len(texts),
    )  # fmt: skip
    assert 0 < len(words) < len(wide.kept)
    alike = [text for text in scenes if text.endswith(" knife") or " sky " in text]
    assert len(alike) >= 10 and "a red sky knife" not in alike
    rough = dataclasses.replace(method, autocast=True).gather(tiny_sd1, data, seed=0)
    one, other = (next(iter(m.tau(["a red sky knife"]).values())).states for m in (plain, rough))
    assert not torch.equal(one, other)
    torch.testing.assert_close(one, other, rtol=0.1, atol=0.1)
