"""States on the way of a painting are the sampler's own, and so are the predictions."""

import pytest
import torch

from safelight.models import sampling
from safelight.training.rollout import rollouts

PROMPTS = ["a cat", "a dog in the park", "a red car"]


def made(model, **settings):
    settings = dict(steps=4, guidance=3.0, keep=4, rng=torch.Generator().manual_seed(1)) | settings
    return rollouts(model, PROMPTS, **settings)


def test_every_state_has_the_predictions_of_its_own_prompt(tiny_model):
    at = made(tiny_model)
    assert sorted(at.prompts) == sorted(PROMPTS * 4)
    own = 3.0 if tiny_model.distilled else None
    with torch.no_grad():
        told = tiny_model.encode(at.prompts)
        e_p = tiny_model.predict(at.z_t, at.t, told, guidance=own)
        away = sampling.repeat(tiny_model.empty(1), len(at))
        e_0 = tiny_model.predict(at.z_t, at.t, away, guidance=own)
    assert torch.allclose(at.e_p, e_p, atol=1e-4)
    assert torch.allclose(at.e_0, e_0, atol=1e-4)
    assert (e_p - e_0).abs().max() > 1e-4


def test_the_first_state_is_pure_noise_at_the_samplers_first_time(tiny_model):
    at = made(tiny_model)
    shape = tiny_model.latent_shape(tiny_model.default_size)
    scheduler = tiny_model.schedule(4, (1, *shape))
    assert set(at.t.tolist()) == set(scheduler.timesteps.float().tolist())
    first = at.z_t[at.t == scheduler.timesteps[0].float()]
    drawn = torch.randint(2**31, (3,), generator=torch.Generator().manual_seed(1)).tolist()
    noise = sampling.noise(shape, drawn) * getattr(scheduler, "init_noise_sigma", 1.0)
    if hasattr(scheduler, "scale_model_input"):
        noise = scheduler.scale_model_input(noise, scheduler.timesteps[0])
    assert torch.allclose(first, noise, atol=1e-5)


def test_the_painting_is_the_one_that_sampling_makes(tiny_sd1):
    """One step further from the last state is the picture of `sample` with the same seed."""
    at = made(tiny_sd1)
    scheduler = tiny_sd1.schedule(4, at.z_t.shape)
    last = scheduler.timesteps[-1]
    rows = [i for i, text in enumerate(at.prompts) if text == PROMPTS[1] and at.t[i] == last]
    one = at[torch.tensor(rows)]
    z = scheduler.step(one.e_0 + 3.0 * (one.e_p - one.e_0), last, one.z_t).prev_sample
    drawn = torch.randint(2**31, (3,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        told = tiny_sd1.encode([PROMPTS[1]])
        sampled = tiny_sd1.sample(told, seed=[drawn[1]], steps=4, guidance=3.0)
    assert torch.allclose(z, sampled, atol=1e-5)


def test_some_states_of_each_painting_are_kept_at_different_steps(tiny_sd1):
    at = made(tiny_sd1, keep=2)
    assert sorted(at.prompts) == sorted(PROMPTS * 2)
    for text in PROMPTS:
        assert len({at.t[i].item() for i, name in enumerate(at.prompts) if name == text}) == 2


def test_batches_make_no_difference(tiny_model):
    one, two = made(tiny_model), made(tiny_model, batch=2)
    order = [sorted(range(12), key=lambda i: (s.prompts[i], s.t[i].item())) for s in (one, two)]
    a, b = (s[torch.tensor(rows)] for s, rows in zip((one, two), order, strict=True))
    assert a.prompts == b.prompts
    assert torch.allclose(a.z_t, b.z_t, atol=1e-4) and torch.allclose(a.e_p, b.e_p, atol=1e-4)


def test_draw_gives_each_prompt_a_state_of_its_own(tiny_sd1):
    at = made(tiny_sd1)
    rng = torch.Generator().manual_seed(0)
    asked = ["a red car", "a cat", "a red car"]
    drawn = [at.draw(asked, rng) for _ in range(6)]
    assert all(one.prompts == tuple(asked) for one in drawn)
    assert len({one.t[0].item() for one in drawn}) > 1


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_without_guidance_the_neutral_prediction_is_asked_for(tiny_sd1, guidance):
    at = made(tiny_sd1, guidance=guidance)
    assert (at.e_p - at.e_0).abs().max() > 1e-4
