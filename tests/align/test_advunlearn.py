"""AdvUnlearn keeps what its specification says (arXiv:2405.15234), on every family."""

import dataclasses

import pytest
import torch

from safelight.align.advunlearn import AdvUnlearn, Batch
from safelight.align.base import TextData
from safelight.errors import BadInput
from safelight.flow import Written
from safelight.models.sampling import repeat
from safelight.models.soft import PLACEHOLDER
from safelight.models.tiny import tiny
from safelight.prompts import PromptSet
from safelight.training.rollout import rollouts

SAFE = [f"a {thing} in the {where}" for thing in ("cat", "dog", "bird", "house")
        for where in ("park", "street", "sea")]  # fmt: skip
UNSAFE = [f"a {kind} knife in the {where}" for kind in ("red", "big", "small")
          for where in ("park", "street", "sea")]  # fmt: skip
FAST = dict(iterations=6, paintings=6, paint_steps=4, attack_steps=2, batch=2, retain=2, lr=1e-3)
ERASE = FAST | dict(iterations=15, attack_steps=0, lr=3e-3)


@pytest.fixture
def data():
    safe, unsafe = PromptSet.of(SAFE, "safe"), PromptSet.of(UNSAFE, "knives")
    return TextData(safe=safe, unsafe=unsafe, validation=0.25)


def gathered(method, model, data, seed=0):
    return method.gather(model, data, seed=seed)


def first_batch(method, material, seed=0):
    return next(method.batches(material, 1, torch.Generator().manual_seed(seed)))


def gradients(model, method, loss):
    """The gradient of each encoder parameter of a loss made inside a loan."""
    with method.lend(model, torch.Generator()) as loan:
        loss().backward()
        return {n: p.grad.clone() for n, p in loan.parameters.items() if p.grad is not None}


def test_a_concept_is_driven_to_the_target_and_safe_prompts_hold(tiny_model, data):
    method = AdvUnlearn(**ERASE, gamma=1.0)
    material = gathered(method, tiny_model, data)
    before, after = (method.train(tiny_model, material).info["pareto"][i] for i in (0, -1))
    assert after["L_u"] < 0.9 * before["L_u"]
    free = dataclasses.replace(method, gamma=0.0).train(tiny_model, material)
    assert after["L_r"] < free.info["pareto"][-1]["L_r"]


def test_only_text_encoders_change_and_the_model_is_left_as_it_was(tiny_model, data):
    before = dict(tiny_model.hashes())
    patch = AdvUnlearn(**FAST).fit(tiny_model, data)
    assert {name.partition(".")[0] for name in patch.names} <= set(tiny_model.text_encoders)
    assert not any("embed" in name or "shared" in name for name in patch.names)
    assert tiny_model.hashes() == before
    with tiny_model.patched(patch):
        inside = tiny_model.hashes()
    assert {n for n in before if inside[n] != before[n]} == set(tiny_model.text_encoders)


def test_denoiser_and_original_encoding_get_no_gradient(tiny_model, data):
    method = AdvUnlearn(**FAST, quiet=0.0)
    material = gathered(method, tiny_model, data)
    states = material.concepts
    kept = [x.clone() for x in (states.z_t, states.e_p, states.e_0)]
    method.train(tiny_model, material)
    assert all(p.grad is None for p in tiny_model.denoiser.parameters())
    assert not any(x.requires_grad for x in (states.z_t, states.e_p, states.e_0))
    for now, then in zip((states.z_t, states.e_p, states.e_0), kept, strict=True):
        assert torch.equal(now, then)


def test_states_are_painted_with_the_original_encoding(tiny_sd1, data):
    """Also when the model wears a patch while it is trained: gather runs before the loan."""
    method = AdvUnlearn(**FAST)
    material = gathered(method, tiny_sd1, data)
    at = material.concepts
    with torch.no_grad():
        told = tiny_sd1.encode(at.prompts)
        e_p = tiny_sd1.predict(at.z_t, at.t, told)
        e_0 = tiny_sd1.predict(at.z_t, at.t, repeat(tiny_sd1.empty(1), len(at)))
    assert torch.allclose(at.e_p, e_p, atol=1e-5)
    assert torch.allclose(at.e_0, e_0, atol=1e-5)
    assert not torch.allclose(e_p, e_0, atol=1e-5)


def test_without_retain_and_attack_a_step_is_esd_on_the_text_encoder(tiny_model, data):
    """Against ESD written out: target 2 e_0 - e_p, mean squared error, Adam on the encoder."""
    method = AdvUnlearn(**FAST | {"attack_steps": 0}, gamma=0.0)
    material = gathered(method, tiny_model, data)
    batch = first_batch(method, material)
    rng = torch.Generator().manual_seed(7)
    ours = gradients(tiny_model, method, lambda: method.loss(tiny_model, batch, rng).total)

    at = material.concepts.draw(batch.unsafe, torch.Generator().manual_seed(7))
    own = 3.0 if tiny_model.distilled else None

    def esd():
        said = tiny_model.predict(at.z_t, at.t, tiny_model.encode(at.prompts), guidance=own)
        return (said - (2 * at.e_0 - at.e_p)).square().mean()

    theirs = gradients(tiny_model, method, esd)
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-6), name

    attacked = dataclasses.replace(method, attack_steps=1, quiet=0.0)  # the control
    again = first_batch(attacked, dataclasses.replace(material, attack_steps=1))
    other = gradients(tiny_model, attacked, lambda: attacked.loss(tiny_model, again, rng).total)
    assert any(not torch.allclose(other[n], theirs[n], rtol=1e-3, atol=1e-6) for n in ours)


def test_losses_start_at_zero_for_retained_and_at_esds_value_for_concepts(tiny_model, data):
    method = AdvUnlearn(**FAST)
    material = gathered(method, tiny_model, data)
    start = method.check(tiny_model, material)
    assert start["L_r"] == pytest.approx(0, abs=1e-6)
    at = material.concepts_check
    apart = (at.e_p - at.e_0).square().mean().item()
    assert apart > 0
    assert start["L_u"] == pytest.approx((1 + method.eta) ** 2 * apart, rel=1e-3)


def test_the_target_moves_with_eta(tiny_sd1, data):
    at = gathered(AdvUnlearn(**FAST), tiny_sd1, data).concepts
    assert torch.equal(AdvUnlearn(eta=0.0).target(at), at.e_0)
    assert torch.allclose(AdvUnlearn(eta=1.0).target(at), 2 * at.e_0 - at.e_p)
    shifted = at.e_p - 2 * (at.e_p - at.e_0)  # the other convention, at its eta = 2
    assert torch.allclose(AdvUnlearn(eta=1.0).target(at), shifted, atol=1e-6)


def test_noise_and_velocity_have_the_same_target(data):
    """v = sqrt(a) eps - sqrt(1 - a) z is affine in eps at one z_t, and the weights sum to 1."""
    model = tiny("sd1", prediction="v_prediction")
    at = gathered(AdvUnlearn(**FAST), model, data).concepts
    a = model.scheduler.alphas_cumprod[at.t.long()][:, None, None, None]

    def eps(v):
        return a.sqrt() * v + (1 - a).sqrt() * at.z_t

    method = AdvUnlearn(eta=1.0)
    in_eps = dataclasses.replace(at, e_p=eps(at.e_p), e_0=eps(at.e_0))
    assert torch.allclose(eps(method.target(at)), method.target(in_eps), atol=1e-5)
    wrong = eps(at.e_0 - 2 * (at.e_p - at.e_0)) - method.target(in_eps)
    assert wrong.abs().max() > 1e-4
    assert AdvUnlearn(**FAST).fit(model, data).full


@pytest.mark.parametrize("variant", ["full", "fast"])
def test_the_attack_lowers_its_loss_on_states_it_has_not_seen(tiny_model, data, variant):
    """On an erased encoder: the found tokens bring the original prediction back at new states."""
    patch = AdvUnlearn(**ERASE, gamma=0.0).fit(tiny_model, data)
    attacker = AdvUnlearn(
        **FAST | {"attack_steps": 25, "batch": 4}, variant=variant, attack_lr=0.1, quiet=0.0
    )
    seen = gathered(attacker, tiny_model, data)
    batch = first_batch(attacker, seen)
    unseen = rollouts(
        *(tiny_model, batch.unsafe * 4), steps=4, guidance=3.0, keep=1,
        rng=torch.Generator().manual_seed(9),
    )  # fmt: skip
    places = [batch.unsafe.index(text) for text in unseen.prompts]

    def loss(delta):
        with torch.no_grad():
            placed = {name: value[places] for name, value in delta.items()}
            said = attacker.predicted(tiny_model, unseen, placed)
        return (said - unseen.e_p).square().mean().item()

    def rng():
        return torch.Generator().manual_seed(3)

    with tiny_model.patched(patch):
        start = attacker.attack(
            tiny_model, dataclasses.replace(batch, material=_without_steps(seen)), rng()
        )
        found = attacker.attack(tiny_model, batch, rng())
        assert loss(found) < loss(start)


def _without_steps(material):
    return dataclasses.replace(material, attack_steps=0)


def test_a_soft_token_reads_as_the_word_whose_embedding_it_is(tiny_sd1, data):
    """The embedding enters before positions, under the stock encoder's own causal mask."""
    method = AdvUnlearn(**FAST)
    at = gathered(method, tiny_sd1, data).concepts[torch.tensor([0, 1])]
    ids = tiny_sd1.tokenizers["clip_l"]("cat", add_special_tokens=False).input_ids
    word = tiny_sd1.token_table("clip_l").weight[ids]
    with torch.no_grad():
        soft = method.predicted(tiny_sd1, at, {"clip_l": word.expand(2, -1, -1)})
        told = tiny_sd1.encode([f"cat {text}" for text in at.prompts])
        written = tiny_sd1.predict(at.z_t, at.t, told)
        without = method.predicted(tiny_sd1, at)
    assert torch.allclose(soft, written, atol=1e-5)
    assert not torch.allclose(soft, without, atol=1e-5)


def test_the_end_mark_moves_and_the_length_stays(tiny_sdxl):
    """Also for a prompt that fills the encoder: its last word goes, the end mark stays."""
    token = {name: torch.zeros(1, 32) for name in tiny_sdxl.text_encoders}
    end = tiny_sdxl.tokenizers["clip_g"].eos_token_id
    for text in ("a knife", "knife " * 90):
        for name in tiny_sdxl.text_encoders:
            plain, mask = tiny_sdxl.tokenize(name, [text])
            (ids, moved), _ = tiny_sdxl._read(
                name, Written((f"{PLACEHOLDER} {text}",), (token,), (None,), (None,))
            )
            assert ids.shape == plain.shape
            assert moved.sum() == min(mask.sum() + 1, 77)
            assert ids[0, moved.sum() - 1] == end


def test_the_attack_begins_after_the_quiet_part(tiny_sd1, data):
    method = AdvUnlearn(**FAST | {"iterations": 10}, quiet=0.4, attack_every=3)
    material = gathered(method, tiny_sd1, data)
    batches = []
    for batch in method.batches(material, 1, torch.Generator().manual_seed(0)):
        batches.append(batch)
        method.loss(tiny_sd1, batch, torch.Generator().manual_seed(0))
    assert [b.attacks for b in batches] == [False] * 4 + [True] * 6
    assert [b.fresh for b in batches] == [False] * 4 + [True, False, True, False, False, True]
    calm = AdvUnlearn(**FAST | {"attack_steps": 0}, quiet=0.0)
    assert not first_batch(calm, gathered(calm, tiny_sd1, data)).attacks


def test_the_latest_tokens_are_where_the_next_attack_starts(tiny_sd1, data):
    method = AdvUnlearn(**FAST, attack_init="latest", quiet=0.0)
    batch = first_batch(method, gathered(method, tiny_sd1, data))
    rng = torch.Generator().manual_seed(0)
    table = tiny_sd1.token_table("clip_l").weight
    first = method._first(tiny_sd1, "clip_l", batch, rng)
    assert all((table == row).all(1).any() for row in first.flatten(0, 1))  # words
    batch.latest["clip_l"] = first + 1
    assert torch.equal(method._first(tiny_sd1, "clip_l", batch, rng), first + 1)
    again = dataclasses.replace(method, attack_init="random")
    assert not torch.equal(again._first(tiny_sd1, "clip_l", batch, rng), first + 1)


def test_uncleared_gradients_add_up_as_in_the_released_code(tiny_sd1, data):
    """After one step both are alike; from the second on they part."""

    def found(steps, clear):
        method = AdvUnlearn(**FAST | {"attack_steps": steps}, quiet=0.0, clear=clear)
        batch = first_batch(method, gathered(method, tiny_sd1, data))
        return method.attack(tiny_sd1, batch, torch.Generator().manual_seed(1))["clip_l"]

    assert torch.equal(found(1, True), found(1, False))
    assert not torch.allclose(found(6, True), found(6, False), atol=1e-6)


def test_fast_takes_steps_of_one_size(tiny_sd1, data):
    def moved(variant):
        method = AdvUnlearn(**FAST | {"attack_steps": 2}, quiet=0.0, variant=variant)
        batch = first_batch(method, gathered(method, tiny_sd1, data))
        start = method._first(tiny_sd1, "clip_l", batch, torch.Generator().manual_seed(1))
        end = method.attack(tiny_sd1, batch, torch.Generator().manual_seed(1))["clip_l"]
        return (end - start).abs() / method.attack_lr

    sizes = moved("fast")  # Adam on two signs: 2 where they agree, else about 1 - 0.05
    assert (((sizes - 2).abs() < 0.02) | ((sizes - 1).abs() < 0.1)).all()
    assert not (((moved("full") - 2).abs() < 0.02) | ((moved("full") - 1).abs() < 0.1)).all()


def test_the_attack_leaves_no_gradient_in_the_encoder(tiny_sd1, data):
    method = AdvUnlearn(**FAST, quiet=0.0)
    batch = first_batch(method, gathered(method, tiny_sd1, data))
    with method.lend(tiny_sd1, torch.Generator()) as loan:
        found = method.attack(tiny_sd1, batch, torch.Generator().manual_seed(0))
        assert all(p.grad is None for p in loan.parameters.values())
    assert not found["clip_l"].requires_grad


def test_a_patch_fits_another_models_encoder_of_the_same_weights(tiny_sd1, data):
    """The encoder moves to another U-Net: only its own parameters are in the patch."""
    other = tiny("sd1", seed=1)
    patch = AdvUnlearn(**FAST).fit(tiny_sd1, data)
    encoder = tiny_sd1.text_encoders["clip_l"].state_dict()
    other.text_encoders["clip_l"].load_state_dict(encoder)
    with torch.no_grad():
        before = other.encode(UNSAFE).states
        with tiny_sd1.patched(patch), other.patched(patch, force=True):
            assert torch.equal(tiny_sd1.encode(UNSAFE).states, other.encode(UNSAFE).states)
            assert not torch.equal(other.encode(UNSAFE).states, before)


def test_the_same_seed_gives_the_same_patch_and_another_seed_another(tiny_sd1, data):
    method = AdvUnlearn(**FAST, attack_init="latest")
    one, two, other = (method.fit(tiny_sd1, data, seed=seed).full for seed in (3, 3, 4))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_one_encoder_of_several_can_be_trained_alone(tiny_sdxl, data):
    patch = AdvUnlearn(**FAST, encoders=("clip_g",)).fit(tiny_sdxl, data)
    assert {name.partition(".")[0] for name in patch.full} == {"clip_g"}
    assert patch.info["encoders"] == ["clip_g"]


def test_categories_take_turns(tiny_sd1):
    rows = [{"prompt": f"a knife {i}", "category": "a"} for i in range(12)]
    few = [{"prompt": f"a skull {i}", "category": "b"} for i in range(4)]
    data = TextData(
        safe=PromptSet.of(SAFE, "safe"),
        unsafe=[PromptSet.of(rows, "one"), PromptSet.of(few, "two")],
    )
    painted = gathered(AdvUnlearn(**FAST), tiny_sd1, data).concepts.prompts
    seen = {text for text in painted if "skull" in text}
    assert len(seen) == 3 and len(set(painted)) == 6


def test_named_concepts_take_the_place_of_the_prompts(tiny_sd1, data):
    method = AdvUnlearn(**FAST, concepts=("knife", "bomb"))
    material = gathered(method, tiny_sd1, data)
    assert set(material.concepts.prompts) == {"knife", "bomb"}
    assert set(gathered(AdvUnlearn(**FAST), tiny_sd1, data).concepts.prompts) <= set(UNSAFE)
    assert method.train(tiny_sd1, material).full


def test_the_empty_prompt_is_among_the_retained(tiny_sd1, data):
    painted = gathered(AdvUnlearn(**FAST), tiny_sd1, data).retained.prompts
    assert painted.count("") == len(painted) // 2  # one in retain=2


def test_held_out_prompts_are_not_trained_on(tiny_sd1, data):
    material = gathered(AdvUnlearn(**FAST | {"paintings": 40}), tiny_sd1, data)
    assert not set(material.concepts.prompts) & set(material.concepts_check.prompts)
    shared = set(material.retained.prompts) & set(material.retained_check.prompts)
    assert shared == {""}


def test_small_encoders_take_fewer_steps(tiny_sd1, data):
    info = AdvUnlearn(paintings=2, paint_steps=2, iterations=1).fit(tiny_sd1, data).info
    assert info["attack_steps"] == 4 and info["iterations"] == 1
    method = AdvUnlearn(paintings=2, paint_steps=2)
    assert gathered(method, tiny_sd1, data).iterations == 300
    published = type("Large", (AdvUnlearn,), {"small": lambda self, model: False})
    material = gathered(published(paintings=2, paint_steps=2), tiny_sd1, data)
    assert (material.iterations, material.attack_steps) == (1000, 30)


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"attack_steps": -1}, "attack_steps must be at least 0"),
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"retain": 0}, "retain must be at least 1"),
        ({"batch": 0}, "above 0"),
    ],
)
def test_wrong_settings_are_refused_with_a_hint(wrong, says):
    with pytest.raises(BadInput, match=says):
        AdvUnlearn(**wrong)


def test_an_unknown_choice_is_refused_with_a_hint():
    method = AdvUnlearn()
    object.__setattr__(method, "variant", "fats")  # past the tests' own type checks
    with pytest.raises(BadInput, match="variant: .* Did you mean 'fast'"):
        method.__post_init__()


@pytest.mark.parametrize("concept", ["", "  "])
def test_a_concept_without_tokens_is_refused(tiny_model, data, concept):
    with pytest.raises(BadInput, match="has no token that .* reads"):
        AdvUnlearn(**FAST, concepts=("knife", concept)).fit(tiny_model, data)


def test_no_prompts_to_retain_is_refused(tiny_sd1, data):
    empty = dataclasses.replace(data, safe=PromptSet("none", ()))
    with pytest.raises(BadInput, match="the safe side has 0 prompt"):
        AdvUnlearn(**FAST).fit(tiny_sd1, empty)


def test_settings_survive_a_round_trip():
    method = AdvUnlearn(variant="fast", concepts=("knife",), clear=False)
    assert AdvUnlearn(**dataclasses.asdict(method)) == method


def test_a_batch_holds_what_an_iteration_needs(tiny_sd1, data):
    method = AdvUnlearn(**FAST)
    batch = first_batch(method, gathered(method, tiny_sd1, data))
    assert isinstance(batch, Batch)
    assert len(batch.unsafe) == 2 and len(batch.retain) == 2
