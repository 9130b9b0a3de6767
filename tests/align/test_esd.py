"""ESD: the target and its two conventions, what is trained, and where the states come from."""

import json
import math

import pytest
import torch

from safelight.align.base import TextData
from safelight.align.esd import ESD, Batch, belongs, named, target, trainable
from safelight.cards import entry
from safelight.errors import BadInput, Unsupported
from safelight.flow import Prompt
from safelight.models.patch import Patch
from safelight.models.tiny import tiny
from safelight.names import find
from safelight.prompts import PromptSet
from safelight.training.rollout import States
from safelight.training.weights import full

FAMILIES = ESD.card.families
QUICK = dict(concepts=("knife", "skull"), iterations=2, paint_steps=2, paintings=2, lr=1e-3)
PARTS = ("x", "strict", "u", "self", "all")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=FAMILIES)
def model(request):
    return tiny(request.param)


def at_first(method, model, seed=0):
    """A state of the first batch."""
    material = method.gather(model, None, seed=seed)
    batch = next(method.batches(material, 1, rng(seed)))
    return method.states(model, batch, rng(seed))


# The loss


def test_the_target_is_the_neutral_prediction_and_as_far_beyond_it():
    e_p, e_0 = torch.tensor([[3.0, -1.0]]), torch.tensor([[1.0, 1.0]])
    assert torch.equal(target(e_p, e_0, 0.0), e_0)
    assert torch.equal(target(e_p, e_0, 1.0), 2 * e_0 - e_p)
    assert target(e_p, e_0, 3.0).tolist() == [[-5.0, 7.0]]


@pytest.mark.parametrize("eta", [0.0, 1.0, 3.0])
def test_the_later_scripts_convention_is_one_more_from_the_concept(eta):
    e_p, e_0 = torch.randn(2, 4, 8, 8, generator=rng())
    torch.testing.assert_close(target(e_p, e_0, eta), e_p - (eta + 1) * (e_p - e_0))


def test_the_loss_is_that_of_the_formula(tiny_sd1, monkeypatch):
    z = torch.zeros(1, 4, 8, 8)
    at = States(("knife",), z, torch.tensor([500.0]), z + 0.5, z + 0.25)
    monkeypatch.setattr(type(tiny_sd1), "predict", lambda self, z_t, t, c: z_t + 0.125)
    # [0.25 - 2 (0.5 - 0.25)] = -0.25; (0.125 + 0.25)^2
    assert ESD(**QUICK, eta=2.0).errors(tiny_sd1, at).item() == pytest.approx(0.140625)


@pytest.mark.parametrize("painter", ["edited", "frozen"])
@pytest.mark.parametrize("eta", [0.0, 1.0, 2.0])
def test_it_starts_at_the_squared_guidance_times_one_and_eta_squared(model, eta, painter):
    method = ESD(**QUICK, eta=eta, painter=painter)
    at = at_first(method, model)
    start = (at.e_p - at.e_0).square().mean().item()
    assert start > 0
    found = method.errors(model, at).mean().item()
    assert found == pytest.approx((1 + eta) ** 2 * start, rel=1e-3)


def test_only_the_prediction_under_the_concept_has_a_gradient(tiny_sd1):
    method = ESD(**QUICK)
    with full(tiny_sd1, ["denoiser"]):
        at = at_first(method, tiny_sd1)
        assert not any(x.requires_grad for x in (at.z_t, at.e_p, at.e_0))
        assert method.errors(tiny_sd1, at).requires_grad


# What is trained


@pytest.mark.parametrize("part", PARTS)
def test_nothing_but_the_part_changes_and_the_model_is_left_as_it_was(model, part):
    before = {name: p.detach().clone() for name, p in model.parameters().items()}
    patch = ESD(**QUICK, part=part).fit(model)
    assert set(patch.full) == trainable(model, part) and not patch.low_rank
    assert any(not torch.equal(value, before[name]) for name, value in patch.full.items())
    assert all(torch.equal(p, before[name]) for name, p in model.parameters().items())


def test_the_parts_of_stable_diffusion_1_have_the_published_sizes():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    every = {f"denoiser.{name}": p.numel() for name, p in unet.named_parameters()}

    def size(part):
        return sum(n for name, n in every.items() if belongs(name, part)) / 1e6

    assert size("x") == pytest.approx(43.96, abs=0.005)
    assert size("self") == pytest.approx(49.57, abs=0.005)
    assert size("strict") == pytest.approx(19.17, abs=0.005)
    assert sum(belongs(name, "strict") for name in every) == 32
    assert size("all") == pytest.approx(859.52, abs=0.005)
    left_out = {name for name in every if not belongs(name, "u")}
    assert {"denoiser.conv_out.weight", "denoiser.time_embedding.linear_1.weight"} <= left_out
    assert all(belongs(name, "u") for name in every if ".attn1." in name or ".resnets." in name)


def test_a_denoiser_without_such_attention_is_refused(tiny_sd1, monkeypatch):
    monkeypatch.setattr("safelight.align.esd.trainable", lambda model, part: frozenset())
    with pytest.raises(Unsupported, match="part=x; attn2"):
        ESD(**QUICK, part="x").fit(tiny_sd1)


def test_other_families_are_refused():
    with pytest.raises(Unsupported, match="esd supports sd1, sdxl"):
        ESD(**QUICK).fit(tiny("flux"))


# Where the states come from


def test_a_state_before_the_first_step_is_noise_as_the_denoiser_is_given_it(model):
    method = ESD(**QUICK | {"paint_steps": 1, "paintings": 40}, painter="frozen")
    states = method.gather(model, None, seed=0).states
    scheduler = model.schedule(1, model.latent_shape(model.default_size))
    t = scheduler.timesteps[0]
    one = torch.ones(1) * scheduler.init_noise_sigma
    scale = scheduler.scale_model_input(one, t) if hasattr(scheduler, "scale_model_input") else one
    assert set(states.t.tolist()) == {float(t)}
    assert states.z_t.std().item() == pytest.approx(scale.item(), rel=0.05)
    assert abs(states.z_t.mean().item()) < 0.05


def test_the_time_is_that_of_the_samplers_step(model):
    states = ESD(**QUICK | {"paint_steps": 4}, painter="frozen").gather(model, None, seed=0).states
    known = set(model.schedule(4, model.latent_shape(model.default_size)).timesteps.tolist())
    assert len(set(states.t.tolist())) == 4 and set(states.t.tolist()) <= known


def test_the_edited_model_paints_and_the_untouched_one_says_what_is_the_target(tiny_sd1):
    states = {}
    for painter in ("edited", "frozen"):
        method = ESD(**QUICK, painter=painter)
        material = method.gather(tiny_sd1, None, seed=0)
        with method.lend(tiny_sd1, rng()) as loan, torch.no_grad():
            for p in loan.parameters.values():
                p.add_(torch.randn(p.shape, generator=rng(1)) * 0.05)
            at = method.states(tiny_sd1, Batch(("knife",) * 4, material), rng(2))
            with tiny_sd1.unpatched():
                e_p = tiny_sd1.predict(at.z_t, at.t, tiny_sd1.encode(at.prompts))
        torch.testing.assert_close(at.e_p, e_p, rtol=1e-3, atol=1e-4)
        states[painter] = at
    plain = ESD(**QUICK)
    material = plain.gather(tiny_sd1, None, seed=0)
    own = plain.states(tiny_sd1, Batch(("knife",) * 4, material), rng(2))
    moved = states["edited"]
    assert torch.equal(own.t, moved.t) and not torch.allclose(own.z_t, moved.z_t)


# A whole training


@pytest.mark.parametrize("painter", ["edited", "frozen"])
def test_a_concept_is_driven_towards_the_target(tiny_sd1, painter):
    settings = QUICK | dict(iterations=30, concepts=("knife",), painter=painter, batch=4, lr=1e-4)
    settings["eta"] = 100.0  # a random network hardly reads its prompt
    patch = ESD(**settings, part="all").fit(tiny_sd1)
    first, last = patch.info["pareto"][0], patch.info["pareto"][-1]
    assert last["objective"] < 0.7 * first["objective"]
    assert len(patch.info["history"]) == 30 and patch.info["concepts"] == ["knife"]


def test_the_same_seed_gives_the_same_patch_and_it_survives_a_file(model, tmp_path):
    one, two, other = (ESD(**QUICK).fit(model, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(value, two.full[name]) for name, value in one.full.items())
    assert any(not torch.equal(value, other.full[name]) for name, value in one.full.items())
    one.save(tmp_path / "patch")
    back = Patch.load(tmp_path / "patch")
    held = {k: tuple(v) if isinstance(v, list) else v for k, v in back.settings.items()}
    assert back.method == "esd" and ESD(**held) == ESD(**QUICK)
    assert json.loads(json.dumps(one.info)) == back.info
    names = set(dict(model.denoiser.named_parameters()))
    assert {name.removeprefix("denoiser.") for name in back.full} <= names
    with model.patched(back), torch.no_grad():
        model(["a knife"], steps=1)


def test_its_card_is_complete():
    seen = entry("align", "esd")
    assert find("align", "esd") is ESD and seen.card == ESD.card
    assert seen.card.source in seen.about and all(setting.help for setting in seen.settings)


# What is removed


def test_concepts_are_what_unsafe_prompts_have_and_safe_ones_have_not(tiny_sd1):
    rows = [
        {"prompt": "a long knife at night", "safe_prompt": "a fish at night", "category": "x"},
        {"prompt": "one skull, very large", "safe_prompt": "one cup, very large", "category": "x"},
        {"prompt": "the long knife here", "safe_prompt": "the fish here", "category": "x"},
    ]
    found = PromptSet.of(rows, "unsafe")
    assert named(tuple(found)) == ("long knife", "skull")
    assert named((Prompt(id="0", text="a riot"),)) == ("a riot",)
    data = TextData(safe=PromptSet.of(["a cat"], "safe"), unsafe=found)
    method = ESD(**QUICK | {"concepts": ()})
    patch = method.fit(tiny_sd1, data)
    assert patch.info["concepts"] == ["long knife", "skull"] and "unsafe" in patch.info["data"]
    assert patch.info["categories"] == ["x"]


def test_every_concept_has_its_turn(tiny_sd1):
    method = ESD(**QUICK | {"iterations": 6})
    material = method.gather(tiny_sd1, None, seed=0)
    said = [batch.concepts for batch in method.batches(material, 1, rng())]
    assert sorted(said) == [("knife",)] * 3 + [("skull",)] * 3


@pytest.mark.parametrize(
    "settings, says",
    [
        (dict(iterations=0), "iterations must be at least 1"),
        (dict(eta=-1.0), "eta must be 0 or more"),
        (dict(eta=math.nan), "eta must be 0 or more"),
        (dict(concepts=("beer", " ")), "a concept is empty"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, says):
    with pytest.raises(BadInput, match=says):
        ESD(**QUICK | settings)


def test_no_concept_is_too_few(tiny_sd1):
    with pytest.raises(BadInput, match="needs names of what is to be removed"):
        ESD().fit(tiny_sd1)
