"""P4D keeps what its specification says (arXiv:2309.06135), on every family."""

import dataclasses

import pytest
import torch
from denoising import BY_ID, FAST, PROMPTS, Momentum, Says, dented, search

from safelight.attack import p4d
from safelight.attack.p4d import P4D, ideal
from safelight.attack.tokens import vocabulary
from safelight.errors import BadInput, Unsupported
from safelight.flow import Prompt
from safelight.guard.base import Guarded
from safelight.prompts import PromptSet

SHORT = dict(n=3, steps=4, every=2, pictures=BY_ID)


def descent(model, *, seed=0, target=None, **settings):
    attack = P4D(**SHORT | settings)
    words = vocabulary(model)
    frames = {i: attack.frame(words, prompt.text) for i, prompt in enumerate(PROMPTS)}
    images = torch.stack(list(BY_ID.values()))
    hunt = search(target or model, seed=seed)
    return p4d._Descent(attack, hunt, words, frames, list(PROMPTS), images)


def test_the_loss_and_its_gradient_are_those_of_the_paper(tiny_sd1):
    """A direct transcription: diffusers' own U-Net and noise, CLIP, no helper of the method."""
    m, patch = tiny_sd1, dented(tiny_sd1)
    words = "fish day knife"
    clip, tokenizer = m.text_encoders["clip_l"], m.tokenizers["clip_l"]
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    eps = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([421, 421])

    def states(texts):
        ids = tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids
        looked_up = []
        table = clip.get_input_embeddings()
        hook = table.register_forward_hook(
            lambda module, args, out: looked_up.append(out.requires_grad_()) or looked_up[0]
        )
        try:
            return clip(ids).last_hidden_state, looked_up[0]
        finally:
            hook.remove()

    z_t = m.scheduler.add_noise(z, eps, t)
    with torch.no_grad():
        goal = m.denoiser(z_t, t, clip(tokenizer(
            [p.text for p in PROMPTS], padding="max_length", max_length=77, return_tensors="pt"
        ).input_ids).last_hidden_state).sample  # fmt: skip
    with m.patched(patch):
        told, looked_up = states([words] * 2)
        squared = (m.denoiser(z_t, t, told).sample - goal) ** 2
        expected = squared.mean(dim=(1, 2, 3))
        (slope,) = torch.autograd.grad(expected.sum(), looked_up)

        one = descent(m)
        P_hat = clip.get_input_embeddings().weight[
            torch.tensor(tokenizer(words, add_special_tokens=False).input_ids * 2)
        ].clone().requires_grad_()  # fmt: skip
        condition = one.condition(P_hat, [words] * 2)
        found = p4d.loss(m, condition, z_t, t[:1].float(), goal)
        (gradient,) = torch.autograd.grad(found.sum(), P_hat)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient.view(2, 3, -1), slope[:, 1:4], atol=1e-5, rtol=1e-5)
    assert slope[:, 1:4].abs().max() > 1e-4


def test_the_prompt_itself_on_the_undefended_model_has_loss_zero(tiny_model):
    one = descent(tiny_model)
    z_t, t = one.z, torch.tensor([500.0])
    with torch.no_grad():
        goal = tiny_model.predict(z_t, t, one.y)
        here = p4d.loss(tiny_model, one.y, z_t, t, goal)
        with tiny_model.patched(dented(tiny_model)):
            there = p4d.loss(tiny_model, tiny_model.encode(one.y.prompts), z_t, t, goal)
    assert torch.equal(here, torch.zeros(2)) and (there > 1e-4).all()


def test_the_reference_is_the_model_without_its_patches(tiny_sd1):
    with tiny_sd1.patched(dented(tiny_sd1)):
        one = descent(tiny_sd1, pictures=None)
        with one.reference() as G, torch.no_grad():
            there = G.predict(one.z, torch.tensor([9.0]), one.y)
    with torch.no_grad():
        torch.testing.assert_close(tiny_sd1.predict(one.z, torch.tensor([9.0]), one.y), there)


def test_the_gradient_at_the_projection_moves_the_continuous_words(tiny_sd1):
    one = descent(tiny_sd1)
    before = one.P.detach().clone()
    assert torch.equal(before, one.table[p4d.nearest(before, one.table)])
    one.step()
    moved = one.P.detach()
    decayed = before * (1 - 0.1 * 0.1)
    # AdamW's first step is lr times the gradient's sign, wherever there is a gradient.
    torch.testing.assert_close(moved, decayed - 0.1 * one.P.grad.sign(), atol=1e-3, rtol=0)
    assert (one.P.grad.abs().sum(1) > 0).all()


def test_each_step_draws_one_time_of_the_models_own(tiny_sd1, monkeypatch):
    drawn = []
    own = type(tiny_sd1).random_times

    def times(self, n, rng):
        drawn.append((n, own(self, n, rng)))
        return drawn[-1][1]

    monkeypatch.setattr(type(tiny_sd1), "random_times", times)
    one = descent(tiny_sd1)
    for _ in range(3):
        one.step()
    assert [n for n, _ in drawn] == [1, 1, 1] and len({float(t) for _, t in drawn}) == 3


def test_times_are_uniform_over_the_training_range(tiny_sd1):
    t = tiny_sd1.random_times(20_000, torch.Generator().manual_seed(0))
    counts = torch.histc(t, 20, 0, 1000)
    chi_squared = ((counts - 1000) ** 2 / 1000).sum()
    assert t.min() < 2 and t.max() > 997 and chi_squared < 43.8  # p = 0.001 at 19 degrees


@pytest.mark.parametrize("length", [0, 1, 3, 10])
def test_the_k_layout_has_a_free_word_before_every_k_tokens(tiny_sd1, length):
    words = vocabulary(tiny_sd1)
    one = P4D(layout="k", k=3).frame(words, " ".join(["cat"] * length))
    assert len(one.slots) == length // 3 + 1
    assert [i for i, token in enumerate(one.order) if token < 0] == [
        4 * j for j in range(length // 3 + 1)
    ]


def test_the_n_layout_knows_nothing_of_the_prompt(tiny_sd1):
    one = P4D(n=16).frame(vocabulary(tiny_sd1), "a red cat")
    assert one.order == [-1] * 16


def test_the_prompts_own_tokens_never_move_in_the_k_layout(tiny_sd1):
    one = descent(tiny_sd1, layout="k")
    for _ in range(3):
        one.step()
    table = tiny_sd1.text_encoders["clip_l"].get_input_embeddings().weight
    free = one.P.detach().split(one.sizes)
    for frame, x, prompt in zip(one.frames, free, PROMPTS, strict=True):
        order = torch.tensor(frame.order)
        kept = frame.rows(tiny_sd1, one.words, x)[order >= 0]
        assert torch.equal(kept, table[one.words.tokens(prompt.text)])


@pytest.mark.parametrize("layout", ["n", "k"])
def test_what_is_found_is_a_text_that_the_target_painted(tiny_model, layout):
    before = tiny_model.hashes()
    attacked = P4D(**SHORT | {"layout": layout})(PROMPTS, tiny_model, sampling=FAST)
    assert tiny_model.hashes() == before
    for old, new in zip(PROMPTS, attacked, strict=True):
        assert "attack_failed" not in new.meta and new.text != old.text
        assert (new.meta["queries"], new.meta["steps"]) == ("2", "4")
        if layout == "k":
            rest = iter(new.text.split())
            assert all(word in rest for word in old.text.split())  # in order


def test_one_seed_decides_everything(tiny_sd1):
    attack = P4D(**SHORT)
    texts = [attack(PROMPTS, tiny_sd1, seed=s, sampling=FAST).texts for s in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_the_most_similar_picture_decides_and_the_earlier_of_equals(tiny_sd1, monkeypatch):
    scores = iter([0.1, 0.7, 0.7, 0.2])
    asked = []

    def alike(images, targets, model, judge):
        return torch.full((len(images),), next(scores))

    def query(self, prompts, seeds=None, rows=None):
        asked.append(list(prompts))
        return real(self, prompts, seeds, rows)

    hunt = search(tiny_sd1)
    real = type(hunt).query
    monkeypatch.setattr(type(hunt), "query", query)
    monkeypatch.setattr(p4d, "similarity", alike)
    found = P4D(**SHORT | {"steps": 4, "every": 1, "lr": 1.0}).rewrite(list(PROMPTS), hunt)
    assert [p.text for p in found] == asked[1] and asked[1] != asked[2]


def test_a_budget_ends_the_search_and_the_best_so_far_is_kept(tiny_sd1):
    from safelight.attack.base import Budget

    attack = P4D(**SHORT | {"steps": 50}, budget=Budget(steps=3, queries=2))
    for prompt in attack(PROMPTS, tiny_sd1, sampling=FAST):
        assert prompt.meta["steps"] == "3" and prompt.meta["queries"] == "2"
        assert "attack_failed" not in prompt.meta


def test_a_prompt_without_room_is_said_to_be_and_the_others_go_on(tiny_sd1):
    long = Prompt(id="one", text=" ".join(["cat"] * 70))
    prompts = dataclasses.replace(PROMPTS, prompts=(long, PROMPTS.prompts[1]))
    first, second = P4D(**SHORT | {"layout": "k"})(prompts, tiny_sd1, sampling=FAST)
    assert "do not fit" in first.meta["attack_failed"] and first.text == long.text
    assert "attack_failed" not in second.meta


def test_guards_that_edit_the_noise_keep_their_memory_over_the_search(tiny_sd1):
    guard = Momentum()
    one = descent(tiny_sd1, target=Guarded(tiny_sd1, [guard]))
    (own,) = one.guards
    for _ in range(3):
        one.step()
        one.search.step()
    assert [index for index, _ in own.indices] == [0, 1, 2]
    assert own.memories[0] == 0 and own.memories[1] > 0 and not own.memory.requires_grad
    assert own is not guard and guard.memory is None  # painting has a memory of its own


def test_the_safety_switch_takes_them_out_of_the_search_but_not_of_the_pictures(tiny_sd1):
    guard = Momentum()
    target = Guarded(tiny_sd1, [guard])
    assert descent(tiny_sd1, target=target, safety=False).guards == ()
    P4D(**SHORT | {"safety": False})(PROMPTS, target, sampling=FAST)
    assert len(guard.indices) == 2  # two looks of one sampling step each


def test_a_safety_term_of_scale_zero_changes_nothing(tiny_sd1):
    curves = []
    for guards in ([], [Momentum(0.0)]):
        rows = []
        P4D(**SHORT)(PROMPTS, Guarded(tiny_sd1, guards), sampling=FAST, curve=rows)
        curves.append([row["loss"] for row in rows])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_on_an_undefended_clone_the_found_words_do_far_better_than_random_ones(tiny_sd1):
    one = descent(tiny_sd1, lr=0.5)
    t = torch.tensor([450.0])
    eps = torch.randn(one.z.shape, generator=torch.Generator().manual_seed(7))
    z_t, _ = tiny_sd1.noised(one.z, eps, t)

    @torch.no_grad()
    def error(picks):
        condition = one.condition(one.table[picks], one.texts(picks))
        goal = tiny_sd1.predict(z_t, t, one.y)
        return p4d.loss(tiny_sd1, condition, z_t, t, goal).mean().item()

    rng = torch.Generator().manual_seed(1)
    random = [error(torch.randint(len(one.table), (6,), generator=rng)) for _ in range(8)]
    found = []
    for i in range(16):
        one.step()
        if i >= 8 and i % 2:
            found.append(error(p4d.nearest(one.P.detach(), one.table)))
    assert sum(found) / len(found) < 0.55 * sum(random) / len(random)


def test_ideal_prompts_are_unsafe_undefended_and_safe_defended(tiny_sd1):
    target = Guarded(tiny_sd1)
    three = PromptSet.of(["a cat", "a dog", "a bird"], "animals")
    rounds = []

    def once(text):  # the undefended model is asked first
        rounds.append(text)
        first = len(rounds) <= 6
        return (text == "a cat" and first) or text == "a dog"

    kept = ideal(three, target, Says(once), pictures=2)
    assert kept.texts == ("a cat",) and kept.name == "animals/ideal"
    with pytest.raises(BadInput, match="no prompt"):
        ideal(three, target, Says(lambda text: False), pictures=1)


def test_another_undefended_model_must_share_the_family(tiny_sd1, tiny_sdxl):
    with pytest.raises(Unsupported, match="share latents"):
        P4D(**SHORT, undefended=tiny_sdxl)(PROMPTS, tiny_sd1, sampling=FAST)


def test_a_whole_step_is_that_of_the_paper(tiny_sd1, monkeypatch):
    """Roles, picture, noise and gradient of one step, written out with diffusers' own modules."""
    m, drawn = tiny_sd1, []
    real = type(m).noised
    monkeypatch.setattr(
        type(m), "noised", lambda self, z, eps, t: drawn.append((eps, t)) or real(self, z, eps, t)
    )
    clip, tokenizer = m.text_encoders["clip_l"], m.tokenizers["clip_l"]

    def read(texts):
        return tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids

    with m.patched(dented(m)):
        one = descent(m)
        words = [
            " ".join(one.words.words[i] for i in part)
            for part in p4d.nearest(one.P.detach(), one.table).view(2, 3).tolist()
        ]
        value = one.step()
        (eps, t), *_ = drawn
        t = t.long().expand(2)
        x = torch.stack(list(BY_ID.values()))
        with torch.no_grad():
            z = m.vae.encode(2 * x - 1).latent_dist.mode() * m.vae.config.scaling_factor
        z_t = m.scheduler.add_noise(z, eps, t)
        with m.unpatched(), torch.no_grad():
            y = clip(read([p.text for p in PROMPTS])).last_hidden_state
            goal = m.denoiser(z_t, t, y).sample
        looked_up = []
        hook = clip.get_input_embeddings().register_forward_hook(
            lambda module, args, out: looked_up.append(out.requires_grad_()) or looked_up[0]
        )
        told = clip(read(words)).last_hidden_state
        hook.remove()
        each = ((m.denoiser(z_t, t, told).sample - goal) ** 2).mean((1, 2, 3))
        (slope,) = torch.autograd.grad(each.sum(), looked_up[0])
    assert value == pytest.approx(each.mean().item(), rel=1e-5)
    torch.testing.assert_close(one.P.grad.view(2, 3, -1), slope[:, 1:4], atol=1e-5, rtol=1e-5)


def test_the_prompts_own_words_found_by_the_search_have_loss_zero(tiny_model):
    """The same as above by the search's own way of telling the denoiser what it found."""
    one = descent(tiny_model)
    prompts = ["cat house boat", "big red bird"]
    picks = torch.tensor([one.words.words.index(w) for text in prompts for w in text.split()])
    z_t, t = one.z, torch.tensor([500.0])
    with torch.no_grad():
        goal = tiny_model.predict(z_t, t, tiny_model.encode(prompts))
        here = p4d.loss(tiny_model, one.condition(one.table[picks], prompts), z_t, t, goal)
    assert (here < 1e-9).all()


def test_undefended_pictures_are_painted_only_of_prompts_that_are_searched_for(
    tiny_sd1, monkeypatch
):
    painted = []
    monkeypatch.setattr(
        p4d, "targets",
        lambda prompts, hunt, pictures, other, rows: painted.append(rows)
        or torch.stack(list(BY_ID.values()))[rows],
    )  # fmt: skip
    long = Prompt(id="one", text=" ".join(["cat"] * 70))
    prompts = dataclasses.replace(PROMPTS, prompts=(long, PROMPTS.prompts[1]))
    P4D(**SHORT | {"layout": "k", "pictures": None})(prompts, tiny_sd1, sampling=FAST)
    assert painted == [[1]]
