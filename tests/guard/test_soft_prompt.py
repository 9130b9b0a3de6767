"""Soft prompts: PromptGuard (arXiv:2501.03544), PromptSafe (arXiv:2508.01272), every family."""

import dataclasses

import pytest
import torch
from filters import LONG, SAFE, data, rows_of, soft, unsafe

from safelight.attack.tokens import frame, told, vocabulary
from safelight.errors import BadInput
from safelight.flow import Prompt
from safelight.guard.base import Guarded
from safelight.guard.soft_prompt import Batch, SoftPrompt, Tokens, drawn, gap, initial
from safelight.guard.trained import load_guard
from safelight.prompts import PromptSet
from safelight.training.data import TextData

FAST = dict(epochs=1, rounds=2, batch=2)
PAIRS = [("a bomb in the park", "a fish in the park"), ("a big knife", "a big fish")]


@pytest.fixture(scope="module")
def learnt(tiny_sd1):
    return SoftPrompt(**FAST).fit(tiny_sd1, data())


def at_use(guard, **settings):
    return dataclasses.replace(guard, **settings)._with(guard.fitted_)


def holding(model, *words, **settings):
    """A guard whose tokens are words' own embeddings, one category per word."""
    guard = SoftPrompt(**settings)
    names = tuple(f"c{i}" for i in range(len(words)))
    weights = {
        f"v.{i}.{encoder}": rows_of(model, encoder, word)
        for i, word in enumerate(words)
        for encoder in guard.chosen(model)
    }
    fitted = SoftPrompt(**FAST, vectors=len(next(iter(weights.values())))).fit(model, data())
    fitted = dataclasses.replace(
        fitted.fitted_, weights=weights, info={"categories": list(names), "gate": None}
    )
    guard = dataclasses.replace(guard, vectors=len(next(iter(weights.values()))))
    return guard._with(fitted)


def same(a, b):
    torch.testing.assert_close(a.states, b.states, atol=1e-5, rtol=1e-5)
    if a.pooled is not None:
        torch.testing.assert_close(a.pooled, b.pooled, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(a.masks[name], b.masks[name]) for name in a.masks)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


# What is learnt


@pytest.mark.parametrize("form", ["text", "picture"])
def test_only_the_tokens_are_learnt_and_everything_else_keeps_its_hash(tiny_model, form):
    before = tiny_model.hashes()
    guard = SoftPrompt(**FAST, form=form, pictures=2).fit(tiny_model, data())
    assert tiny_model.hashes() == before
    widths = [tiny_model.token_table(name).weight.shape[1] for name in tiny_model.text_encoders]
    names = {f"v.{i}.{name}" for i in (0, 1) for name in tiny_model.text_encoders}
    assert set(guard.fitted_.weights) == names
    assert guard.fitted_.info["cost"]["parameters"] == 2 * sum(widths)
    for name, value in guard.fitted_.weights.items():
        assert not torch.equal(value, initial(tiny_model, name.split(".")[2], "safe").cpu())
    assert not any(p.requires_grad for m in tiny_model.modules.values() for p in m.parameters())


def test_one_encoder_only_can_get_tokens(tiny_sd3):
    guard = SoftPrompt(**FAST, encoders=("t5",)).fit(tiny_sd3, data())
    assert set(guard.fitted_.weights) == {"v.0.t5", "v.1.t5"}
    edited, bare = Guarded(tiny_sd3, [guard]).condition(["a cat"]), tiny_sd3.encode(["a cat"])
    assert torch.equal(edited.stream("clip_l"), bare.stream("clip_l"))
    assert not torch.equal(edited.stream("t5"), bare.stream("t5"))


def test_each_category_learns_by_itself(tiny_sd1):
    both = SoftPrompt(**FAST).fit(tiny_sd1, data("weapons", "death"))
    assert both.fitted_.info["categories"] == ["death", "weapons"]
    method = SoftPrompt(**FAST)
    object.__setattr__(method, "order_", ("death", "weapons"))
    with method.lend(tiny_sd1, rng()):
        loss = method.loss(tiny_sd1, Batch("weapons", PAIRS, ["a cat"] * 2, {}), rng())
        loss.total.backward()
        first, second = (v["clip_l"].grad for v in method.network_.v)
    assert first is None and second.abs().max() > 0


def test_the_same_seed_learns_the_same(tiny_sd1):
    one, two, other = (SoftPrompt(**FAST).fit(tiny_sd1, data(), seed=s) for s in (1, 1, 2))
    assert one.sha256 == two.sha256 != other.sha256


# The losses


def by_hand(model, guard, p, r):
    """All of the text form for one pair, with the papers' words, from the same draws."""
    z_t, t = drawn(model, 1, rng(5))
    token = {name: v.detach() for name, v in guard.network_.safety([0]).items()}

    def says(text, with_token):
        around = [token] if with_token else None
        return model.predict(z_t, t, model.encode([text], front=around))

    def D(a, b):
        return (says(*a) - says(*b)).square().mean()

    P, R, P_, R_ = (p, False), (r, False), (p, True), (r, True)
    m = 0.1 * D(R, P)
    tri = 10 * max(float(D(P_, R) - D(P_, P) + m), 0.0)
    return 0.9 * tri + 0.1 * float(D(R_, R)) + 0.5 * float(D(P_, R))


@torch.no_grad()
def test_the_text_loss_is_the_papers(tiny_model):
    method = SoftPrompt(pull=0.5)
    object.__setattr__(method, "order_", ("weapons",))
    with method.lend(tiny_model, rng()):
        found = method.loss(tiny_model, Batch("weapons", PAIRS[:1], ["a cat"], {}), rng(5))
        expected = by_hand(tiny_model, method, *PAIRS[0])
    assert found.total.item() == pytest.approx(expected, rel=1e-3)


@torch.no_grad()
def test_a_distance_to_oneself_is_zero_and_the_first_token_already_moves_a_benign_prompt(tiny_sd1):
    method = SoftPrompt()
    object.__setattr__(method, "order_", ("weapons",))
    with method.lend(tiny_sd1, rng()):
        terms = method.terms(tiny_sd1, Batch("weapons", PAIRS, ["a cat"] * 2, {}), rng())
        assert terms["L_ben"] > 0  # the token is "safe", not nothing
        twins = [("a fish", "a fish")]
        equal = method.terms(tiny_sd1, Batch("weapons", twins, ["a cat"], {}), rng())
    assert equal["apart"] == 0
    assert equal["to_safe"] == pytest.approx(equal["L_ben"])


def test_the_margin_has_no_gradient(tiny_sd1):
    """m is a constant: the gradient is that of the hinge with its value written in."""
    method = SoftPrompt(balance=1.0, margin=5.0)
    object.__setattr__(method, "order_", ("weapons",))
    with method.lend(tiny_sd1, rng()):
        v = method.network_.v[0]["clip_l"]
        method.loss(tiny_sd1, Batch("weapons", PAIRS[:1], ["a"], {}), rng(5)).total.backward()
        z_t, t = drawn(tiny_sd1, 1, rng(5))
        p, r = PAIRS[0]
        with torch.no_grad():
            says_p, says_r = (tiny_sd1.predict(z_t, t, tiny_sd1.encode([x])) for x in (p, r))
        own = method.network_.safety([0])
        says = tiny_sd1.predict(z_t, t, tiny_sd1.encode([p], front=[own]))
        plain = 10 * (gap(says, says_r) - gap(says, says_p)).sum()
        (expected,) = torch.autograd.grad(plain, v)
    assert expected.abs().max() > 0
    torch.testing.assert_close(v.grad, expected, atol=1e-7, rtol=1e-3)


def test_the_same_noise_and_time_are_used_for_all_four_predictions(tiny_sd1, monkeypatch):
    seen = []
    real = type(tiny_sd1)._predict

    def keep(self, z_t, t, condition, guidance):
        seen.append((z_t, t))
        return real(self, z_t, t, condition, guidance)

    monkeypatch.setattr(type(tiny_sd1), "_predict", keep)
    method = SoftPrompt()
    object.__setattr__(method, "order_", ("weapons",))
    with method.lend(tiny_sd1, rng()):
        method.loss(tiny_sd1, Batch("weapons", PAIRS, ["a"] * 2, {}), rng())
    z = torch.cat([z for z, _ in seen]).view(4, 2, *seen[0][0].shape[1:])
    t = torch.cat([t for _, t in seen]).view(4, 2)
    assert torch.equal(z, z[:1].expand_as(z)) and torch.equal(t, t[:1].expand_as(t))
    assert not torch.equal(z[0, 0], z[0, 1])  # the control: prompts differ


def picture(model, method, p_latents, bound=None):
    """The picture form's terms for one unsafe pair and one benign prompt."""
    latents = {PAIRS[0][0]: p_latents, PAIRS[0][1]: -p_latents, "a cat": p_latents / 2}
    return method.terms(model, Batch("weapons", PAIRS[:1], ["a cat"], latents), rng(5))


def test_the_picture_loss_is_the_papers_and_its_repelling_part_is_bounded(tiny_sd1):
    z = torch.randn(tiny_sd1.latent_shape((16, 16)), generator=rng(3))
    method, strict = SoftPrompt(form="picture", bound=1e9), SoftPrompt(form="picture", bound=0.01)
    for one in (method, strict):
        object.__setattr__(one, "order_", ("weapons",))
    with torch.no_grad(), method.lend(tiny_sd1, rng()):
        terms = picture(tiny_sd1, method, z)
        own, draw = method.network_.safety([0]), rng(5)
        t = tiny_sd1.random_times(2, draw)
        mse = []
        for pictures in ([-z, z / 2], [z, z / 2]):  # targets, then originals: noised on their own
            x = torch.stack(pictures)
            eps = torch.randn(x.shape, generator=draw)
            z_t, goal = tiny_sd1.noised(x, eps, t)
            said = tiny_sd1.encode([PAIRS[0][0], "a cat"], front=[own] * 2)
            mse.append((tiny_sd1.predict(z_t, t, said) - goal).square().flatten(1).mean(1))
        (target, benign), (original, again) = mse
    assert terms["target"].item() == pytest.approx(float(target + benign) / 2, rel=1e-4)
    assert terms["original"].item() == pytest.approx(float(again - original) / 2, rel=1e-4)
    expected = 0.9 * terms["target"] + 0.1 * terms["original"]
    assert method.objective(terms).item() == pytest.approx(expected.item())
    with strict.lend(tiny_sd1, rng()):
        terms = picture(tiny_sd1, strict, z)
        assert terms["original"].item() == pytest.approx(float(again - 0.01) / 2, rel=1e-3)


def test_both_pictures_of_a_pair_start_from_the_same_noise(tiny_sd1):
    method = SoftPrompt(form="picture", pictures=2)
    material = method.gather(tiny_sd1, data("weapons"), seed=7)
    p, r = material.learn["weapons"][0]
    said = tiny_sd1.encode([p, r])
    z = tiny_sd1.sample(said, seed=[7, 7]).cpu()
    torch.testing.assert_close(material.latents[p], z[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(material.latents[r], z[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", ["text", "picture"])
def test_a_small_step_down_the_gradient_lowers_the_loss_on_the_same_draw(tiny_sd1, form):
    method = SoftPrompt(form=form)
    object.__setattr__(method, "order_", ("weapons",))
    z = torch.randn(tiny_sd1.latent_shape((16, 16)), generator=rng(3))
    latents = {PAIRS[0][0]: z, PAIRS[0][1]: -z, "a cat": z / 2}
    batch = Batch("weapons", PAIRS[:1], ["a cat"], latents)
    with method.lend(tiny_sd1, rng()):
        v = method.network_.v[0]["clip_l"]
        before = method.loss(tiny_sd1, batch, rng(5)).total
        before.backward()
        found = []
        with torch.no_grad():
            step = 0.02 * v.norm() * v.grad / v.grad.norm()
            for sign in (-1, 1):  # down, and up as the control
                v.add_(sign * step)
                found.append(method.loss(tiny_sd1, batch, rng(5)).total.item())
                v.sub_(sign * step)
    assert found[0] < before.item() < found[1]


# How it acts


@pytest.mark.parametrize("place", ["start", "end"])
@pytest.mark.parametrize("word", ["dog", "big red"])
def test_a_words_own_embedding_paints_the_literal_prompt(tiny_model, place, word):
    target = Guarded(tiny_model, [holding(tiny_model, word, place=place)])
    literal = f"{word} a cat" if place == "start" else f"a cat {word}"
    same(target.condition(["a cat"]), tiny_model.encode([literal]))
    image = target(["a cat"], seed=3, steps=2)[0].image
    expected, other = (tiny_model([x], seed=3, steps=2)[0].image for x in (literal, "a cat"))
    torch.testing.assert_close(image, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(image, other, atol=1e-4)


@pytest.mark.parametrize("place", ["start", "end"])
def test_the_tokens_of_a_long_prompt_survive(tiny_model, place):
    target = Guarded(tiny_model, [holding(tiny_model, "dog", "bird", place=place)])
    told_ = target.condition([LONG])
    cut = " ".join(["cat"] * 500)
    for name in tiny_model.text_encoders:
        marks = len(tiny_model.tokenizers[name]("").input_ids)
        room = tiny_model.tokens[name] - marks - 2
        kept = " ".join(["cat"] * room)
        literal = f"dog bird {kept}" if place == "start" else f"{kept} dog bird"
        alone = tiny_model.encode([literal], encoders=[name])
        seen = told_.stream(name) if name in told_.encoders else told_.pooled_stream(name)
        wanted = alone.stream(name) if name in told_.encoders else alone.pooled_stream(name)
        torch.testing.assert_close(seen, wanted, atol=1e-5, rtol=1e-5)
        if place == "end":  # the control: as mere words they would have been cut
            lost = tiny_model.encode([f"{cut} dog bird"], encoders=[name])
            plain = tiny_model.encode([cut], encoders=[name])
            assert torch.equal(lost.states, plain.states)


def test_the_unconditional_branch_is_the_models_own(tiny_sd1, monkeypatch):
    target = Guarded(tiny_sd1, [holding(tiny_sd1, "dog")])
    seen = []
    real = type(tiny_sd1)._predict

    def keep(self, z_t, t, condition, guidance):
        seen.append(condition.states)
        return real(self, z_t, t, condition, guidance)

    monkeypatch.setattr(type(tiny_sd1), "_predict", keep)
    target(["a cat"], steps=1, guidance=5.0)
    away, toward = seen[0]
    torch.testing.assert_close(away, tiny_sd1.encode([""]).states[0])
    torch.testing.assert_close(toward, tiny_sd1.encode(["dog a cat"]).states[0])


def test_categories_stand_in_the_recorded_order_unless_others_are_named(tiny_sd1, learnt):
    guard = holding(tiny_sd1, "dog", "bird")
    same(Guarded(tiny_sd1, [guard]).condition(["a cat"]), tiny_sd1.encode(["dog bird a cat"]))
    turned = at_use(guard, categories=("c1", "c0"))
    same(Guarded(tiny_sd1, [turned]).condition(["a cat"]), tiny_sd1.encode(["bird dog a cat"]))
    one = at_use(guard, categories=("c1",))
    same(Guarded(tiny_sd1, [one]).condition(["a cat"]), tiny_sd1.encode(["bird a cat"]))
    assert learnt.fitted_.info["categories"] == ["death", "weapons"]
    with pytest.raises(BadInput, match="no category named 'gore'"):
        Guarded(tiny_sd1, [at_use(guard, categories=("gore",))])


@pytest.mark.parametrize("place", ["start", "end"])
def test_an_attackers_placeholder_and_the_tokens_stand_together(tiny_model, place):
    target = Guarded(tiny_model, [holding(tiny_model, "dog", place=place)])
    given = [soft(tiny_model, "big red"), None]
    texts = ["a <*> cat", "a <*> boat"]  # in the second it is text like any other
    with torch.no_grad():
        edited = target.condition(texts, given)
        front, behind = ("dog ", "") if place == "start" else ("", " dog")
        expected = tiny_model.encode(
            [f"{front}a big red cat{behind}", f"{front}{texts[1]}{behind}"]
        )
    same(edited, expected)
    attacker = {name: value.requires_grad_() for name, value in soft(tiny_model, "big").items()}
    seen = target.edited(tiny_model.encode(["a <*> cat"], soft=[attacker]))
    total = seen.states.square().sum()
    (total if seen.pooled is None else total + seen.pooled.square().sum()).backward()
    assert all(value.grad.abs().max() > 0 for value in attacker.values())


def test_an_attackers_embeddings_cannot_push_the_tokens_out(tiny_sd1):
    target = Guarded(tiny_sd1, [holding(tiny_sd1, "dog", place="end")])
    full = {"clip_l": rows_of(tiny_sd1, "clip_l", "cat").repeat(75, 1)}
    edited = target.condition(["<*>"], [full])
    same(edited, tiny_sd1.encode([" ".join(["cat"] * 74 + ["dog"])]))


def test_words_that_are_searched_by_gradients_are_read_with_the_tokens(tiny_model):
    target = Guarded(tiny_model, [holding(tiny_model, "dog")])
    words = vocabulary(tiny_model)
    one = frame(words, "cat", [0])
    pick = [words.words.index("red")]
    free = words.table(tiny_model)[pick].clone().requires_grad_()
    seen = target.edited(told(tiny_model, words, [one.rows(tiny_model, words, free)], ["red cat"]))
    with torch.no_grad():
        same(seen, tiny_model.encode(["dog red cat"]))
    seen.states.square().sum().backward()
    assert free.grad.abs().max() > 0


# The gate


@pytest.fixture(scope="module")
def gated(tiny_sd1):
    return SoftPrompt(**FAST, gate="prompt", fpr=0.1).fit(tiny_sd1, data())


def strengths(guard, model, texts):
    guard.prepare(model)
    return 1 - guard.gate_.scores(model.encode(texts).written)[:, 0]


def test_a_shut_gate_is_exactly_the_bare_model(tiny_sd1, gated):
    texts = [*SAFE[:8], "a bomb in the park"]
    g = strengths(gated, tiny_sd1, texts)
    shut = (g <= gated.gate_.limit).tolist()
    assert any(shut)
    target = Guarded(tiny_sd1, [gated])
    edited, bare = target.condition(texts), tiny_sd1.encode(texts)
    assert [torch.equal(a, b) for a, b in zip(edited.states, bare.states, strict=True)] == shut
    i = shut.index(True)
    pictures = [t([texts[i]], seed=3, steps=2)[0].image for t in (target, tiny_sd1)]
    assert torch.equal(*pictures)
    # The control: without the gate the same prompt gets its tokens.
    always = Guarded(tiny_sd1, [at_use(gated, gate="none")]).condition([texts[i]])
    assert not torch.allclose(always.states, tiny_sd1.encode([texts[i]]).states)


def test_the_gate_scales_the_tokens_between_their_start_and_what_was_learnt():
    start, v = {"clip_l": torch.zeros(1, 3)}, torch.ones(1, 3)
    tokens = Tokens(start, 2, None)
    tokens.v[0]["clip_l"].data = v
    assert torch.equal(tokens.safety([0], 0.25)["clip_l"], v / 4)
    assert torch.equal(tokens.safety([0, 1], 1.0)["clip_l"], torch.cat([v, 0 * v]))


def test_the_category_gate_opens_for_the_likeliest_category_alone(tiny_sd1, gated):
    one = at_use(gated, gate="category")
    texts = [p.text for part in data().unsafe for p in part]
    g = strengths(one, tiny_sd1, texts)
    found = one.around(tiny_sd1.encode(texts).written)
    scores = one.gate_.scores(tiny_sd1.encode(texts).written)
    opened = [i for i, v in enumerate(g.tolist()) if v > one.gate_.limit]
    assert opened
    for i in opened:
        c = one.order_.index(one.gate_.labels_[1:][int(scores[i, 1:].argmax())])
        expected = one.network_.safety([c], float(g[i]))["clip_l"]
        torch.testing.assert_close(found[i]["clip_l"], expected)


def test_learnt_embeddings_open_the_gate_fully(tiny_sd1, gated):
    prompt = Prompt(id="0", text=f"{SAFE[0]} <*>", soft=soft(tiny_sd1, "fish"))
    gated.prepare(tiny_sd1)
    found = gated.around(tiny_sd1.encode([prompt.text], soft=[prompt.soft]).written)[0]
    assert torch.equal(found["clip_l"], gated.network_.safety([0, 1])["clip_l"])


def test_the_folder_holds_the_gate_and_the_order(tiny_sd1, gated, tmp_path):
    gated.save(tmp_path / "g")
    back = load_guard(tmp_path / "g")
    texts = ["a bomb in the park", "a cat in the park"]
    one, two = (Guarded(tiny_sd1, [g]).condition(texts).states for g in (gated, back))
    assert torch.equal(one, two) and back.order_ == ("death", "weapons")
    assert gated.fitted_.info["cost"]["parameters"] == 2 * 32  # the gate is learnt beforehand


# Bad input


def test_data_it_cannot_learn_from_is_refused(tiny_sd1, learnt):
    safe = PromptSet.of(SAFE, "safe")
    lost = TextData(safe=safe, unsafe=[unsafe("weapons"), unsafe("death", safe_prompt=False)])
    with pytest.raises(BadInput, match="no death prompt has a safe counterpart"):
        SoftPrompt(**FAST).fit(tiny_sd1, lost)
    with pytest.raises(BadInput, match="the unsafe side has 0"):
        SoftPrompt(**FAST).fit(tiny_sd1, TextData(safe=safe, unsafe=[]))
    with pytest.raises(BadInput, match="needs at least 99 safe prompts"):
        SoftPrompt(**FAST, gate="prompt").fit(tiny_sd1, data())
    with pytest.raises(BadInput, match="learnt no gate"):
        Guarded(tiny_sd1, [at_use(learnt, gate="prompt")])
    with pytest.raises(BadInput, match="do not fit"):
        SoftPrompt(**FAST, vectors=80).fit(tiny_sd1, data())
    with pytest.raises(BadInput, match="text encoder"):
        SoftPrompt(encoders=("clip",)).fit(tiny_sd1, data())
