"""SAGE keeps what its specification says (arXiv:2607.00402), on every family."""

import pytest
import torch

from safelight.align.base import TextData
from safelight.align.des import DES
from safelight.align.distortion import Recipe
from safelight.align.sage import SAGE, l_esp, l_lsa
from safelight.errors import BadInput
from safelight.prompts import PromptSet
from safelight.training import geometry
from safelight.training.geometry import neighbours, spread

SAFE = [f"{n} {thing} {where}" for n in ("a", "two") for thing in ("cat", "house", "boat", "car")
        for where in ("by the sea", "on a hill", "in the rain")]  # fmt: skip
UNSAFE = [{"prompt": f"a {thing} {where}", "category": category}
          for category, thing in (("weapons", "knife"), ("weapons", "bomb"), ("death", "skull"))
          for where in ("in a hand", "on the wall", "over there", "at night")]  # fmt: skip
FAST = dict(lr=3e-3, epochs=4, batch=16)
SMALL = FAST | {"k": 4}


@pytest.fixture
def data():
    safe, unsafe = PromptSet.of(SAFE, "safe"), PromptSet.of(UNSAFE, "unsafe")
    return TextData(safe=safe, unsafe=unsafe, validation=0.25)


def rows(n=32, d=20, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def still(d=20):
    return torch.zeros(d)


def first(method, model, data):
    material = method.gather(model, data, seed=0)
    return material, next(method.batches(material, 1, torch.Generator().manual_seed(0)))


# Spread


def test_spread_costs_nothing_at_the_start_nor_when_it_grows():
    z = rows() + 2
    assert l_esp(z, z).item() == 0
    assert l_esp(rows(), z).item() == 0
    shrunk = l_esp(z, rows())
    assert shrunk.item() == pytest.approx((spread(rows()) - spread(z)).item()) and shrunk > 0.1


def test_spread_pulls_a_crowd_apart():
    z = (rows() + 2).requires_grad_()
    l_esp(z, rows()).backward()
    assert spread((z - 0.1 * z.grad).detach()) > spread(z.detach())


# Local structure


@pytest.mark.parametrize("k, wanted", [(5, 0.00625), (15, 0.00208)])
def test_local_structure_at_identity_is_one_over_the_number_of_pairs(k, wanted):
    """160 and 480 pairs: the deviation is the unbiased one."""
    loss = l_lsa(rows(), rows(), k, still()).item()
    assert loss == pytest.approx(1 / (32 * k), abs=1e-5)
    assert loss == pytest.approx(wanted, abs=1e-5)


def test_local_structure_does_not_see_scale():
    other = rows(seed=1)
    at_one = l_lsa(other, rows(), 5, still()).item()
    assert l_lsa(9 * other, rows(), 5, still()).item() == pytest.approx(at_one, abs=1e-5)
    assert at_one > 0.5  # unrelated readings are far from their old structure


def test_local_structure_computed_by_hand():
    now, then, a_d = rows(6, 4, 1), rows(6, 4, 2), 0.7 * rows(1, 4, 3)[0]

    def cos(x, i, j):
        return float(x[i] @ x[j] / x[i].norm() / x[j].norm())

    pairs = []
    for i in range(6):
        others = sorted((j for j in range(6) if j != i), key=lambda j: -cos(then, i, j))
        pairs += [(i, j) for j in others[:2]]
    x = [cos(now + a_d, i, j) for i, j in pairs]
    y = [cos(then, i, j) for i, j in pairs]
    n = len(pairs)
    mx, my = sum(x) / n, sum(y) / n
    sx = (sum((v - mx) ** 2 for v in x) / (n - 1)) ** 0.5
    sy = (sum((v - my) ** 2 for v in y) / (n - 1)) ** 0.5
    wanted = 1 - sum((v - mx) / sx * (w - my) / sy for v, w in zip(x, y, strict=True)) / n
    assert l_lsa(now, then, 2, a_d).item() == pytest.approx(wanted, abs=1e-5)


def test_neighbours_are_chosen_by_the_frozen_readings():
    then = rows()
    now = then[torch.randperm(32, generator=torch.Generator().manual_seed(1))]
    seen = l_lsa(now, then, 5, still())
    N = neighbours(then, 5)
    unit = torch.nn.functional.normalize
    x = (unit(now) @ unit(now).T).gather(1, N).flatten()
    y = (unit(then) @ unit(then).T).gather(1, N).flatten()
    pearson = torch.corrcoef(torch.stack([x, y]))[0, 1]
    assert seen.item() == pytest.approx(1 - pearson.item() * (160 - 1) / 160, abs=1e-4)
    assert neighbours(now, 5).tolist() != N.tolist()


def test_no_gradient_reaches_the_frozen_readings(tiny_sd1, data):
    method = SAGE(**SMALL)
    material, batch = first(method, tiny_sd1, data)
    assert not any(piece.states.requires_grad for piece in material.tau.pieces.values())
    before = material.tau.pieces["clip_l"].states.clone()
    patch = method.train(tiny_sd1, material)
    assert patch.info["pareto"][-1]["cosine"] < 0.999
    assert torch.equal(material.tau.pieces["clip_l"].states, before)


# The whole


def test_with_both_weights_zero_it_is_des_step_for_step(tiny_model, data):
    sage = SAGE(**FAST, esp=0.0, lsa=0.0).fit(tiny_model, data, seed=3)
    des = DES(**FAST).fit(tiny_model, data, seed=3)
    assert sage.info["history"] == des.info["history"]
    assert all(torch.equal(sage.full[name], des.full[name]) for name in des.full)
    other = SAGE(**SMALL).fit(tiny_model, data, seed=3)
    assert any(not torch.equal(other.full[name], des.full[name]) for name in des.full)


def test_the_objective_is_that_of_des_and_the_weighted_terms(tiny_sd1, data):
    method = SAGE(**SMALL, lam=0.3, esp=2.0, lsa=0.5)
    _, batch = first(method, tiny_sd1, data)
    loss = method.loss(tiny_sd1, batch, torch.Generator())
    t = loss.terms
    des = 0.3 * (t["L_s"] + t["L_0"]) + 0.7 * (t["L_u"] + t["L_n"])
    total = des + 2.0 * t["L_ESP"] + 0.5 * t["L_LSA"]
    assert loss.total.item() == pytest.approx(total, abs=1e-5)
    assert t["L_ESP"] == pytest.approx(0, abs=1e-6)  # the start
    assert 0 < t["L_LSA"] < 0.1


def test_the_perturbation_is_the_direction_or_the_reading_itself(tiny_sd1, data):
    """The paper's is about two orders larger than the code's."""
    material = SAGE(**SMALL).gather(tiny_sd1, data, seed=0)
    unit = SAGE(**SMALL)._directions(material, "clip_l")
    raw = SAGE(**SMALL, perturb="raw")._directions(material, "clip_l")
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(raw, material.n["clip_l"].states.flatten(1))
    assert (raw.norm(dim=1) > 20).all()
    terms = []
    for perturb in ("unit", "raw"):
        method = SAGE(**SMALL, perturb=perturb)
        _, batch = first(method, tiny_sd1, data)
        terms.append(method.loss(tiny_sd1, batch, torch.Generator()).terms["L_LSA"])
    assert terms[0] != pytest.approx(terms[1], rel=1e-3)


def test_published_settings_are_for_encoders_of_published_size(tiny_sd1, monkeypatch):
    assert SAGE().recipe(tiny_sd1) == DES().recipe(tiny_sd1)
    monkeypatch.setattr(tiny_sd1.text_encoders["clip_l"].config, "hidden_size", 768)
    assert SAGE().recipe(tiny_sd1) == Recipe(lam=0.3, alpha_n=205.0, batch=128)
    method = SAGE()
    assert (method.esp, method.lsa, method.k, method.a) == (2.0, 0.1, 15, 1.0)
    assert (method.perturb, method.epochs) == ("unit", 2)


def test_it_keeps_more_of_the_geometry_than_des(tiny_sd1, data):
    def kept(method):
        material = method.gather(tiny_sd1, data, seed=0)
        patch = method.train(tiny_sd1, material)
        safe = [prompt.text for prompt in material.split.safe]
        return geometry.kept(tiny_sd1, patch, safe, ["clip_l"])

    long = dict(lr=1e-3, batch=16, lam=0.3, alpha_n=200.0)
    assert kept(DES(**long, epochs=10))["spread_ratio"] < 0.95
    assert kept(SAGE(**long, epochs=10, k=4))["spread_ratio"] > 0.99
    structure = kept(SAGE(**long, epochs=15, k=4, lsa=1.0))["jaccard"]
    assert structure > kept(DES(**long, epochs=15))["jaccard"]


def test_a_short_last_batch_joins_the_one_before(tiny_sd1, data):
    n = 18  # safe prompts to learn from
    for batch, k, sizes in ((16, 4, [18]), (7, 4, [7, 11]), (7, 3, [7, 7, 4]), (16, 1, [16, 2])):
        method = SAGE(batch=batch, k=k)
        material = method.gather(tiny_sd1, data, seed=0)
        rng = torch.Generator().manual_seed(0)
        seen = [len(one.safe) for one in method.batches(material, 1, rng)]
        assert seen == sizes and sum(seen) == n and len(seen) == method.steps(material)
        assert min(seen) > k


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"batch": 15}, "batch must be larger than k"),
        ({"k": 0}, "at least 1"),
        ({"esp": -1.0}, "esp must be at least 0"),
        ({"lsa": -1.0}, "lsa must be at least 0"),
    ],
)
def test_wrong_settings_are_refused(settings, says):
    with pytest.raises(BadInput, match=says):
        SAGE(**settings)


def test_an_unknown_perturbation_is_refused():
    method = SAGE()
    object.__setattr__(method, "perturb", "units")  # past the tests' own type checks
    with pytest.raises(BadInput, match="Did you mean 'unit'"):
        method.__post_init__()


def test_too_few_safe_prompts_to_be_neighbours_are_refused(tiny_sd1, data):
    few = TextData(safe=PromptSet.of(SAFE[:10], "safe"), unsafe=data.unsafe)
    with pytest.raises(BadInput, match="9 different safe prompts.*15 neighbours.*lower k"):
        SAGE().fit(tiny_sd1, few)
    with pytest.raises(BadInput, match="not 32 with k 40"):  # the batch of small encoders
        SAGE(k=40).fit(tiny_sd1, data)
    SAGE(**SMALL).fit(tiny_sd1, few)
    SAGE(**FAST, lsa=0.0).fit(tiny_sd1, few)
