"""SafeText keeps what its specification says (arXiv:2502.20623), on every family."""

import dataclasses
from itertools import product

import pytest
import torch

from safelight.align.base import TextData
from safelight.align.safetext import Batch, SafeText
from safelight.errors import BadInput, WorkFailed
from safelight.prompts import PromptSet

FAMILIES = ("sd1", "sdxl", "sd3", "flux")
SAFE = [f"{n} {thing} {where}" for n in ("a", "two") for thing in ("cat", "house", "boat")
        for where in ("by the sea", "on a hill", "in the rain")]  # fmt: skip
UNSAFE = [f"a {kind} sword {where}" for kind in ("red", "long", "old", "steel")
          for where in ("in a hand", "on the wall", "over there")]  # fmt: skip
FAST = dict(lr=3e-3, epochs=6, batch=16, patience=0, anneal=False, lead=0, variants=0)


@pytest.fixture
def data():
    safe = PromptSet.of(SAFE, "safe")
    return TextData(safe=safe, unsafe=PromptSet.of(UNSAFE, "swords"), validation=0.25)


@pytest.fixture(params=FAMILIES)
def model(request):
    return request.getfixturevalue(f"tiny_{request.param}")


def shifts(model, patch, prompts):
    """Relative shift of each prompt's whole condition under a patch."""
    with torch.no_grad():
        before = model.encode(prompts)
        with model.patched(patch):
            after = model.encode(prompts)
    parts = [(before.states, after.states)]
    if before.pooled is not None:
        parts.append((before.pooled, after.pooled))
    return sum((b - a).flatten(1).norm(dim=1) / a.flatten(1).norm(dim=1) for a, b in parts)


def weights(patch):
    """Every tensor of a patch by name."""
    flat = dict(patch.full)
    for name, (up, down, _) in patch.low_rank.items():
        flat |= {f"{name}.up": up, f"{name}.down": down}
    return flat


@pytest.mark.parametrize("scope", ["all", "lora"])
def test_unsafe_prompts_move_and_safe_ones_hold(model, data, scope):
    lr = {"all": 3e-3, "lora": 1e-2}[scope]
    method = SafeText(**FAST | {"lr": lr, "epochs": 20}, lam=1.0, scope=scope)
    patch = method.fit(model, data)
    safe, unsafe = shifts(model, patch, SAFE), shifts(model, patch, UNSAFE)
    assert unsafe.mean() > 2 * safe.mean()
    assert patch.info["pareto"][-1]["cosine"] < 0.9


def test_only_the_text_encoders_change_and_the_model_is_left_as_it_was(model, data):
    before = dict(model.hashes())
    flags = [p.requires_grad for m in model.text_encoders.values() for p in m.parameters()]
    patch = SafeText(**FAST | {"epochs": 1}).fit(model, data)

    assert model.hashes() == before
    assert flags == [p.requires_grad for m in model.text_encoders.values() for p in m.parameters()]
    with model.patched(patch):
        inside = model.hashes()
    changed = {name for name in before if inside[name] != before[name]}
    assert changed == set(model.text_encoders)
    assert model.hashes() == before


def test_it_starts_at_zero_drift_and_full_cosine(model, data):
    method = SafeText(perturb=0.0)
    material = method.gather(model, data, seed=0)
    start = method.check(model, material)
    assert start["L_u"] == pytest.approx(0, abs=1e-5)
    assert start["L_e"] == pytest.approx(-1, abs=1e-5)
    assert start["objective"] == pytest.approx(method.lam, abs=1e-5)


def test_the_start_is_stationary_unless_it_is_perturbed(tiny_sd1, data):
    pull = dict(**FAST, d_u="euclidean", d_e="euclidean")
    still = SafeText(**pull, perturb=0.0).fit(tiny_sd1, data)
    moved = SafeText(**pull).fit(tiny_sd1, data)
    assert still.info["pareto"][-1]["cosine"] == pytest.approx(1, abs=1e-6)
    assert moved.info["pareto"][-1]["cosine"] < 0.999


@pytest.mark.parametrize(
    "d_u, d_e",
    [*product(("euclidean", "neg_cosine"), repeat=2), ("squared_l2", "neg_abs_cosine"),
     ("per_token_cosine", "per_token_cosine"), ("neg_abs_cosine", "squared_l2")],
)  # fmt: skip
def test_every_pair_of_distances_leaves_the_start(tiny_sd1, data, d_u, d_e):
    patch = SafeText(**FAST, d_u=d_u, d_e=d_e, lam=1.0).fit(tiny_sd1, data)
    assert patch.info["pareto"][-1]["cosine"] < 0.999


def test_the_same_seed_gives_the_same_patch_and_another_seed_another(tiny_sd1, data):
    method = SafeText(**FAST | {"epochs": 1})
    one, two, other = (weights(method.fit(tiny_sd1, data, seed=seed)) for seed in (3, 3, 4))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_lora_is_deterministic_and_leaves_no_adapter_behind(tiny_sd1, data):
    method = SafeText(**FAST | {"epochs": 1}, scope="lora", rank=2)
    kinds = [type(m) for m in tiny_sd1.text_encoders["clip_l"].modules()]
    one, two = (weights(method.fit(tiny_sd1, data, seed=3)) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert [type(m) for m in tiny_sd1.text_encoders["clip_l"].modules()] == kinds


def test_the_reference_is_never_the_wrapped_module(tiny_sd1, data):
    """With LoRA the encoder object itself changes; the remembered values must not."""
    method = SafeText(**FAST | {"lr": 1e-2}, scope="lora", lam=1.0)
    material = method.gather(tiny_sd1, data, seed=0)
    before = {name: p.states.clone() for name, p in material.tau.pieces.items()}
    patch = method.train(tiny_sd1, material)
    assert patch.info["pareto"][-1]["cosine"] < 0.999  # a reference that moved along would say 1
    for name, states in before.items():
        assert torch.equal(material.tau.pieces[name].states, states)


def test_a_patch_does_in_use_what_it_did_in_training(model, data):
    """The last held-out figures of the training run hold for the saved weights."""
    method = SafeText(**FAST, scope="lora")
    material = method.gather(model, data, seed=0)
    patch = method.train(model, material)
    with model.patched(patch):
        again = method.check(model, material)
    assert again["objective"] == pytest.approx(patch.info["pareto"][-1]["objective"], abs=1e-3)


@pytest.mark.parametrize("scope", ["all", "lora"])
def test_ctrl_c_leaves_the_model_as_it_was(tiny_sd1, data, scope):
    before = dict(tiny_sd1.hashes())

    def stop(tick):
        if tick.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SafeText(**FAST, scope=scope).fit(tiny_sd1, data, watch=stop)
    assert tiny_sd1.hashes() == before
    assert not any(p.grad is not None for p in tiny_sd1.text_encoders["clip_l"].parameters())


def test_the_empty_prompt_is_in_every_batch_and_holds(tiny_sd1, data):
    method = SafeText(**FAST)
    material = method.gather(tiny_sd1, data, seed=0)
    batches = list(method.batches(material, 1, torch.Generator()))
    assert len(batches) == method.steps(material) > 1
    assert all(batch.safe[0] == "" and batch.safe.count("") == 1 for batch in batches)
    assert {text for batch in batches for text in batch.unsafe} == {
        p.text for p in material.split.unsafe
    }
    patch = method.train(tiny_sd1, material)
    assert shifts(tiny_sd1, patch, [""]) < shifts(tiny_sd1, patch, SAFE).mean()


def test_gradients_are_numbers_from_the_first_step(model, data):
    for d_u, d_e in product(("euclidean", "neg_abs_cosine"), repeat=2):
        method = SafeText(d_u=d_u, d_e=d_e, anchor=1.0, batch=8)
        material = method.gather(model, data, seed=0)
        rng = torch.Generator().manual_seed(0)
        with method.lend(model, rng) as loan:
            batch = next(method.batches(material, 1, rng))
            method.loss(model, batch, rng).total.backward()
            gradients = [p.grad for p in loan.parameters.values() if p.grad is not None]
        assert gradients and all(g.isfinite().all() for g in gradients)


def test_reductions_pull_at_the_encoder_differently(tiny_sd1, data):
    """And the one that was used is kept with the weights."""
    seen = []
    for reduction in ("flatten", "per_token_mean", "eos_only", "non_pad_only"):
        patch = SafeText(**FAST | {"epochs": 1}, reduction=reduction).fit(tiny_sd1, data)
        assert patch.settings["reduction"] == reduction
        seen.append(torch.cat([w.flatten() for w in weights(patch).values()]))
    for i, one in enumerate(seen):
        assert all(not torch.allclose(one, other, atol=1e-6) for other in seen[i + 1 :])


def test_an_anchor_pulls_unsafe_prompts_to_their_safe_counterpart(model):
    unsafe = PromptSet.of(
        [{"prompt": text, "safe_prompt": "a house by the sea"} for text in UNSAFE], "swords"
    )
    data = TextData(safe=PromptSet.of(SAFE, "safe"), unsafe=unsafe, validation=0.25)
    plain = SafeText(**FAST).fit(model, data)
    anchored = SafeText(**FAST, anchor=1.0).fit(model, data)
    with torch.no_grad():
        goal = model.encode(["a house by the sea"]).states

        def apart(patch):
            with model.patched(patch):
                return (model.encode(UNSAFE).states - goal).flatten(1).norm(dim=1).mean()

        untouched = (model.encode(UNSAFE).states - goal).flatten(1).norm(dim=1).mean()
        assert apart(anchored) < 0.8 * untouched
        assert apart(anchored) < apart(plain)
    assert anchored.info["history"][0].keys() >= {"step", "L_u", "L_e", "L_a"}


def test_without_a_counterpart_the_anchor_is_the_nearest_safe_prompt(tiny_sd1, data):
    material = SafeText(anchor=1.0).gather(tiny_sd1, data, seed=0)
    safe = [p.text for p in material.split.safe]
    assert set(material.anchors) == set(UNSAFE)
    assert set(material.anchors.values()) <= set(safe)
    text = UNSAFE[0]
    assert material.anchors[text] == material.tau.nearest([text], safe)[0]


def test_one_encoder_of_several_can_be_trained_alone(tiny_sdxl, data):
    patch = SafeText(**FAST | {"epochs": 1}, encoders=("clip_g",)).fit(tiny_sdxl, data)
    assert {name.partition(".")[0] for name in patch.full} == {"clip_g"}
    assert patch.info["encoders"] == ["clip_g"]


def test_the_loss_is_on_all_that_the_denoiser_reads(tiny_sdxl, tiny_flux, data):
    def read(model):
        return set(SafeText().gather(model, data, seed=0).tau.pieces)

    assert read(tiny_sdxl) == {"clip_l", "clip_g", "clip_g.pooled"}
    assert read(tiny_flux) == {"t5", "clip_l.pooled"}


def test_layers_leaves_the_embedding_tables_alone(model, data):
    every = SafeText(**FAST | {"epochs": 1}).fit(model, data).full
    layers = SafeText(**FAST | {"epochs": 1}, scope="layers").fit(model, data).full
    left = set(every) - set(layers)
    assert set(layers) < set(every)
    assert all("embed" in name or "shared" in name or "bias" in name for name in left)


def test_training_stops_when_held_out_prompts_stop_improving(tiny_sd1, data):
    patch = SafeText(lr=1e-9, epochs=50, batch=16, perturb=0.0, lead=0).fit(tiny_sd1, data)
    epochs = [point["epoch"] for point in patch.info["pareto"]]
    assert epochs == [0, 1, 2, 3]
    assert patch.info["stopped"]["kept_epoch"] == 1
    assert "for 2 epochs" in patch.info["stopped"]["rule"]


def test_held_out_prompts_are_not_trained_on(tiny_sd1, data):
    material = SafeText(batch=16, variants=0).gather(tiny_sd1, data, seed=0)
    seen = {
        text
        for batch in SafeText(batch=16).batches(material, 1, torch.Generator())
        for text in (*batch.safe, *batch.unsafe)
    }
    held = {p.text for p in (*material.split.safe_check, *material.split.unsafe_check)}
    assert held and not held & seen
    assert len(held) + len(material.split.safe) + len(material.split.unsafe) == len(SAFE + UNSAFE)


def test_a_patch_remembers_how_it_was_made(tiny_sd1, data):
    patch = SafeText(**FAST).fit(tiny_sd1, data, seed=5)
    info = patch.info
    assert patch.method == "safetext" and patch.settings["lam"] == SafeText.lam
    assert info["seed"] == 5 and info["data"] == data.hashes()
    assert info["cost"].keys() >= {"seconds", "peak_memory_mb", "parameters"}
    assert [row["step"] for row in info["history"]] == list(range(1, len(info["history"]) + 1))
    assert info["scale"]["clip_l"] > 0
    assert all(p.keys() >= {"epoch", "lam", "drift", "cosine"} for p in info["pareto"])


def test_a_margin_stops_the_push(tiny_sd1, data):
    free = SafeText(**FAST, lam=2.0).fit(tiny_sd1, data).info["pareto"][-1]["cosine"]
    held = SafeText(**FAST, lam=2.0, margin=-0.95).fit(tiny_sd1, data).info["pareto"][-1]["cosine"]
    assert free < held


def test_a_loss_that_is_no_number_is_an_error_and_changes_nothing(tiny_sd1, data):
    before = dict(tiny_sd1.hashes())
    with pytest.raises(WorkFailed, match="smaller lr"):
        SafeText(lr=1e30, epochs=5, batch=16).fit(tiny_sd1, data)
    assert tiny_sd1.hashes() == before


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"epochs": 0}, "above 0"),
        ({"batch": 2}, "at least 4"),
        ({"rank": 0}, "at least 1"),
    ],
)
def test_wrong_settings_are_refused_with_a_hint(wrong, says):
    with pytest.raises(BadInput, match=says):
        SafeText(**wrong)


def test_an_unknown_choice_is_refused_with_a_hint():
    method = SafeText()
    object.__setattr__(method, "reduction", "flaten")  # past the tests' own type checks
    with pytest.raises(BadInput, match="reduction: .* Did you mean 'flatten'"):
        method.__post_init__()


def test_an_unknown_encoder_is_refused_with_a_hint(tiny_sd1, data):
    with pytest.raises(BadInput, match="Did you mean 'clip_l'"):
        SafeText(encoders=("clip_1",)).fit(tiny_sd1, data)


def test_a_side_without_prompts_is_refused(tiny_sd1):
    data = TextData(safe=PromptSet("safe", ()), unsafe=PromptSet.of(UNSAFE, "swords"))
    with pytest.raises(BadInput, match="safe side has 0"):
        SafeText().fit(tiny_sd1, data)


def test_several_unsafe_sets_are_learnt_together(tiny_sd1):
    two = [PromptSet.of(UNSAFE[:6], "one"), PromptSet.of(UNSAFE[6:], "two")]
    data = TextData(safe=PromptSet.of(SAFE, "safe"), unsafe=two)
    patch = SafeText(**FAST | {"epochs": 1}).fit(tiny_sd1, data)
    assert set(patch.info["data"]) == {"safe", "one", "two"}
    assert patch.info["split"]["unsafe"] + patch.info["split"]["unsafe_check"] == len(UNSAFE)


def test_a_lead_leaves_the_stationary_start_towards_the_anchors(tiny_sd1, data):
    pull = dict(**FAST | {"lead": 1, "epochs": 2}, d_e="euclidean", perturb=0.0)
    patch = SafeText(**pull).fit(tiny_sd1, data)
    assert patch.info["pareto"][-1]["cosine"] < 0.999
    first, last = patch.info["history"][0], patch.info["history"][-1]
    assert "L_a" in first and "L_a" not in last


def test_variants_join_the_safe_side_without_the_suspicious_ones(tiny_sd1, data):
    material = SafeText(variants=3).gather(tiny_sd1, data, seed=0)
    written = [p.text for p in material.split.safe]
    made = material.held[len(written) :]
    assert list(material.held[: len(written)]) == written
    assert len(made) == round(0.8 * 3 * len(written))
    assert len(set(made) - set(written)) > len(made) // 2
    assert SafeText(variants=3).gather(tiny_sd1, data, seed=0).held == material.held


def test_the_learning_rate_follows_the_encoders_width(tiny_sd1):
    assert SafeText().rate(tiny_sd1) == 3e-4
    assert SafeText(lr=0.1).rate(tiny_sd1) == 0.1


def test_settings_survive_a_round_trip():
    method = SafeText(lam=0.1, encoders=("clip_l",), margin=-0.5)
    assert SafeText(**dataclasses.asdict(method)) == method


def test_a_batch_may_lack_one_side(tiny_sd1, data):
    method = SafeText()
    material = method.gather(tiny_sd1, data, seed=0)
    loss = method._terms  # the validation split's sides differ in length
    batch = Batch(("",), (), material, 0.0)
    from safelight.align.safetext import _read

    terms = loss(_read(tiny_sd1, batch), batch)
    assert terms["L_u"].shape == (1,) and terms["L_e"].shape == (0,)
