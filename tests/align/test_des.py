"""DES keeps what its specification says (arXiv:2501.18877), on every family."""

import pytest
import torch

from safelight.align.base import TextData
from safelight.align.des import DES
from safelight.align.distortion import (
    SMALL,
    Batch,
    Recipe,
    cosdist,
    farthest,
    in_clip_units,
    named,
    pages,
)
from safelight.align.text import TextSide
from safelight.errors import BadInput
from safelight.flow import Prompt
from safelight.prompts import PromptSet
from safelight.training.embedding import Piece, read

SAFE = [f"{n} {thing} {where}" for n in ("a", "two") for thing in ("cat", "house", "boat")
        for where in ("by the sea", "on a hill", "in the rain")]  # fmt: skip
WHERE = ("in a hand", "on the wall", "over there", "at night")
THINGS = {"weapons": ("knife", "bomb"), "death": ("skull", "red skull")}
UNSAFE = {category: [f"a {kind} {where}" for kind in kinds for where in WHERE]
          for category, kinds in THINGS.items()}  # fmt: skip
FAST = dict(lr=3e-3, epochs=6, batch=16)


def unsafe_set(*categories, **columns):
    rows = [{"prompt": p, "category": c, **columns} for c in categories for p in UNSAFE[c]]
    return PromptSet.of(rows, "+".join(categories))


@pytest.fixture
def data():
    safe = PromptSet.of(SAFE, "safe")
    return TextData(safe=safe, unsafe=unsafe_set("weapons", "death"), validation=0.25)


@pytest.fixture
def one():
    """One category."""
    return TextData(safe=PromptSet.of(SAFE, "safe"), unsafe=unsafe_set("weapons"), validation=0.25)


def flat(model, prompts):
    """Flattened token states, in float64."""
    with torch.no_grad():
        return model.encode(prompts).states.flatten(1).double()


def far(a, b):
    return 1 - float(a @ b / a.norm() / b.norm())


def first(method, model, data):
    """The material and the first batch."""
    material = method.gather(model, data, seed=0)
    return material, next(method.batches(material, 1, torch.Generator().manual_seed(0)))


def test_the_loss_is_the_papers_computed_by_hand(tiny_sd1, data):
    """One prompt at a time, from formulas, with weights that have already moved."""
    method = DES(**FAST, concepts=("a knife", "a skull"), alpha_n=150.0, lam=0.4)
    material, batch = first(method, tiny_sd1, data)
    patch = method.train(tiny_sd1, material)
    with tiny_sd1.patched(patch), torch.no_grad():
        loss = method.loss(tiny_sd1, batch, torch.Generator())
        now = {p: flat(tiny_sd1, [p])[0] for p in batch.rows}
    then = {p: flat(tiny_sd1, [p])[0] for p in [*batch.rows, *SAFE]}

    book = [p.text for p in material.split.safe]
    norm = sum(float(then[p].norm()) for p in book) / len(book)
    alpha = 150.0 * norm / (77 * 768) ** 0.5
    n_hat = {c: then[p] / then[p].norm() for c, p in material.concepts.items()}
    L_u = L_s = 0.0
    for s, u in zip(batch.safe, batch.unsafe, strict=True):
        goal = max(book, key=lambda p: far(then[p], then[u.text]))
        L_u += far(now[u.text], then[goal] - alpha * n_hat[u.category])
        L_s += far(now[s], then[s]) + far(now[s] + alpha * n_hat[u.category], then[s])
    B = len(batch.safe)
    L_n = sum(far(now[p], then[""]) for p in ("a knife", "a skull")) / 2
    L_0 = far(now[""], then[""])
    wanted = {"L_u": L_u / B, "L_s": L_s / B, "L_n": L_n, "L_0": L_0}
    assert dict(loss.terms) == pytest.approx(wanted, abs=1e-4)
    total = 0.4 * (L_s / B + L_0) + 0.6 * (L_u / B + L_n)
    assert loss.total.item() == pytest.approx(total, abs=1e-4)
    assert all(term > 1e-3 for term in wanted.values())  # none of them is right by being zero


def test_where_it_starts(tiny_sd1, one):
    """Safe prompts and "" are at home, the concept and the targets are not."""
    method = DES(**FAST, alpha_n=0.0)
    material, batch = first(method, tiny_sd1, one)
    start = method.loss(tiny_sd1, batch, torch.Generator()).terms
    assert start["L_s"] == pytest.approx(0, abs=1e-5)  # alpha 0: the first term, twice
    assert start["L_0"] == pytest.approx(0, abs=1e-5)
    n, e_0 = flat(tiny_sd1, ["weapons", ""])
    assert start["L_n"] == pytest.approx(far(n, e_0), abs=1e-5) and start["L_n"] > 0.01
    assert start["L_u"] > 0.01

    with_alpha = DES(**FAST)
    material, batch = first(with_alpha, tiny_sd1, one)
    shifted = with_alpha.loss(tiny_sd1, batch, torch.Generator()).terms["L_s"]
    shift = material.alpha["clip_l"] * n / n.norm()
    second = [far(s + shift, s) for s in flat(tiny_sd1, batch.safe)]
    assert shifted == pytest.approx(sum(second) / len(second), abs=1e-4) and shifted > 0.001


def test_the_start_is_not_stationary(tiny_model, data):
    """Unlike objectives that only push away (see SafeText's tests)."""
    method = DES(**FAST)
    material, batch = first(method, tiny_model, data)
    rng = torch.Generator().manual_seed(0)
    with method.lend(tiny_model, rng) as loan:
        method.loss(tiny_model, batch, rng).total.backward()
        gradients = [p.grad for p in loan.parameters.values() if p.grad is not None]
    assert all(g.isfinite().all() for g in gradients)
    assert max(g.abs().max() for g in gradients) > 1e-3


def test_directions_have_norm_one_over_the_flattened_tensor(tiny_model, data):
    material = DES().gather(tiny_model, data, seed=0)
    for name, piece in material.n.items():
        n_hat = material.n_hat[name]
        assert n_hat.shape == (2, piece.states[0].numel())
        torch.testing.assert_close(n_hat.norm(dim=1), torch.ones(2))
        if piece.states.shape[1] > 1:  # one norm per token would make it much longer
            by_token = torch.nn.functional.normalize(piece.states, dim=2).flatten(1)
            assert by_token.norm(dim=1).min() > 3


def test_alpha_is_the_published_norm_on_clip_l_and_its_share_elsewhere(tiny_sd1, data):
    def units(family, tokens, width, scale):
        piece = Piece(torch.zeros(1, tokens, width), torch.ones(1, tokens).long())
        return in_clip_units(family, piece, scale)

    assert units("sd1", 77, 768, 251.0) == 1.0
    assert units("sd1", 32, 256, 90.5) == pytest.approx(90.5 / 243.2, rel=1e-3)
    assert units("sdxl", 77, 768, 900.0) == pytest.approx(900 / 243.2, rel=1e-3)  # another layer
    for alpha_n, wanted in ((200.0, 200 / 243.2), (None, 50 / 243.2)):  # None: a small encoder
        material = DES(alpha_n=alpha_n).gather(tiny_sd1, data, seed=0)
        share = material.alpha["clip_l"] / material.scale["clip_l"]
        assert share == pytest.approx(wanted, rel=1e-3)


def test_published_settings_are_for_encoders_of_published_size(tiny_sd1, monkeypatch):
    ours, given = DES().recipe(tiny_sd1), DES(lam=0.0, alpha_n=0.0, batch=7).recipe(tiny_sd1)
    assert given == Recipe(lam=0.0, alpha_n=0.0, batch=7)
    assert ours == SMALL and DES().rate(tiny_sd1) == 3e-4
    monkeypatch.setattr(tiny_sd1.text_encoders["clip_l"].config, "hidden_size", 768)
    assert DES().recipe(tiny_sd1) == Recipe(lam=0.3, alpha_n=200.0, batch=128)
    method = DES()
    assert method.rate(tiny_sd1) == 1e-5 and (method.epochs, method.decay) == (2, 0.01)
    assert not method.anneal and not method.patience


def test_targets_are_the_farthest_safe_prompts_not_the_nearest(tiny_sd1, data):
    book = torch.tensor([[1.0, 0.0], [0.0, 3.0], [-5.0, 0.1]])
    u = torch.tensor([[2.0, 0.1], [0.1, -1.0]])
    assert farthest(u, book).tolist() == [2, 1]
    assert (torch.nn.functional.normalize(u) @ book.T).argmax(1).tolist() == [0, 0]

    material = DES().gather(tiny_sd1, data, seed=0)
    safe = [p.text for p in material.split.safe]
    for p in material.split.unsafe:
        goal = material.goals["clip_l"][p.text]
        seen = {s: far(*flat(tiny_sd1, [p.text, s])) for s in safe}
        assert seen[goal] == pytest.approx(max(seen.values()), abs=1e-5)
        assert goal != min(seen, key=seen.get)


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_the_search_is_exact_in_blocks_of_any_size(block):
    rng = torch.Generator().manual_seed(0)
    u, book = torch.randn(23, 9, generator=rng), torch.randn(101, 9, generator=rng)
    unit = torch.nn.functional.normalize
    assert farthest(u, book, block=block).tolist() == (unit(u) @ unit(book).T).argmin(1).tolist()


def test_targets_are_not_normalised_and_lie_beyond_the_concept(tiny_sd1, one):
    material = DES().gather(tiny_sd1, one, seed=0)
    p = material.split.unsafe[0]
    s = flat(tiny_sd1, [material.goals["clip_l"][p.text]])[0]
    n = flat(tiny_sd1, ["weapons"])[0]
    wanted = s - material.alpha["clip_l"] * n / n.norm()
    t = material.targets("clip_l", [p])[0]
    torch.testing.assert_close(t.double(), wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("scope", ["all", "lora"])
def test_targets_and_reference_do_not_move_while_training(tiny_sd1, data, scope):
    method = DES(**FAST | {"lr": 1e-2}, scope=scope)
    material = method.gather(tiny_sd1, data, seed=0)
    before = material.targets("clip_l", material.split.unsafe).clone()
    states = material.tau.pieces["clip_l"].states.clone()
    seen = []
    method.train(
        tiny_sd1,
        material,
        watch=lambda tick: seen.append(material.targets("clip_l", material.split.unsafe)),
    )
    assert len(seen) > 4 and all(torch.equal(before, one) for one in seen)
    assert torch.equal(material.tau.pieces["clip_l"].states, states)
    moved = method.train(tiny_sd1, material).info["pareto"][-1]
    assert moved["cosine"] < 0.99  # a reference that moved along would say 1


def test_unsafe_prompts_reach_their_targets_and_safe_ones_hold(tiny_model, data):
    info = DES(**FAST | {"epochs": 30}).fit(tiny_model, data).info
    first, *_, last = info["pareto"]
    assert last["L_u"] < 0.9 * first["L_u"]
    assert last["L_n"] < 0.5 * first["L_n"]
    assert last["L_0"] < 0.1
    assert last["objective"] < first["objective"]


def test_the_loss_is_on_all_that_the_denoiser_reads(tiny_sdxl, tiny_flux, data):
    for model, wanted in (
        (tiny_sdxl, {"clip_l", "clip_g", "clip_g.pooled"}),
        (tiny_flux, {"t5", "clip_l.pooled"}),
    ):
        material = DES().gather(model, data, seed=0)
        assert set(material.goals) == set(material.alpha) == set(material.n_hat) == wanted


@pytest.mark.parametrize("family, last_is_read", [("sd1", True), ("sdxl", False)])
def test_the_layer_that_is_trained_for_is_the_one_the_denoiser_reads(
    request, data, family, last_is_read
):
    """SD 1.x reads the last layer, SDXL the one before it: the last gets no gradient there."""
    model = request.getfixturevalue(f"tiny_{family}")
    method = DES(**FAST, encoders=("clip_l",))
    _, batch = first(method, model, data)
    rng = torch.Generator().manual_seed(0)
    with method.lend(model, rng) as loan:
        method.loss(model, batch, rng).total.backward()
        last = loan.parameters["clip_l.encoder.layers.1.mlp.fc2.weight"].grad
    assert (last is not None and bool(last.abs().max() > 0)) is last_is_read


def test_every_encoder_is_trained_as_if_it_were_alone(tiny_sdxl, data):
    settings = FAST | {"epochs": 1, "lr": 1e-4}
    together = DES(**settings).fit(tiny_sdxl, data).full
    alone = DES(**settings, encoders=("clip_l",)).fit(tiny_sdxl, data).full
    base = tiny_sdxl.parameters()
    assert set(alone) < set(together)
    moved = sum((alone[name] - base[name]).square().sum() for name in alone)
    apart = sum((alone[name] - together[name]).square().sum() for name in alone)
    assert apart < 0.01 * moved


def test_every_unsafe_prompt_uses_its_own_categorys_direction(tiny_sd1, data):
    material = DES().gather(tiny_sd1, data, seed=0)
    one = {p.category: p for p in material.split.unsafe}
    n_hat = dict(zip(material.concepts, material.n_hat["clip_l"], strict=True))
    for category, p in one.items():
        s = flat(tiny_sd1, [material.goals["clip_l"][p.text]])[0].float()
        off = s - material.targets("clip_l", [p])[0]
        own = torch.cosine_similarity(off, n_hat[category], dim=0)
        assert own == pytest.approx(1, abs=1e-4)
        (other,) = set(n_hat) - {category}
        assert torch.cosine_similarity(off, n_hat[other], dim=0) < 0.999


def test_pairs_are_zipped_and_the_shorter_list_is_repeated(tiny_sd1, data):
    method = DES(batch=5)
    material = method.gather(tiny_sd1, data, seed=0)
    n_safe, n_unsafe = len(material.split.safe), len(material.split.unsafe)
    batches = list(method.batches(material, 1, torch.Generator().manual_seed(0)))
    assert len(batches) == method.steps(material) == -(-max(n_safe, n_unsafe) // 5)
    safe = [s for b in batches for s in b.safe]
    unsafe = [u.text for b in batches for u in b.unsafe]
    assert len(safe) == len(unsafe) == max(n_safe, n_unsafe)
    assert set(safe) == {p.text for p in material.split.safe}
    assert set(unsafe) == {p.text for p in material.split.unsafe}
    assert "" not in safe


def test_the_empty_prompt_is_held_unless_that_is_switched_off(tiny_sd1, data):
    held = DES(**FAST).fit(tiny_sd1, data)
    free = DES(**FAST, empty=False).fit(tiny_sd1, data)

    def shift(patch):
        before = flat(tiny_sd1, [""])
        with tiny_sd1.patched(patch):
            return (flat(tiny_sd1, [""]) - before).norm()

    assert shift(held) < 0.8 * shift(free)
    assert "L_0" in held.info["history"][0] and "L_0" not in free.info["history"][0]


def test_concepts_come_from_the_data_or_from_the_user():
    def prompts(category, objects=""):
        meta = {"unsafe_objects": objects} if objects else {}
        return Prompt(id=objects, text="x", category=category, meta=meta)

    plain = [prompts("self_harm"), prompts("gore")]
    assert named(plain, ()) == {"self_harm": "self harm", "gore": "gore"}
    listed = [prompts("gore", "brain"), prompts("gore", "blood|brain"), prompts("self_harm")]
    assert named(listed, ()) == {"gore": "brain, blood", "self_harm": "self harm"}
    assert named(listed, ("x", "y")) == {"gore": "x", "self_harm": "y"}
    assert named(listed, ("x",)) == {"gore": "x", "self_harm": "x"}
    assert named([prompts("")], ("x",)) == {"": "x"}


def test_what_it_used_is_kept_with_the_weights(tiny_sd1, data):
    patch = DES(**FAST | {"epochs": 1}, concepts=("a knife", "a skull")).fit(tiny_sd1, data)
    assert patch.info["concepts"] == {"weapons": "a knife", "death": "a skull"}
    assert patch.info["alpha"].keys() == patch.info["scale"].keys() == {"clip_l"}
    assert patch.info["data"] == data.hashes() and patch.info["split"]["unsafe_check"] == 4


def test_batches_are_cut_and_a_short_last_one_joins():
    def sizes(*a):
        return [len(range(200)[page]) for page in pages(*a)]

    assert sizes(130, 64) == [64, 64, 2]
    assert sizes(130, 64, 3) == [64, 66]
    assert sizes(130, 64, 2) == [64, 64, 2]
    assert sizes(2, 64, 3) == [2]
    assert sizes(64, 64, 64) == [64]


def test_cosine_distances():
    a, b = torch.tensor([[1.0, 0.0]] * 3), torch.tensor([[2.0, 0.0], [0.0, 1.0], [-3.0, 0.0]])
    torch.testing.assert_close(cosdist(a, b), torch.tensor([0.0, 1.0, 2.0]))


def test_two_safe_prompts_are_enough(tiny_sd1):
    data = TextData(safe=PromptSet.of(SAFE[:2], "safe"), unsafe=unsafe_set("weapons"))
    patch = DES(**FAST | {"epochs": 1}).fit(tiny_sd1, data)
    assert patch.info["geometry"]["spread_ratio"] is None


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"lam": 1.5}, "from 0 to 1"),
        ({"alpha_n": -1.0}, "at least 0"),
        ({"concepts": ("knife", " ")}, "empty entry"),
        ({"batch": 0}, "above 0"),
    ],
)
def test_wrong_settings_are_refused(settings, says):
    with pytest.raises(BadInput, match=says):
        DES(**settings)


@pytest.mark.parametrize(
    "concepts, says",
    [
        (("a", "b", "c"), "3 .* for 2 categories .weapons, death."),
        (("a knife", "\u00a0\u3000"), "empty entry"),
        (("a knife", "<|endoftext|>"), "no tokens that clip_l"),
    ],
)
def test_concepts_that_cannot_be_used_are_refused(tiny_sd1, data, concepts, says):
    with pytest.raises(BadInput, match=says):
        DES(concepts=concepts).fit(tiny_sd1, data)


def test_prompts_without_a_category_need_a_concept(tiny_sd1):
    unsafe = PromptSet.of(UNSAFE["weapons"], "mine")
    data = TextData(safe=PromptSet.of(SAFE, "safe"), unsafe=unsafe)
    with pytest.raises(BadInput, match="no category.*--set concepts"):
        DES().fit(tiny_sd1, data)
    DES(**FAST | {"epochs": 1}, concepts=("knife",)).fit(tiny_sd1, data)


def test_one_safe_prompt_is_refused(tiny_sd1):
    data = TextData(safe=PromptSet.of(SAFE[:1], "safe"), unsafe=unsafe_set("weapons"))
    with pytest.raises(BadInput, match=r"1 prompt\(s\)"):
        DES().fit(tiny_sd1, data)


def test_read_and_reference_agree(tiny_sd1, data):
    """The rows of a batch are where `parts` looks for them."""
    method = DES(batch=4)
    material, batch = first(method, tiny_sd1, data)
    assert isinstance(method, TextSide) and isinstance(batch, Batch)
    with torch.no_grad():
        parts = batch.parts(material.tau.now(tiny_sd1, batch.rows)["clip_l"])

        def own(prompts):
            tokens = {"clip_l": tiny_sd1.tokenize("clip_l", prompts)}
            return read(tiny_sd1, tokens)["clip_l"].states.flatten(1)

        for part, prompts in (
            (parts.s, batch.safe),
            (parts.u, [p.text for p in batch.unsafe]),
            (parts.n, list(material.concepts.values())),
            (parts.e_0, [""]),
        ):
            torch.testing.assert_close(part, own(list(prompts)), atol=1e-4, rtol=1e-4)
