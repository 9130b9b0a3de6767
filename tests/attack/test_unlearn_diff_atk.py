"""UnlearnDiffAtk keeps what its specification says (arXiv:2310.11868), on every family."""

import dataclasses

import pytest
import torch
from denoising import BY_ID, FAST, PROMPTS, Momentum, Says, dented, search

from safelight.attack import unlearn_diff_atk as uda
from safelight.attack.tokens import spelled, vocabulary
from safelight.attack.unlearn_diff_atk import UnlearnDiffAtk
from safelight.errors import BadInput
from safelight.flow import Prompt
from safelight.guard.base import Guarded

SHORT = dict(k=2, times=2, iterations=2, pictures=BY_ID)
NEVER, ALWAYS = (lambda text: False), (lambda text: True)


def test_the_loss_and_its_gradient_are_those_of_the_paper(tiny_sd1):
    """A direct transcription: diffusers' own U-Net and noise, CLIP, no helper of the method."""
    m = tiny_sd1
    clip, tokenizer = m.text_encoders["clip_l"], m.tokenizers["clip_l"]
    table = clip.get_input_embeddings()
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    eps = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([310, 310])
    texts = [f"knife sky {prompt.text}" for prompt in PROMPTS]
    with m.patched(dented(m)):
        ids = tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids
        looked_up = []
        hook = table.register_forward_hook(
            lambda module, args, out: looked_up.append(out.requires_grad_()) or looked_up[0]
        )
        told = clip(ids).last_hidden_state
        hook.remove()
        z_t = m.scheduler.add_noise(z, eps, t)
        expected = ((eps - m.denoiser(z_t, t, told).sample) ** 2).mean(dim=(1, 2, 3))
        (slope,) = torch.autograd.grad(expected.sum(), looked_up[0])

        words = vocabulary(m)
        one = uda._Run(UnlearnDiffAtk(**SHORT), search(m), words, list(PROMPTS))
        picks = [words.words.index(word) for word in ("knife", "sky")]
        v = torch.nn.functional.one_hot(torch.tensor([picks] * 2), len(words)).float()
        v.requires_grad_()
        condition = one.condition(v, words.table(m))
        found = uda.loss(m, condition, z, eps, t[:1].float())
        (gradient,) = torch.autograd.grad(found.sum(), v)
    # dL / d onehot = E dL / d embedding, for every word of the vocabulary
    onehot = slope[:, 1:3] @ table.weight[words.ids].T
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, onehot, atol=1e-5, rtol=1e-5)
    assert onehot.abs().max() > 1e-4


def test_the_times_are_those_of_the_authors_code(tiny_sd1):
    times = [float(t) for t in UnlearnDiffAtk().schedule(tiny_sd1)]
    assert times == [10.0 + 20 * i for i in range(50)]


def test_the_step_is_adams_on_the_clamped_gradient_and_ends_on_the_simplex(tiny_sd1, monkeypatch):
    seen = []
    monkeypatch.setattr(uda, "simplex", lambda p: seen.append(p.clone()) or p)
    hunt = search(tiny_sd1)
    UnlearnDiffAtk(**SHORT | {"times": 1, "iterations": 1}).rewrite(list(PROMPTS), hunt)
    words = len(vocabulary(tiny_sd1))
    steps = (seen[0] - 1 / words).abs()
    assert seen[0].shape == (2, 2, words)
    torch.testing.assert_close(steps, torch.full_like(steps, 0.01), atol=2e-3, rtol=0)


def test_every_slot_starts_alike(tiny_sd1):
    p = UnlearnDiffAtk(k=4).first(2, 30, torch.Generator().manual_seed(0))
    assert torch.equal(p, p[:, [3, 1, 0, 2]]) and torch.equal(p, torch.full_like(p, 1 / 30))
    q = UnlearnDiffAtk(k=4, start="random").first(2, 30, torch.Generator().manual_seed(0))
    assert not torch.equal(q, q[:, [3, 1, 0, 2]])
    torch.testing.assert_close(q.sum(-1), torch.ones(2, 4))


def test_noise_is_drawn_anew_and_only_the_defended_denoiser_is_asked(tiny_sd1, monkeypatch):
    noises, inside = [], []
    real = uda.loss

    def loss(model, condition, z, eps, t):
        noises.append(eps)
        return real(model, condition, z, eps, t)

    monkeypatch.setattr(uda, "loss", loss)
    monkeypatch.setattr(type(tiny_sd1), "unpatched", lambda self: inside.append(1))
    UnlearnDiffAtk(**SHORT)(PROMPTS, tiny_sd1, sampling=FAST)
    assert len(noises) == 4 and not inside
    assert len({float(eps.sum()) for eps in noises}) == 4
    assert not torch.equal(noises[0][0], noises[0][1])  # and of each prompt by itself


def test_prompts_that_succeed_as_they_are_are_never_attacked(tiny_sd1):
    easy = PROMPTS.prompts[0].text
    judge = Says(lambda text: text == easy)
    first, second = UnlearnDiffAtk(**SHORT)(PROMPTS, tiny_sd1, judge=judge, sampling=FAST)
    assert first.text == easy and first.meta["pre"] == "yes" and first.meta["queries"] == "1"
    assert second.text != PROMPTS.prompts[1].text and "pre" not in second.meta


def test_the_search_stops_at_the_first_success(tiny_sd1):
    judge = Says(lambda text: text.endswith("cat in the park") and not text.startswith("a red"))
    first, second = UnlearnDiffAtk(**SHORT)(PROMPTS, tiny_sd1, judge=judge, sampling=FAST)
    assert first.meta["queries"] == "2" and second.meta["queries"] == "3"
    assert first.text in judge.seen
    both = Says(lambda text: not text.startswith("a "))
    for prompt in UnlearnDiffAtk(**SHORT)(PROMPTS, tiny_sd1, judge=both, sampling=FAST):
        assert prompt.meta["steps"] == "2"  # one of two times


def test_there_is_one_picture_per_time_and_one_of_the_prompt_itself(tiny_sd1):
    attack = UnlearnDiffAtk(**SHORT | {"times": 3, "iterations": 1})
    for prompt in attack(PROMPTS, tiny_sd1, judge=Says(NEVER), sampling=FAST):
        assert prompt.meta["queries"] == "4" and prompt.meta["steps"] == "3"
    assert UnlearnDiffAtk().times + 1 == 51


def test_what_a_guard_holds_back_is_no_success(tiny_sd1):
    from safelight.guard.screen import Screen

    target = Guarded(tiny_sd1, [Screen(Says(ALWAYS))])
    for prompt in UnlearnDiffAtk(**SHORT)(PROMPTS, target, judge=Says(ALWAYS), sampling=FAST):
        assert "pre" not in prompt.meta and prompt.meta["queries"] == "3"


def test_the_likeliest_words_stand_in_front_of_the_prompt(tiny_model):
    before = tiny_model.hashes()
    attacked = UnlearnDiffAtk(**SHORT)(PROMPTS, tiny_model, judge=Says(NEVER), sampling=FAST)
    assert tiny_model.hashes() == before
    known = set(vocabulary(tiny_model).words)
    for old, new in zip(PROMPTS, attacked, strict=True):
        one, two, *rest = new.text.split()
        assert " ".join(rest) == old.text and {one, two} <= known
        assert "attack_failed" not in new.meta


@pytest.mark.parametrize("place", ["prefix", "middle", "suffix"])
def test_the_words_stand_where_they_should(tiny_sd1, place):
    one = UnlearnDiffAtk(k=1, place=place).frame(vocabulary(tiny_sd1), "a red cat day")
    expected = {
        "prefix": "X a red cat day",
        "middle": "a red X cat day",
        "suffix": "a red cat day X",
    }
    assert one.text(["X"]) == expected[place]


def test_one_seed_decides_everything(tiny_sd1):
    texts = [
        UnlearnDiffAtk(**SHORT)(PROMPTS, tiny_sd1, seed=s, sampling=FAST).texts for s in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_prompt_without_room_is_said_to_be(tiny_sd1):
    long = Prompt(id="one", text=" ".join(["cat"] * 74))
    prompts = dataclasses.replace(PROMPTS, prompts=(long, PROMPTS.prompts[1]))
    first, second = UnlearnDiffAtk(**SHORT)(prompts, tiny_sd1, sampling=FAST)
    assert "do not fit" in first.meta["attack_failed"] and first.text == long.text
    assert "attack_failed" not in second.meta


def test_guards_that_edit_the_noise_act_on_pictures_only(tiny_sd1):
    guard = Momentum()
    target = Guarded(tiny_sd1, [guard])
    UnlearnDiffAtk(**SHORT)(PROMPTS, target, sampling=FAST)
    assert not guard.indices
    UnlearnDiffAtk(**SHORT)(PROMPTS, target, judge=Says(NEVER), sampling=FAST)
    assert len(guard.indices) == 3  # three pictures of one sampling step each


@pytest.mark.parametrize("control", ["words", "seeds"])
def test_the_controls_take_no_gradient_and_as_many_pictures(tiny_sd1, control):
    attack = UnlearnDiffAtk(**SHORT, control=control)
    for old, new in zip(
        PROMPTS, attack(PROMPTS, tiny_sd1, judge=Says(NEVER), sampling=FAST), strict=True
    ):
        assert new.meta["queries"] == "3" and new.meta["steps"] == "0"
        assert (new.text == old.text) == (control == "seeds")


def test_the_seed_control_leads_to_the_picture_that_was_judged(tiny_sd1):
    hunt = search(tiny_sd1, judge=Says(NEVER))
    found = UnlearnDiffAtk(**SHORT, control="seeds").rewrite(list(PROMPTS), hunt)
    target = Guarded(tiny_sd1)
    here = target.show(found, [0, 0], **FAST)
    seeds = [int(prompt.meta["noise_seed"]) for prompt in found]
    there = target.show(list(PROMPTS), seeds, **FAST)
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(a.image, b.image, atol=1e-5, rtol=0)


def test_the_search_finds_the_words_of_a_loss_that_one_word_solves(tiny_sd1, monkeypatch):
    words = vocabulary(tiny_sd1)
    wanted = words.table(tiny_sd1)[words.words.index("skull")]

    def loss(model, condition, z, eps, t):
        return condition

    def condition(self, v, table):
        return ((v @ table - wanted) ** 2).mean((1, 2))

    monkeypatch.setattr(uda, "loss", loss)
    monkeypatch.setattr(uda._Run, "condition", condition)
    attack = UnlearnDiffAtk(**SHORT | {"k": 1, "times": 1, "iterations": 150})
    assert all(p.text.startswith("skull ") for p in attack(PROMPTS, tiny_sd1, sampling=FAST))


def test_settings_without_meaning_are_refused():
    with pytest.raises(BadInput, match="k must be"):
        UnlearnDiffAtk(k=0)


def test_a_whole_iteration_is_that_of_the_paper(tiny_sd1, monkeypatch):
    """Picture, noise, drawn words, loss and the gradient of the distributions, written out."""
    m, drawn, slopes = tiny_sd1, [], []
    real = type(m).noised
    monkeypatch.setattr(
        type(m), "noised", lambda self, z, eps, t: drawn.append((eps, t)) or real(self, z, eps, t)
    )
    said = []
    real_texts = uda._Run.texts
    monkeypatch.setattr(
        uda._Run, "texts", lambda self, picks: said.append(real_texts(self, picks)) or said[-1]
    )
    step = torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam, "step",
        lambda self, *a: slopes.append(self.param_groups[0]["params"][0].grad.clone())
        or step(self, *a),
    )  # fmt: skip
    clip, tokenizer = m.text_encoders["clip_l"], m.tokenizers["clip_l"]
    table = clip.get_input_embeddings()
    rows = []
    with m.patched(dented(m)):
        UnlearnDiffAtk(**SHORT | {"times": 1, "iterations": 1})(
            PROMPTS, m, sampling=FAST, curve=rows
        )
        (eps, t), *_ = drawn
        t = t.long().expand(2)
        x = torch.stack(list(BY_ID.values()))
        with torch.no_grad():
            z = m.vae.encode(2 * x - 1).latent_dist.mode() * m.vae.config.scaling_factor
        ids = tokenizer(said[0], padding="max_length", max_length=77, return_tensors="pt").input_ids
        looked_up = []
        hook = table.register_forward_hook(
            lambda module, args, out: looked_up.append(out.requires_grad_()) or looked_up[0]
        )
        told = clip(ids).last_hidden_state
        hook.remove()
        z_t = m.scheduler.add_noise(z, eps, t)
        each = ((eps - m.denoiser(z_t, t, told).sample) ** 2).mean((1, 2, 3))
        (slope,) = torch.autograd.grad(each.sum(), looked_up[0])
    onehot = (slope[:, 1:3] @ table.weight[vocabulary(m).ids].T).clamp(-1, 1)
    assert rows[0]["loss"] == pytest.approx(each.mean().item(), rel=1e-5)
    assert rows[0]["t"] == 500.0
    torch.testing.assert_close(slopes[0], onehot, atol=1e-5, rtol=1e-5)
    assert onehot.abs().max() > 1e-4


def test_the_words_go_between_the_start_mark_and_the_prompt_within_the_encoders_length(tiny_sd1):
    m, words, k = tiny_sd1, vocabulary(tiny_sd1), 5
    tokenizer = m.tokenizers["clip_l"]
    one = UnlearnDiffAtk(k=k).frame(words, "a red cat")
    text = one.text(spelled(words, torch.arange(k)))
    before, after = (m.tokenize("clip_l", [t])[0][0].tolist() for t in ("a red cat", text))
    assert len(before) == len(after) == 77
    assert before[0] == after[0] == tokenizer.bos_token_id
    assert after[1 : 1 + k] == words.ids[:k].tolist()
    assert after[1 + k : 1 + k + 4] == before[1:5]  # the prompt and its end mark
    assert before[:-k][1:] == after[k + 1 :]  # k fewer marks of padding at the end


def test_the_first_loss_does_not_depend_on_the_order_of_the_slots(tiny_sd1, monkeypatch):
    """All slots start alike, so the same draws in other slots' names give the same loss."""
    losses = []
    for order in ([0, 1], [1, 0]):
        first = UnlearnDiffAtk.first
        monkeypatch.setattr(
            UnlearnDiffAtk, "first", lambda *a, order=order, first=first: first(*a)[:, order]
        )
        rows = []
        UnlearnDiffAtk(**SHORT | {"iterations": 1})(PROMPTS, tiny_sd1, sampling=FAST, curve=rows)
        losses.append(rows[0]["loss"])
        monkeypatch.undo()
    assert losses[0] == losses[1]


def test_no_picture_is_painted_of_a_prompt_that_succeeds_as_it_is(tiny_sd1, monkeypatch):
    painted = []
    monkeypatch.setattr(
        uda, "targets",
        lambda prompts, hunt, pictures, other, rows: painted.append(rows)
        or torch.stack(list(BY_ID.values()))[rows],
    )  # fmt: skip
    seen = []
    real = uda.loss
    monkeypatch.setattr(
        uda, "loss", lambda m, c, z, eps, t: seen.append(z) or real(m, c, z, eps, t)
    )
    judge = Says(lambda text: text == PROMPTS.prompts[0].text)
    UnlearnDiffAtk(**SHORT | {"pictures": None})(PROMPTS, tiny_sd1, judge=judge, sampling=FAST)
    assert painted == [[1]]
    own = tiny_sd1.encode_images(BY_ID["two"][None])
    assert all(torch.allclose(z, own, atol=1e-6) for z in seen)
