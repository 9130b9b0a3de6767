"""Latent inversion finds start noise that leads back to a picture, without any text."""

import pytest
import torch
from denoising import BY_ID, PROMPTS, dented, pictures, search

from safelight.attack.control import controlled
from safelight.attack.latent_inversion import LatentInversion, Sampler
from safelight.errors import BadInput
from safelight.flow import Condition
from safelight.guard.base import Guard, Guarded
from safelight.models import sampling
from safelight.models.tiny import tiny

STEPS = {"steps": 4}


def inverted(model, z, target=None, **settings):
    hunt = search(target or model, sampling=STEPS)
    return LatentInversion(**settings).invert(z, Sampler(hunt), hunt)


def sample(model, start, **settings):
    with torch.no_grad():
        return model.sample(model.encode([""] * len(start)), latents=start, **STEPS, **settings)


def reachable(model):
    """What the model makes of some noise without text, so that there is a noise to be found."""
    noise = sampling.noise(model.latent_shape(model.default_size), [1, 2])
    return noise, sample(model, noise)


def test_the_sampler_is_the_models_own_step_by_step(tiny_model):
    noise, z = reachable(tiny_model)
    sampler = Sampler(search(tiny_model, sampling=STEPS))
    here = noise / sampler.scale * sampler.sigma
    with torch.no_grad():
        for i in range(len(sampler)):
            here = sampler.forward(i, here, sampler.noise(i, here))
    torch.testing.assert_close(here, z, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(sampler.unit(noise / sampler.scale * sampler.sigma), noise)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_every_parametrisation_has_its_step(kind):
    model = tiny("sd1", prediction=kind)
    noise, z = reachable(model)
    sampler = Sampler(search(model, sampling=STEPS))
    here = noise
    with torch.no_grad():
        for i in range(len(sampler)):
            here = sampler.forward(i, here, sampler.noise(i, here))
    torch.testing.assert_close(here, z, atol=1e-4, rtol=1e-3)


def test_forward_and_back_are_inverse_were_the_prediction_known(tiny_model):
    sampler = Sampler(search(tiny_model, sampling=STEPS))
    z, e = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for i in range(len(sampler)):
        back = sampler.back(i, sampler.forward(i, z, e), e)
        torch.testing.assert_close(back, z, atol=1e-3, rtol=1e-3)


def test_the_found_noise_leads_back_to_the_picture():
    model = tiny("sd1", prediction="v_prediction")
    _, z = reachable(model)
    found = sample(model, inverted(model, z, steps=0, fixed=20))
    plain = sample(model, inverted(model, z, steps=0, fixed=1))
    assert (found - z).norm() < 0.02 * z.norm()
    assert (found - z).norm() < 0.5 * (plain - z).norm()


def test_adamw_refines_what_the_fixed_points_leave(tiny_model):
    _, z = reachable(tiny_model)
    sampler = Sampler(search(tiny_model, sampling=STEPS))
    i = 2
    jolt = 0.05 * torch.randn(z.shape, generator=torch.Generator().manual_seed(0))

    def residual(**settings):
        hunt = search(tiny_model, sampling=STEPS)
        attack = LatentInversion(**settings)
        with torch.no_grad():
            start = sampler.back(i, z, sampler.noise(i, z)) + jolt
        refined = attack._refined(i, start, z, sampler, hunt) if attack.steps else start
        with torch.no_grad():
            gap = sampler.forward(i, refined, sampler.noise(i, refined)) - z
        return gap.square().mean((1, 2, 3))

    assert (residual(steps=12, lr=1e-2) < 0.3 * residual(steps=0)).all()


def test_no_text_and_no_weight_takes_part(tiny_model):
    before = tiny_model.hashes()
    attack = LatentInversion(steps=1, pictures=BY_ID)
    for prompt in attack(PROMPTS, tiny_model, sampling=STEPS):
        assert prompt.text == "" and prompt.soft is None and "attack_failed" not in prompt.meta
        assert prompt.latents.shape == (4, 8, 8) and prompt.latents.isfinite().all()
        assert prompt.meta["steps"] == str(len(Sampler(search(tiny_model, sampling=STEPS))))
    assert tiny_model.hashes() == before


def test_the_bench_paints_from_the_found_noise(tiny_sd1):
    found = LatentInversion(steps=0, fixed=3, pictures=BY_ID)(PROMPTS, tiny_sd1, sampling=STEPS)
    shown = Guarded(tiny_sd1).show(found.prompts, [0, 1], **STEPS)
    start = torch.stack([prompt.latents for prompt in found])
    images = tiny_sd1.decode(sample(tiny_sd1, start))
    for outcome, image in zip(shown, images, strict=True):
        torch.testing.assert_close(outcome.image, image, atol=1e-5, rtol=0)


def test_the_search_sees_the_defended_weights(tiny_sd1):
    z = tiny_sd1.encode_images(pictures())
    bare = inverted(tiny_sd1, z, steps=0)
    with tiny_sd1.patched(dented(tiny_sd1)):
        defended = inverted(tiny_sd1, z, steps=0)
    assert (bare - defended).abs().max() > 1e-3


def test_the_search_sees_what_guards_make_of_the_empty_prompt(tiny_sd1):
    class Louder(Guard):
        card = LatentInversion.card

        def edit_condition(self, condition: Condition) -> Condition:
            return condition.edit(lambda encoder, x: 3 * x)

    z = tiny_sd1.encode_images(pictures())
    target = Guarded(tiny_sd1, [Louder()])
    sampler = Sampler(search(target, sampling=STEPS))
    assert sampler.away is not None and Sampler(search(tiny_sd1, sampling=STEPS)).away is None
    assert (inverted(tiny_sd1, z, steps=0) - inverted(tiny_sd1, z, target, steps=0)).abs().max() > 0


def test_a_spent_budget_still_gives_noise_for_every_prompt(tiny_sd1):
    from safelight.attack.base import Budget

    attack = LatentInversion(steps=5, pictures=BY_ID, budget=Budget(steps=7))
    for prompt in attack(PROMPTS, tiny_sd1, sampling=STEPS):
        assert prompt.meta["steps"] == "7" and prompt.latents.isfinite().all()


def test_the_control_aims_at_the_pictures_of_the_undefended_target(tiny_sd1, monkeypatch):
    aims = []
    real = LatentInversion.invert

    def invert(self, z, sampler, hunt):
        aims.append(hunt.model.decode(z))
        return real(self, z, sampler, hunt)

    monkeypatch.setattr(LatentInversion, "invert", invert)
    control = tiny("sd1", seed=4)
    control.vae = tiny_sd1.vae
    with tiny_sd1.patched(dented(tiny_sd1)):
        attack = LatentInversion(steps=0)
        found, taught = controlled(attack, PROMPTS, tiny_sd1, control, sampling=STEPS)
    torch.testing.assert_close(aims[0], aims[1])
    assert not torch.equal(found.prompts[0].latents, taught.prompts[0].latents)


def test_one_picture_less_is_said(tiny_sd1):
    with pytest.raises(Exception, match="no picture for prompt 'two'"):
        LatentInversion(pictures={"one": BY_ID["one"]})(PROMPTS, tiny_sd1, sampling=STEPS)
    with pytest.raises(BadInput, match="fixed"):
        LatentInversion(fixed=0)
