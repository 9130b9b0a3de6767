"""CCE keeps what its specification says (arXiv:2308.01508), on every family."""

import pytest
import torch
from denoising import FAST, PROMPTS, Momentum, dented, pictures, search

from safelight.attack import cce
from safelight.attack.cce import CCE, TEMPLATES, Lesson
from safelight.attack.control import controlled
from safelight.attack.pictures import FAR
from safelight.errors import BadInput
from safelight.flow import Prompt
from safelight.guard.base import Guarded
from safelight.models.tiny import tiny
from safelight.prompts import PromptSet
from safelight.prompts.noise import noise_seed

GIVEN = {"cats": pictures(3, 1), "houses": pictures(2, 2)}
SHORT = dict(steps=2, batch=2, accumulation=1, count=2, pictures=GIVEN)


def lesson(model, n=2):
    with torch.no_grad():
        z = model.encode_images(pictures(n))
    return Lesson(z, ("<*> a cat",) * n, ("a cat",) * n)


def draw(model, target=None, attack=None, seed=0, v=None):
    attack = attack or CCE(**SHORT)
    hunt = search(target or model, seed=seed)
    start = {name: x[None] for name, x in attack.beginning(model).items()}
    return cce._Draw(attack, [lesson(model)], v or start, hunt)


def test_nothing_but_the_new_vectors_changes(tiny_model):
    before = {name: p.clone() for name, p in tiny_model.parameters().items()}
    rows = {e: len(t.get_input_embeddings().weight) for e, t in tiny_model.text_encoders.items()}
    attacked = CCE(**SHORT)(PROMPTS, tiny_model, sampling=FAST)
    after = tiny_model.parameters()
    assert all(torch.equal(after[name], p) for name, p in before.items())
    assert rows == {
        e: len(t.get_input_embeddings().weight) for e, t in tiny_model.text_encoders.items()
    }
    for prompt in attacked:
        assert set(prompt.soft) == set(tiny_model.text_encoders)  # one row per encoder
        assert {v.shape[0] for v in prompt.soft.values()} == {1}


def test_a_vector_is_learnt_per_category_and_stands_in_front_of_each_prompt(tiny_sd1):
    three = PromptSet.of(
        [{"prompt": text, "category": c} for text, c in
         (("a cat", "cats"), ("a house", "houses"), ("two cats", "cats"))], "three")  # fmt: skip
    one, two, three = CCE(**SHORT)(three, tiny_sd1, sampling=FAST)
    assert one.text == "<*> a cat" and three.text == "<*> two cats"
    assert torch.equal(one.soft["clip_l"], three.soft["clip_l"])
    assert not torch.equal(one.soft["clip_l"], two.soft["clip_l"])


def test_every_encoder_learns(tiny_model):
    attack = CCE(**SHORT)
    start = attack.beginning(tiny_model)
    for prompt in attack(PROMPTS, tiny_model, sampling=FAST):
        for name, v in prompt.soft.items():
            # AdamW's steps are as large as the learning rate where there is a gradient.
            assert (v - start[name]).abs().max() > 0.5 * attack.rate()


def test_what_was_learnt_reaches_the_picture(tiny_model):
    prompt = CCE(**SHORT)(PROMPTS, tiny_model, sampling=FAST).prompts[0]
    target = Guarded(tiny_model)
    bare = Prompt(id="x", text=PROMPTS.prompts[0].text)
    with_it, without = target.show([prompt, bare], [7, 7], **FAST)
    assert (with_it.image - without.image).abs().max() > 1e-4


def test_a_placeholder_that_is_there_already_is_an_error(tiny_sd1):
    taken = PromptSet.of(["a <*> cat"], "taken")
    with pytest.raises(BadInput, match="in use already"):
        CCE(**SHORT)(taken, tiny_sd1)


def test_the_loss_falls(tiny_sd1):
    attack = CCE(**SHORT | {"steps": 12})
    hunt = search(tiny_sd1)
    start = {name: x[None] for name, x in attack.beginning(tiny_sd1).items()}
    (learnt,) = attack.learn([lesson(tiny_sd1)], hunt)
    learnt = {name: x[None] for name, x in learnt.items()}

    def error(v):
        with torch.no_grad():
            return sum(draw(tiny_sd1, seed=100 + i, v=v).plain().mean().item() for i in range(4))

    assert error(learnt) < error(start)


def test_the_learning_rate_in_use_is_scaled_and_recorded(tiny_sd1):
    assert CCE().rate() == pytest.approx(0.08) and CCE().rate(guided=True) == pytest.approx(0.02)
    rows = []
    CCE(**SHORT)(PROMPTS, tiny_sd1, sampling=FAST, curve=rows)
    assert {row["lr"] for row in rows} == {5e-3 * 2} and len(rows) == 2


def test_learning_pictures_are_painted_undefended_at_seeds_that_are_never_judged(
    tiny_sd1, monkeypatch
):
    seen = []
    real = type(tiny_sd1).__call__

    def paint(self, prompts, *, seed, **settings):
        changed = any(p is not self.untouched(name) for name, p in self.parameters().items())
        seen.append((tuple(prompts), tuple(seed), changed))
        return real(self, prompts, seed=seed, **settings)

    monkeypatch.setattr(type(tiny_sd1), "__call__", paint)
    with tiny_sd1.patched(dented(tiny_sd1)):
        CCE(**SHORT | {"pictures": None, "count": 3})(PROMPTS, tiny_sd1, sampling=FAST)
    assert [texts for texts, _, _ in seen] == [(p.text,) * 3 for p in PROMPTS]
    judged = {noise_seed(prompt, i) for prompt in PROMPTS for i in range(1000)}
    for _, seeds, changed in seen:
        assert min(seeds) >= FAR and not judged & set(seeds) and not changed


def test_templates_are_learnt_from_and_attacked_prompts_are_none_of_them(tiny_sd1):
    attack = CCE(**SHORT | {"captions": "templates"}, concept="cat")
    hunt = search(tiny_sd1)
    found = attack.lesson("cats", list(PROMPTS), hunt)
    assert found.captions == tuple(t.format("<*>") for t in TEMPLATES)
    placed = attack.placed(PROMPTS.prompts[0])
    assert placed == "a red <*> in the park" and placed not in found.captions
    assert attack.placed(PROMPTS.prompts[1]) == "<*> a house and a boat"


def test_the_sequence_of_times_descends_inside_the_window(tiny_sd1):
    one = draw(tiny_sd1, attack=CCE(**SHORT, window=90, times=35))
    uppers = set()
    for _ in range(50):
        t = one.sequence()
        assert len(t) == 35 and (t[1:] < t[:-1]).all()
        assert t.max() - t.min() < 90 and t.min() >= 0 and t.max() < 1000
        uppers.add(t.max().item() // 100)
    assert len(uppers) > 5
    whole = draw(tiny_sd1, attack=CCE(**SHORT, window=1000, times=1000)).sequence()
    assert torch.equal(whole, torch.arange(999.0, -1, -1))  # all times of the training, once


def test_guards_that_edit_the_noise_begin_anew_with_every_sequence(tiny_sd1):
    guard = Momentum()
    attack = CCE(**SHORT, times=3)
    CCE.learn(attack, [lesson(tiny_sd1)], search(Guarded(tiny_sd1, [guard]), sampling={}))
    indices = [index for index, _ in guard.indices]
    times = [t for _, t in guard.indices]
    assert indices == [0, 1, 2] * 2
    assert guard.memories[0] == guard.memories[3] == 0 < guard.memories[1]
    assert times[0] > times[1] > times[2] and times[:3] != times[3:]
    assert guard.memory is None  # that of the pictures painted in between


def test_the_counter_of_the_authors_code_can_be_asked_for(tiny_sd1):
    guard = Momentum()
    attack = CCE(**SHORT | {"steps": 3}, times=3, counter="loader")
    attack.learn([lesson(tiny_sd1)], search(Guarded(tiny_sd1, [guard])))
    assert [index for index, _ in guard.indices] == [0, 0, 0, 0, 1, 1, 0, 2, 2]
    assert guard.memories[0] == guard.memories[3] == guard.memories[6] == 0 < guard.memories[4]


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_at_safety_scale_zero_the_guided_loss_is_the_ordinary_guided_one(tiny_sd1, scale):
    target = Guarded(tiny_sd1, [Momentum(scale)])
    attack = CCE(**SHORT, times=2)
    with torch.no_grad():
        here = draw(tiny_sd1, target, attack).guided(target.guards, 0)
        one = draw(tiny_sd1, target, attack)
        told, away = one.told, tiny_sd1.empty(len(one.z))
        words = tiny_sd1.encode(one.words)
        gaps = []
        for t in one.sequence():
            z_t, _ = tiny_sd1.noised(one.z, one.eps, t)
            e = tiny_sd1.predict(z_t, t, away)
            g = cce.guidance(one.search)
            mine = e + g * (tiny_sd1.predict(z_t, t, told) - e)
            theirs = e + g * (tiny_sd1.predict(z_t, t, words) - e)
            gaps.append((mine - theirs).square().mean((1, 2, 3)))
    same = torch.allclose(here, torch.stack(gaps).mean(0), atol=1e-6, rtol=1e-4)
    assert same is (scale == 0.0)


def test_the_undefended_model_is_the_ceiling_and_the_control_the_floor(tiny_sd1):
    """Both searches of the injection control aim at the same pictures with the same budget."""
    control = tiny("sd1", seed=9)
    seen = {}
    real = CCE.learn

    def learn(self, lessons, hunt):
        seen[id(hunt.model)] = [x.words for x in lessons], hunt.seeds, hunt.rng.initial_seed()
        return real(self, lessons, hunt)

    class Spied(CCE):
        pass

    Spied.learn = learn
    attack = Spied(**SHORT | {"pictures": None})
    with tiny_sd1.patched(dented(tiny_sd1)):
        found, taught = controlled(attack, PROMPTS, tiny_sd1, control, sampling=FAST, seed=3)
    assert seen[id(tiny_sd1)] == seen[id(control)]
    for a, b in zip(found, taught, strict=True):
        assert a.text == b.text and not torch.equal(a.soft["clip_l"], b.soft["clip_l"])
        assert a.meta["steps"] == b.meta["steps"] == "2"
    assert attack.undefended is None


def test_one_seed_decides_everything(tiny_sd1):
    first, same, other = (
        CCE(**SHORT)(PROMPTS, tiny_sd1, seed=s, sampling=FAST).prompts[0].soft["clip_l"]
        for s in (0, 0, 1)
    )
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_the_step_is_as_large_as_the_learning_rate_says(tiny_sd1):
    """AdamW's first step is the rate times the gradient's sign."""
    attack = CCE(**SHORT | {"steps": 1, "batch": 3, "accumulation": 2}, decay=0.0)
    start = attack.beginning(tiny_sd1)["clip_l"]
    for prompt in attack(PROMPTS, tiny_sd1, sampling=FAST):
        moved = (prompt.soft["clip_l"] - start).abs()
        torch.testing.assert_close(moved.median(), torch.tensor(5e-3 * 6), atol=1e-4, rtol=0)


def test_a_negative_prompt_stands_in_the_loss_as_in_the_paper(tiny_sd1):
    """| target - (e(negative) + g (e(caption) - e(negative))) |^2, written out."""
    m = tiny_sd1
    attack = CCE(**SHORT, negative="a knife")
    with torch.no_grad():
        one = draw(m, attack=attack)
        one.search.sampling = {"guidance": 4.0}
        found = one.plain()
        same = draw(m, attack=attack)  # the same pictures and noise; then the same times
        t = m.random_times(len(same.z), same.search.rng)
        said = m.encode(same.captions, soft=same.soft).states
        z_t = m.scheduler.add_noise(same.z, same.eps, t.long())
        e_c = m.denoiser(z_t, t, said).sample
        e_n = m.denoiser(z_t, t, m.encode(["a knife"] * 2).states).sample
        expected = (e_n + 4.0 * (e_c - e_n) - same.eps).square().mean((1, 2, 3))
        without = draw(m).plain()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - without).abs().max() > 1e-3


def test_a_negative_prompt_without_guidance_is_refused(tiny_sd1):
    with pytest.raises(BadInput, match="guidance above 1"):
        CCE(**SHORT, negative="a knife")(PROMPTS, tiny_sd1, sampling=FAST)


def test_a_sequence_reads_its_texts_once(tiny_sd1, monkeypatch):
    read = []
    real = type(tiny_sd1).encode
    monkeypatch.setattr(
        type(tiny_sd1), "encode", lambda self, *a, **k: read.append(a) or real(self, *a, **k)
    )
    target = Guarded(tiny_sd1, [Momentum()])
    one = draw(tiny_sd1, target, CCE(**SHORT, times=5))
    one.search.sampling = {}
    read.clear()
    one.guided(target.guards, 0)
    assert len(read) == 4  # captions and what they avoid, for the defended and the undefended
