"""DPO: ln 2 at the start, the base as its own reference, and what each variant promises."""

import dataclasses
import json
import logging
import math

import pytest
import torch
from torch import Tensor

from safelight.align import dpo
from safelight.align.base import Checkpoint
from safelight.align.dpo import DPO, safeguard
from safelight.errors import BadInput, Unsupported, WorkFailed
from safelight.models.patch import Patch
from safelight.models.tiny import tiny
from safelight.training import weights
from safelight.training.lookalikes import Lookalikes
from safelight.training.twins import Twin, Twins
from safelight.training.weights import unadapted

LN2 = math.log(2)
QUICK = dict(iterations=2, epochs=1, batch=2)
VARIANTS = ("dpo", "sdpo", "duo")


def twins(n=6, category="weapons", size=16):
    """Dark safe pictures, bright unsafe ones; one side of each is darker than the other."""
    rng = torch.Generator().manual_seed(0)
    pictures, rows = {}, []
    for i in range(n):
        picture = torch.rand(3, size, size, generator=rng) * torch.linspace(0.2, 1, size)
        safe, unsafe = f"{category}{i}-safe", f"{category}{i}-unsafe"
        pictures |= {safe: picture * 0.5, unsafe: 1 - picture * 0.5}
        texts = (f"a knife {i}", f"a fish {i}")
        rows.append(Twin(f"{category}{i}", category, *texts, unsafe, safe, i))
    return Twins("twins", tuple(rows), pictures=pictures)


TWINS = twins()


def gathered(method, model, data=TWINS):
    return method.gather(model, data, seed=0)


def first(method, material, seed=0):
    return next(method.batches(material, 1, torch.Generator().manual_seed(seed)))


@pytest.fixture
def lent():
    """A method's loan of a model, its material and first batch, for as long as the test lasts."""
    from contextlib import ExitStack

    with ExitStack() as stack:

        def of(method, model, data=TWINS):
            material = gathered(method, model, data)
            loan = stack.enter_context(method.lend(model, torch.Generator().manual_seed(1)))
            return loan, material, first(method, material)

        yield of


def moved(loan, size=0.02):
    """The LoRA somewhere else than at the start."""
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in loan.parameters.items():
            if name.endswith(".B"):
                p.copy_(torch.randn(p.shape, generator=rng) * size)


def swapped(batch):
    """Safe and unsafe exchanged."""
    return dataclasses.replace(batch, z=batch.z.flip(0), t=batch.t.flip(0), eps=batch.eps.flip(0))


def logit(method, model, batch):
    with torch.no_grad():
        seen = method.errors(model, batch)
    return -method.scale(model) * ((seen.m_w - seen.m_l) - (seen.r_w - seen.r_l))


# At the start


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_starts_at_ln_2_and_only_B_gets_a_gradient(tiny_model, lent, variant):
    method = DPO(**QUICK, variant=variant)
    loan, _, batch = lent(method, tiny_model)
    found = method.loss(tiny_model, batch, torch.Generator())
    assert found.total.item() == pytest.approx(LN2, abs=1e-6)
    assert found.terms["win"] == found.terms["lose"] == found.terms["accuracy"] == 0.0
    assert torch.equal(logit(method, tiny_model, batch), torch.zeros(len(batch)))
    found.total.backward()
    grads = {name: p.grad for name, p in loan.parameters.items()}
    assert all(not grad.any() for name, grad in grads.items() if name.endswith(".A"))
    assert any(grad.any() for name, grad in grads.items() if name.endswith(".B"))
    own = {id(p) for p in loan.parameters.values()}
    everything = [p for module in tiny_model.modules.values() for p in module.parameters()]
    others = [p for p in everything if id(p) not in own]
    assert others and all(p.grad is None and not p.requires_grad for p in others)


def test_lora_is_gaussian_of_the_given_rank_with_alpha_equal_to_it(tiny_sd1, lent):
    method = DPO(**QUICK)
    assert method.alpha == method.rank == 4
    loan, *_ = lent(method, tiny_sd1)
    A = torch.cat([p.flatten() for name, p in loan.parameters.items() if name.endswith(".A")])
    assert A.std().item() == pytest.approx(1 / 4, rel=0.05) and abs(A.mean()) < 0.01
    assert all(not p.any() for name, p in loan.parameters.items() if name.endswith(".B"))
    assert {name.split(".")[-3] for name in loan.parameters} <= {"to_q", "to_k", "to_v", "0"}


def test_joint_attention_is_adapted_where_the_family_has_it(tiny_model):
    targets = set(DPO().layers(tiny_model))
    joint = {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
    assert targets - joint == {"to_q", "to_k", "to_v", "to_out.0"}
    # tiny-sd3's last block, like the real one's, has no text output
    assert (joint <= targets) == (tiny_model.family in ("sd3", "flux"))


# The reference


def test_the_reference_is_the_untouched_model_bit_for_bit(tiny_model, lent):
    method = DPO(**QUICK)
    other = tiny(tiny_model.family)
    loan, _, batch = lent(method, tiny_model)
    moved(loan)
    z, t = batch.z.flatten(0, 1), batch.t.flatten()
    c = batch.told(batch.captions * 2, tiny_model.device)
    with torch.no_grad():
        untouched = other.predict(z, t, c)
        with unadapted(tiny_model):
            assert torch.equal(tiny_model.predict(z, t, c), untouched)
        assert not torch.equal(tiny_model.predict(z, t, c), untouched)


def test_adapters_are_on_again_after_an_error_in_the_reference(tiny_sd1, lent):
    method = DPO(**QUICK)
    loan, _, batch = lent(method, tiny_sd1)
    moved(loan)
    before = method.loss(tiny_sd1, batch, torch.Generator()).terms
    with pytest.raises(WorkFailed), unadapted(tiny_sd1):
        raise WorkFailed("in the middle")
    assert all(p.requires_grad for p in loan.parameters.values())
    assert method.loss(tiny_sd1, batch, torch.Generator()).terms == before
    assert before["win"] != 0


def test_half_precision_weights_stay_as_they_are_below_float32_adapters(lent):
    model = tiny("sd1")
    model.cast(device=torch.device("cpu"), dtype=torch.bfloat16)
    method = DPO(**QUICK)
    loan, _, batch = lent(method, model)
    assert model.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in loan.parameters.values())
    total = method.loss(model, batch, torch.Generator()).total
    assert total.dtype == torch.float32 and total.item() == pytest.approx(LN2, abs=1e-6)


# The loss


def test_exchanging_safe_and_unsafe_changes_the_sign_of_z(tiny_model, lent):
    method = DPO(**QUICK, beta=5000.0)
    loan, _, batch = lent(method, tiny_model)
    moved(loan)
    z = logit(method, tiny_model, batch)
    assert z.abs().min() > 1e-3
    assert torch.allclose(logit(method, tiny_model, swapped(batch)), -z, rtol=1e-3, atol=1e-4)


def test_the_loss_is_that_of_the_formula_with_half_of_beta(tiny_sd1, lent):
    method = DPO(**QUICK, beta=300.0)
    loan, _, batch = lent(method, tiny_sd1)
    moved(loan)
    with torch.no_grad():
        found = method.loss(tiny_sd1, batch, torch.Generator())
        seen = method.errors(tiny_sd1, batch)
    z = -(300 / 2) * ((seen.m_w - seen.m_l) - (seen.r_w - seen.r_l))
    assert found.total.item() == pytest.approx(-torch.log(torch.sigmoid(z)).mean().item(), rel=1e-5)
    # what diffusers' example calls beta, without the half
    logits = (seen.r_w - seen.r_l) - (seen.m_w - seen.m_l)
    other = -torch.nn.functional.logsigmoid(150 * logits).mean().item()
    assert found.total.item() == pytest.approx(other, rel=1e-6)
    assert found.terms["accuracy"] == (z > 0).float().mean().item()
    assert found.terms["win"] == pytest.approx((seen.m_w - seen.r_w).mean().item(), rel=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_errors_are_in_the_models_own_parametrisation(prediction, lent):
    model = tiny("sd1", prediction=prediction)
    method = DPO(**QUICK)
    _, _, batch = lent(method, model)
    with torch.no_grad():
        seen = method.errors(model, batch)
        z_t, target = model.noised(batch.z[0], batch.eps[0], batch.t[0])
        said = model.predict(z_t, batch.t[0], batch.told(batch.captions, model.device))
    # two calls of other sizes: equal up to the order of sums
    torch.testing.assert_close(seen.m_w, (said - target).square().flatten(1).mean(1))
    assert torch.equal(target, batch.eps[0]) == (prediction == "epsilon")


@pytest.mark.parametrize(
    "shared, noise, time",
    [("both", True, True), ("noise", True, False), ("none", False, False)],
)
def test_a_pair_shares_noise_and_time_unless_told_otherwise(tiny_model, shared, noise, time):
    method = DPO(**QUICK | {"batch": 8}, shared=shared)
    batch = first(method, gathered(method, tiny_model))
    assert torch.equal(*batch.eps) is noise
    assert torch.equal(*batch.t) is time


def test_another_noise_on_the_unsafe_side_alone_changes_the_loss(tiny_sd1, lent):
    method = DPO(**QUICK)
    loan, _, batch = lent(method, tiny_sd1)
    moved(loan)
    rng = torch.Generator()
    before = method.loss(tiny_sd1, batch, rng).total
    eps = batch.eps.clone()
    eps[1] = torch.randn(eps[1].shape, generator=rng.manual_seed(9))
    assert method.loss(tiny_sd1, dataclasses.replace(batch, eps=eps), rng).total != before


@pytest.mark.parametrize("flip, views", [("pair", 2), ("each", 2), ("off", 1)])
def test_both_pictures_of_a_pair_are_mirrored_alike(tiny_sd1, flip, views):
    method = DPO(**QUICK | {"batch": 64}, flip=flip)
    material = gathered(method, tiny_sd1)
    assert len(material.z_w) == views
    z = first(method, material).z

    def view(side, latents):
        return [
            next(v for v in range(views) for p in latents[v] if torch.equal(p, row)) for row in side
        ]

    safe, unsafe = view(z[0], material.z_w), view(z[1], material.z_l)
    assert (safe == unsafe) == (flip != "each")
    assert set(safe) == set(range(views))


def test_mirrored_latents_are_those_of_mirrored_pictures(tiny_sd1):
    material = gathered(DPO(**QUICK), tiny_sd1)
    images = TWINS.images(TWINS.rows, "safe", (16, 16))
    with torch.no_grad():
        torch.testing.assert_close(material.z_w[1], tiny_sd1.encode_images(images.flip(-1)))
        assert not torch.allclose(material.z_w[0], material.z_w[1])


@pytest.mark.parametrize("mode, knives", [("both", 0.5), ("unsafe", 1.0)])
def test_captions_are_those_of_the_mode_and_some_are_dropped(tiny_sd1, mode, knives):
    method = DPO(**QUICK | {"batch": 400}, caption_mode=mode, caption_dropout=0.2)
    captions = first(method, gathered(method, tiny_sd1)).captions
    empty = captions.count("") / len(captions)
    assert 0.12 < empty < 0.28
    said = [text for text in captions if text]
    assert sum("knife" in text for text in said) / len(said) == pytest.approx(knives, abs=0.1)
    held = gathered(method, tiny_sd1).held
    assert "" not in held.captions


@pytest.mark.parametrize("latest", [None, 0.3])
def test_times_are_those_of_the_family_below_the_latest(tiny_model, latest):
    method = DPO(**QUICK | {"batch": 64}, latest=latest)
    t = first(method, gathered(method, tiny_model)).t
    assert t.max() <= (latest or 1) * tiny_model.noisiest
    assert (t.max() > 0.3 * tiny_model.noisiest) == (latest is None)


# Diffusion-SDPO


def test_the_safeguard_leaves_the_value_of_the_loss_and_scales_one_gradient(tiny_sd1, lent):
    plain, safe = DPO(**QUICK), DPO(**QUICK, variant="sdpo", mu=0.9)
    loan, _, batch = lent(plain, tiny_sd1)
    moved(loan)
    found = {}
    for method in (plain, safe):
        loss = method.loss(tiny_sd1, batch, torch.Generator())
        grads = torch.autograd.grad(loss.total, list(loan.parameters.values()))
        found[method.variant] = loss, torch.cat([grad.flatten() for grad in grads])
    (a, g_a), (b, g_b) = found["dpo"], found["sdpo"]
    assert a.total.item() == pytest.approx(b.total.item(), rel=1e-6)
    assert 0 <= b.terms["lam"] < 1
    assert not torch.allclose(g_a, g_b)


def test_lam_is_one_where_the_sides_disagree_and_one_less_mu_where_they_agree():
    d = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    assert safeguard(d, -d, 0.9) == 1
    assert safeguard(d, d, 0.9).item() == pytest.approx(0.1, rel=1e-5)
    assert safeguard(d, 0.01 * d, 0.9) == 1  # the cap of 10 is cut at 1
    assert safeguard(d, 2 * d, 0.6).item() == pytest.approx(0.2, rel=1e-5)


def test_a_capped_step_does_not_raise_the_safe_sides_error():
    rng = torch.Generator().manual_seed(1)
    for mu in (0.6, 0.9):
        for _ in range(20):
            g_w, g_l = torch.randn(2, 3, 4, 2, 2, generator=rng)
            g_l = g_l + 0.7 * g_w
            lam = safeguard(g_w, g_l, mu)
            if lam < 1:
                along = ((-g_w + lam * g_l) * g_w).sum()
                assert along <= -mu * g_w.square().sum() * (1 - 1e-5)


def test_lam_keeps_no_graph():
    d_w, d_l = torch.randn(2, 2, 4, 2, 2, requires_grad=True)
    assert not safeguard(d_w, d_l, 0.5).requires_grad


# DUO


def test_duo_has_a_convention_of_its_own_and_scales_rate_and_weight_with_beta(tiny_sd1):
    for beta in (100.0, 500.0, 2000.0):
        method = DPO(variant="duo", beta=beta, lr=3e-4, lam0=1e6)
        assert method.scale(tiny_sd1) == beta  # no half
        assert method.rate(tiny_sd1) * beta == pytest.approx(100 * 3e-4)
        assert method.lam / beta == pytest.approx(1e6 / 100)
    assert DPO(variant="duo").beta == 500


@pytest.mark.parametrize("parameters, beta", [(10**6, 5), (10**9, 5000)])
def test_beta_is_the_published_one_but_for_small_denoisers(tiny_sd1, monkeypatch, parameters, beta):
    monkeypatch.setattr(weights, "SMALL", 10**12 if parameters < 10**8 else 1)
    assert DPO().beta is None and DPO().scale(tiny_sd1) == beta / 2
    assert gathered(DPO(**QUICK), tiny_sd1).info["beta"] == beta
    assert DPO(beta=70.0).scale(tiny_sd1) == 35


def test_duo_trains_self_attention_only_where_there_is_any_apart(tiny_model, lent):
    method = DPO(**QUICK, variant="duo")
    loan, *_ = lent(method, tiny_model)
    own = ["attn1" in name for name in loan.parameters]
    assert all(own) if tiny_model.family in ("sd1", "sdxl") else not any(own)
    assert not any("attn2" in name for name in loan.parameters)


def test_duo_never_reads_a_caption(tiny_sd1):
    other = tuple(
        dataclasses.replace(row, unsafe_prompt="a skull", safe_prompt="") for row in TWINS
    )
    method = DPO(**QUICK, variant="duo")
    one = method.fit(tiny_sd1, TWINS)
    two = method.fit(tiny_sd1, dataclasses.replace(TWINS, rows=other))
    assert all(torch.equal(one.low_rank[k][1], two.low_rank[k][1]) for k in one.low_rank)
    assert any(up.any() for _, up, _ in one.low_rank.values())


def test_duos_third_part_is_the_pairs_noise_at_the_noisiest_time(tiny_model, lent, monkeypatch):
    method = DPO(**QUICK, variant="duo")
    loan, _, batch = lent(method, tiny_model)
    seen, real = [], tiny_model.predict
    monkeypatch.setattr(
        tiny_model, "predict", lambda z, t, c, **kw: seen.append((z, t)) or real(z, t, c, **kw)
    )
    assert method.errors(tiny_model, batch).prior == 0
    n = len(batch)
    for z, t in seen:
        assert torch.equal(z[2 * n :], batch.eps[0])
        last = 999 if tiny_model.family in ("sd1", "sdxl") else 1000
        assert t[2 * n :].tolist() == [last] * n
        assert t[: 2 * n].max() <= 750
    assert len(seen) == 2
    moved(loan)
    found = method.loss(tiny_model, batch, torch.Generator())
    whole = found.terms["loss"] + method.lam * found.terms["prior"]
    assert found.terms["prior"] > 0 and found.total.item() == pytest.approx(whole, rel=1e-5)


# What an expert is not for


def both():
    """Pairs of two categories; an expert for the first may leave the second alone."""
    more = twins(5, "gore")
    more = dataclasses.replace(
        more,
        rows=tuple(
            dataclasses.replace(row, unsafe_prompt=f"a skull {i}", safe_prompt=f"a tree {i}")
            for i, row in enumerate(more)
        ),
    )
    pictures = {**TWINS.pictures, **more.pictures}
    return Twins("both", TWINS.rows + more.rows, pictures=pictures).only("weapons")


def test_keep_is_off_as_published(tiny_sd1):
    assert DPO().keep == 0
    batch = first(DPO(**QUICK), gathered(DPO(**QUICK), tiny_sd1, both()))
    assert batch.keeping is None
    alone, beside = (DPO(**QUICK).fit(tiny_sd1, data) for data in (TWINS, both()))
    assert all(torch.equal(beside.low_rank[k][1], v[1]) for k, v in alone.low_rank.items())


def test_what_is_kept_is_all_but_unsafe_captions_of_its_own(tiny_sd1, tmp_path):
    file = tmp_path / "benign.jsonl"
    file.write_text('{"prompt": "a lighthouse"}\n{"prompt": "a windmill"}\n')
    data = both()
    method = DPO(**QUICK | {"iterations": 100}, keep=1.0, keep_prompts=(str(file),))
    material = gathered(method, tiny_sd1, data)
    whole, said = data.all(), set()
    for row in material.kept:
        twin = whole.rows[row.pair]
        own = (twin.safe_prompt, twin.unsafe_prompt)[row.side]
        said.add(row.caption)
        assert row.caption in ("", own, "a lighthouse", "a windmill")
        assert not row.caption.startswith("a knife")
    assert {"", "a lighthouse", "a windmill", "a fish 1", "a skull 1", "a tree 1"} <= said
    held_out = material.info["split"]["held"]
    assert sum(text.startswith("a fish") for text in said) == len(TWINS) - held_out
    assert material.info["split"]["kept"] == len(material.kept)
    assert material.info["data"]["both, all"] == whole.sha256 and len(material.info["data"]) == 3
    assert len(material.z_w[0]) == len(whole) == 11


def test_a_second_harm_beside_another_category_is_not_kept(tiny_sd1):
    data = both()
    one, *rest = data.others
    data = dataclasses.replace(
        data, others=(dataclasses.replace(one, meta={"beside": "knife"}), *rest)
    )
    method = DPO(**QUICK | {"iterations": 100}, keep=1.0)
    kept = {row.caption for row in gathered(method, tiny_sd1, data).kept}
    assert one.unsafe_prompt not in kept and one.safe_prompt in kept
    assert {twin.unsafe_prompt for twin in rest} & kept


def test_the_kept_term_is_the_distance_to_the_reference_times_half_of_beta(tiny_model, lent):
    method = DPO(**QUICK, beta=40.0, keep=3.0)
    loan, _, batch = lent(method, tiny_model, both())
    at_first = method.loss(tiny_model, batch, torch.Generator())
    assert at_first.terms["drift"] == 0 and at_first.total.item() == pytest.approx(LN2, abs=1e-6)
    moved(loan)
    with torch.no_grad():
        found = method.loss(tiny_model, batch, torch.Generator())
        at = batch.keeping
        z_t, _ = tiny_model.noised(at.z, at.eps, at.t)
        c = batch.told(at.captions, tiny_model.device)
        e = tiny_model.predict(z_t, at.t, c)
        with unadapted(tiny_model):
            e_ref = tiny_model.predict(z_t, at.t, c)
    drift = (e - e_ref).square().mean().item()
    assert drift > 0 and found.terms["drift"] == pytest.approx(drift, rel=1e-5)
    assert found.total.item() == pytest.approx(found.terms["loss"] + 3 * 20 * drift, rel=1e-5)


def test_an_expert_that_keeps_moves_other_captions_less_and_still_learns(tiny_sd1):
    data = both()
    plain = dict(iterations=40, epochs=1, batch=4, lr=1e-2, caption_mode="unsafe",
                 caption_dropout=0.0)  # fmt: skip
    keeping = DPO(**plain, keep=10.0)
    shown = next(
        dataclasses.replace(DPO(**plain, keep=10.0), batch=64).batches(
            gathered(keeping, tiny_sd1, data), 1, torch.Generator().manual_seed(9)
        )
    )
    drifts, ends = {}, {}
    for keep in (0.0, 10.0):
        patch = DPO(**plain, keep=keep).fit(tiny_sd1, data)
        ends[keep] = patch.info["pareto"][-1]
        at = shown.keeping
        z_t, _ = tiny_sd1.noised(at.z, at.eps, at.t)
        c = shown.told(at.captions, tiny_sd1.device)
        with torch.no_grad():
            before = tiny_sd1.predict(z_t, at.t, c)
            with tiny_sd1.patched(patch):
                drifts[keep] = (tiny_sd1.predict(z_t, at.t, c) - before).square().mean().item()
    assert drifts[10.0] < 0.5 * drifts[0.0]
    assert ends[10.0]["objective"] < LN2 and ends[10.0]["win"] < ends[10.0]["lose"]


def test_a_batch_in_pieces_keeps_the_same(tiny_sd1):
    settings = dict(iterations=3, epochs=1, batch=6, keep=5.0, beta=200.0)
    whole = DPO(**settings).fit(tiny_sd1, both())
    cut = DPO(**settings, accumulate=4).fit(tiny_sd1, both())
    for key, (_, up, _) in whole.low_rank.items():
        torch.testing.assert_close(cut.low_rank[key][1], up, rtol=1e-3, atol=2e-5)


def test_half_of_what_is_kept_are_lookalikes_with_their_own_pictures(tiny_sd1, monkeypatch):
    asked, images = {}, torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(3))

    def found(model, prompts, benign, judge, count, rng, *, watch):
        asked.update(prompts=prompts, benign=benign, judge=type(judge).__name__, count=count)
        return Lookalikes(("a fork 0", "a fork 1", "a fork 2"), images, ("fork",), 5)

    monkeypatch.setattr(dpo, "lookalikes", found)
    settings = QUICK | {"batch": 6}
    method = DPO(**settings, keep=1.0, lookalikes=9, witness="fake")
    material = gathered(method, tiny_sd1, both())
    batch = first(method, material)
    alike = [text.startswith("a fork") for text in batch.keeping.captions]
    assert alike == [False] * 3 + [True] * 3
    views = [tiny_sd1.encode_images(view) for view in (images, images.flip(-1))]
    for row in (3, 4, 5):
        own = int(batch.keeping.captions[row][-1])
        assert any(torch.equal(batch.keeping.z[row], view[own]) for view in views)
    assert asked["judge"] == "FakeJudge" and asked["count"] == 9
    train = [row for row in TWINS if row.unsafe_prompt in {p.text for p in asked["prompts"]}]
    assert len(train) == len(asked["prompts"]) == material.info["split"]["train"]
    assert {p.safe_prompt for p in asked["prompts"]} < set(asked["benign"])
    assert not any(text.startswith("a knife") for text in asked["benign"])
    assert material.info["lookalikes"] == {"kept": 3, "looked_at": 5, "words": 1}
    plain = first(DPO(**settings, keep=1.0), gathered(DPO(**settings, keep=1.0), tiny_sd1, both()))
    assert not any(text.startswith("a fork") for text in plain.keeping.captions)  # control


@pytest.mark.parametrize("found", [0, 2])
def test_lookalikes_are_learnt_with_in_every_family_and_may_be_none(tiny_model, monkeypatch, found):
    size = tiny_model.default_size
    none = Lookalikes(("a fork",) * found, torch.rand(found, 3, *size))
    monkeypatch.setattr(dpo, "lookalikes", lambda *a, **k: none)
    method = DPO(**QUICK, keep=1.0, lookalikes=4, witness="fake")
    patch = method.fit(tiny_model, both())
    assert patch.info["lookalikes"]["kept"] == found


# Draws that come again


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_with_a_kept_reference_is_that_of_the_same_draws_without(
    tiny_model, lent, variant
):
    keep = {} if variant == "duo" else {"keep": 3.0}
    method = DPO(**QUICK | {"batch": 4}, variant=variant, draws=3, **keep)
    loan, material, batch = lent(method, tiny_model, both())
    moved(loan)
    keeping = batch.keeping and dataclasses.replace(batch.keeping, e_ref=None)
    fresh = dataclasses.replace(batch, e_ref=None, keeping=keeping)
    rng = torch.Generator()
    known, asked = (method.loss(tiny_model, at, rng) for at in (batch, fresh))
    assert batch.e_ref is not None and (variant == "duo" or batch.keeping.e_ref is not None)
    assert known.terms == pytest.approx(asked.terms, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(known.total, asked.total, rtol=1e-4, atol=1e-6)


def test_with_draws_the_reference_is_asked_once_for_each_and_they_come_again(
    tiny_sd1, lent, monkeypatch
):
    method = DPO(**QUICK | {"batch": 4, "iterations": 30}, keep=1.0, draws=2)
    assert gathered(dataclasses.replace(method, draws=0), tiny_sd1, both()).pool is None
    _, material, _ = lent(method, tiny_sd1, both())
    assert len(material.pool) == 2 * len(material.rows)
    asked, predict = [], tiny_sd1.predict
    monkeypatch.setattr(
        type(tiny_sd1), "predict", lambda self, *args: asked.append(1) or predict(*args)
    )
    times, n = set(), 0
    for batch in method.batches(material, 1, torch.Generator().manual_seed(2)):
        method.loss(tiny_sd1, batch, torch.Generator())
        times |= set(batch.t[0].tolist())
        n += 1
    assert n == 30 and len(asked) == 2 * n  # one call for pairs, one for what is kept
    assert 1 < len(times) <= len(material.pool)


def test_the_reference_is_kept_in_the_precision_that_is_learnt_in(tiny_sd1, lent):
    """Before the first step both say the same, also in bfloat16."""
    method = DPO(**QUICK | {"batch": 4}, keep=1.0, draws=1, autocast=True)
    _, material, _ = lent(method, tiny_sd1, both())
    whole = material.pool.only(torch.arange(4))  # as the reference was asked: rounds alike
    with torch.autocast("cpu", torch.bfloat16):
        terms = method.loss(tiny_sd1, whole, torch.Generator()).terms
    assert terms["win"] == terms["lose"] == terms["drift"] == 0


def test_an_expert_learns_from_draws_that_come_again(tiny_sd1):
    plain = dict(iterations=40, epochs=1, batch=4, lr=1e-2, caption_mode="unsafe")
    patch = DPO(**plain, draws=4, accumulate=2).fit(tiny_sd1, TWINS)
    assert patch.info["pareto"][-1]["objective"] < LN2


# A whole training


def test_one_batch_is_learnt_by_heart(tiny_sd1, lent):
    method = DPO(**QUICK | {"batch": 4}, lr=1e-2, beta=5000.0)
    loan, _, batch = lent(method, tiny_sd1)
    adam = method.optimiser(list(loan.parameters.values()), method.rate(tiny_sd1))
    losses = []
    for _ in range(30):
        found = method.loss(tiny_sd1, batch, torch.Generator())
        losses.append(found.total.item())
        adam.zero_grad()
        found.total.backward()
        adam.step()
    assert losses[0] == pytest.approx(LN2, abs=1e-6) and losses[-1] < 0.05
    assert found.terms["accuracy"] == 1 and found.terms["win"] < found.terms["lose"]


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_it_learns_to_tell_pairs_apart(family):
    method = DPO(iterations=12, epochs=2, batch=4, lr=3e-3, beta=5000.0)
    patch = method.fit(tiny(family), twins(4))
    start, *_, end = patch.info["pareto"]
    assert start["objective"] == pytest.approx(LN2, abs=1e-6)
    assert end["objective"] < 0.4 and end["accuracy"] > 0.8
    assert end["win"] < end["lose"]


def test_a_patch_says_what_it_was_made_of_and_leaves_the_model_alone(tiny_model, tmp_path):
    before = tiny_model.hashes()
    data = Twins("both", TWINS.rows + twins(3, "gore").rows,
                 pictures={**TWINS.pictures, **twins(3, "gore").pictures})  # fmt: skip
    patch = DPO(**QUICK).fit(tiny_model, data, seed=3)
    assert tiny_model.hashes() == before == patch.base
    assert patch.info["categories"] == ["gore", "weapons"]
    assert patch.info["data"] == {"both": data.sha256}
    assert patch.info["split"] == {"train": 7, "held": 2, "kept": 0}
    assert patch.settings["rank"] == patch.settings["alpha"] == 4
    assert set(patch.info["pareto"][-1]) == {"epoch", "objective", "accuracy", "win", "lose"}
    assert not patch.full and all(name.startswith("denoiser.") for name in patch.low_rank)
    assert not any(p.requires_grad for p in tiny_model.denoiser.parameters())
    patch.save(tmp_path / "p")
    back = Patch.load(tmp_path / "p")
    held = {k: tuple(v) if isinstance(v, list) else v for k, v in back.settings.items()}
    assert DPO(**held) == DPO(**QUICK) and json.loads(json.dumps(patch.info)) == back.info
    again = DPO(**QUICK).fit(tiny_model, data, seed=3)
    assert all(torch.equal(again.low_rank[k][1], v[1]) for k, v in patch.low_rank.items())


def test_nothing_is_encoded_or_decoded_after_the_gathering(tiny_model, monkeypatch):
    method, calls = DPO(**QUICK), []
    for name, module in tiny_model.modules.items():
        if name != "denoiser":
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    for name in ("encode", "encode_images", "decode"):
        real = getattr(tiny_model, name)
        monkeypatch.setattr(
            tiny_model,
            name,
            lambda *a, real=real, name=name, **k: calls.append(name) or real(*a, **k),
        )
    material = gathered(method, tiny_model)
    assert calls.count("encode_images") == 4  # two sides, two views
    calls.clear()
    method.train(tiny_model, material)
    assert calls == []
    for module in tiny_model.modules.values():
        module._forward_hooks.clear()


@pytest.mark.parametrize("variant", ["dpo", "duo"])
def test_a_batch_in_pieces_takes_the_same_step(tiny_sd1, variant):
    settings = dict(iterations=3, epochs=1, batch=6, variant=variant)
    whole = DPO(**settings).fit(tiny_sd1, TWINS)
    cut = DPO(**settings, accumulate=4).fit(tiny_sd1, TWINS)
    for key, (down, up, _) in whole.low_rank.items():
        torch.testing.assert_close(cut.low_rank[key][0], down, rtol=1e-3, atol=2e-5)
        torch.testing.assert_close(cut.low_rank[key][1], up, rtol=1e-3, atol=2e-5)
    assert cut.info["history"][0]["loss"] == pytest.approx(LN2, abs=1e-6)
    with pytest.raises(BadInput, match="batch of 6 cannot be cut into 7"):
        DPO(**settings, accumulate=7).fit(tiny_sd1, TWINS)


def test_recomputing_activations_changes_no_figure(tiny_model):
    plain = DPO(**QUICK).fit(tiny_model, TWINS)
    again = DPO(**QUICK, recompute=True).fit(tiny_model, TWINS)
    assert not tiny_model.denoiser.is_gradient_checkpointing
    for key, (_, up, _) in plain.low_rank.items():
        torch.testing.assert_close(again.low_rank[key][1], up)


def test_recomputing_really_happens(tiny_sd1):
    def calls(method):
        count, batch = [], first(method, gathered(method, tiny_sd1))
        block = tiny_sd1.denoiser.up_blocks[-1].resnets[-1]  # behind something that is trained
        hook = block.register_forward_pre_hook(lambda *_: count.append(1))
        with method.lend(tiny_sd1, torch.Generator().manual_seed(1)):
            method.loss(tiny_sd1, batch, torch.Generator()).total.backward()
        hook.remove()
        return len(count)

    assert calls(DPO(**QUICK)) == 2
    assert calls(DPO(**QUICK, recompute=True)) == 3  # reference, policy, policy again


@pytest.mark.parametrize("wins, risen", [([0.0, -1e-4, 1e-4, 2e-4], True), ([0, 1, 1, -1], False)])
def test_an_error_on_safe_pictures_that_stays_up_is_said(
    tiny_sd1, caplog, monkeypatch, wins, risen
):
    given = iter(wins)
    monkeypatch.setattr(DPO, "check", lambda *_: {"objective": 1.0, "win": next(given)})
    with caplog.at_level(logging.WARNING):
        patch = DPO(**QUICK | {"iterations": 3, "epochs": 3}).fit(tiny_sd1, TWINS)
    assert patch.info["win_error_risen"] is risen
    assert ("rose above" in caplog.text) is risen


# Bad input


@pytest.mark.parametrize(
    "settings, says",
    [
        (dict(rank=0), "rank must be at least 1"),
        (dict(beta=0.0), "beta must be above 0"),
        (dict(beta=-5.0), "beta must be above 0"),
        (dict(iterations=0), "iterations must be above 0"),
        (dict(caption_dropout=1.5), "caption_dropout must be between 0 and 1"),
        (dict(accumulate=0), "accumulate must be above 0"),
        (dict(ema=1.0), "ema must be at least 0 and below 1"),
        (dict(keep=-1.0), "keep is a weight, 0 or more, not -1"),
        (dict(keep=math.nan), "keep is a weight, 0 or more, not nan"),
        (dict(keep=1.0, variant="duo"), "duo reads none; it has lam0"),
        (dict(keep_prompts=("emoji/safe/train",)), "set keep as well"),
        (dict(keep=1.0, lookalikes=-1), "0 or more, not -1"),
        (dict(lookalikes=9, witness="fake"), "lookalikes are what keep holds"),
        (dict(keep=1.0, lookalikes=9), "need a witness"),
        (dict(keep=1.0, witness="fake"), "looks at nothing else"),
        (dict(keep=1.0, lookalikes=9, witness="fakir"), "Did you mean .fake"),
        (dict(draws=-1), "0 or more, not -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, says):
    with pytest.raises(BadInput, match=says):
        DPO(**settings)


def test_one_pair_of_a_category_is_too_few(tiny_sd1):
    rows = (*TWINS.rows, dataclasses.replace(TWINS.rows[0], id="g", category="gore"))
    with pytest.raises(BadInput, match="one pair of 'gore'.*at least two"):
        DPO(**QUICK).fit(tiny_sd1, dataclasses.replace(TWINS, rows=rows))


def test_a_missing_picture_is_named(tiny_sd1, tmp_path):
    bare = Twins("bare", TWINS.rows, folder=tmp_path)
    with pytest.raises(BadInput, match="weapons0-safe.*of pair weapons0 is missing"):
        DPO(**QUICK).fit(tiny_sd1, bare)


def test_prompts_instead_of_pairs_and_layers_that_are_not_there_are_refused(tiny_sd1):
    with pytest.raises(BadInput, match="--pairs FOLDER"):
        DPO(**QUICK).fit(tiny_sd1, ["a knife"])
    with pytest.raises(Unsupported, match="no linear layer attn9"):
        DPO(**QUICK, targets=("attn9",)).fit(tiny_sd1, TWINS)


@pytest.mark.parametrize("same", [True, False])
def test_pairs_of_another_base_model_are_learnt_with_a_warning(tiny_sd1, tmp_path, caplog, same):
    base = tiny_sd1.hashes() | ({} if same else {"denoiser": "0" * 64})
    (tmp_path / "twins.json").write_text(json.dumps({"model": {"hashes": base}}))
    data = dataclasses.replace(TWINS, folder=tmp_path)
    with caplog.at_level(logging.WARNING):
        assert DPO(**QUICK).fit(tiny_sd1, data).low_rank
    assert ("different: denoiser" in caplog.text) is not same


def test_a_checkpoint_of_other_settings_is_not_gone_on_from(tiny_sd1, tmp_path, caplog):
    keep = Checkpoint(tmp_path / "c", every=0.0)
    DPO(**QUICK).fit(tiny_sd1, TWINS, checkpoint=keep)
    with caplog.at_level(logging.WARNING):
        one = DPO(**QUICK, beta=1000.0).fit(tiny_sd1, TWINS, checkpoint=keep)
    assert "another run (different: made from, settings)" in caplog.text
    bare = DPO(**QUICK, beta=1000.0).fit(tiny_sd1, TWINS)
    assert isinstance(one.low_rank, dict)
    pairs: list[tuple[Tensor, Tensor]] = [
        (up, bare.low_rank[k][1]) for k, (_, up, _) in one.low_rank.items()
    ]
    assert all(torch.equal(a, b) for a, b in pairs)
