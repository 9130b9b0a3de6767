"""The handle's promises, on every family: reading prompts, painting, noising."""

import logging
from dataclasses import replace

import pytest
import torch

from safelight.errors import BadInput, SafelightError, Unsupported
from safelight.models.base import texts
from safelight.models.sampling import join, repeat
from safelight.models.tiny import tiny

SMALL = dict(steps=2, size=(16, 16))


def stacked(outcomes):
    return torch.stack([outcome.image for outcome in outcomes])


# Text


def test_encode_joins_the_encoders_as_the_layout_says(tiny_model):
    seen = tiny_model.encode(["a cat", "", "a very long story " * 5])
    tokens, dims = seen.states.shape[1:]
    assert max(span.tokens.stop for span in seen.layout.values()) == tokens
    assert max(span.dims.stop for span in seen.layout.values()) <= dims
    for name in seen.encoders:
        assert seen.stream(name).abs().sum() > 0
        assert seen.masks[name].shape == seen.stream(name).shape[:2]
    for name, span in seen.layout.items():
        assert (seen.pooled_stream(name) is None) == (span.pooled is None)


def test_the_mask_covers_content_and_its_end_mark(tiny_sd1):
    seen = tiny_sd1.encode(["a cat", ""])
    assert seen.masks["clip_l"].sum(1).tolist() == [4, 2]  # start, a, cat, end; start, end


def test_encode_reads_what_the_upstream_pipeline_feeds_its_denoiser(tiny_model, painted_upstream):
    """The very tensors, caught at the denoiser's door."""
    caught = {}

    def catch(self, args, kwargs):
        caught.update(kwargs)

    hook = tiny_model.denoiser.register_forward_pre_hook(catch, with_kwargs=True)
    painted_upstream(tiny_model, 1.0, steps=1)
    hook.remove()

    seen = tiny_model.encode(["a photo of a red cat", "church, by the sea!"])
    torch.testing.assert_close(seen.states, caught["encoder_hidden_states"], atol=1e-6, rtol=0)
    pooled = caught.get("pooled_projections")
    if tiny_model.family == "sdxl":
        pooled = caught["added_cond_kwargs"]["text_embeds"]
    if pooled is not None:
        torch.testing.assert_close(seen.pooled, pooled, atol=1e-6, rtol=0)


def test_encode_is_differentiable_in_every_encoder(tiny_model):
    names = [n for n in tiny_model.parameters() if n.split(".")[0] in tiny_model.text_encoders]
    values = {n: tiny_model.parameters()[n].detach().clone().requires_grad_() for n in names}
    with tiny_model.using(values):
        seen = tiny_model.encode(["a photo of a cat"])
        (seen.states.square().sum() + (0 if seen.pooled is None else seen.pooled.sum())).backward()
    reached = {n.split(".")[0] for n, v in values.items() if v.grad is not None and v.grad.any()}
    assert reached == set(tiny_model.text_encoders)


def test_encode_works_under_functional_calls(tiny_model):
    """Parameters replaced by torch.func reach the states, and gradients reach them."""
    encoder = next(iter(tiny_model.text_encoders))
    module = tiny_model.text_encoders[encoder]
    values = {n: (2 * p.detach()).requires_grad_() for n, p in module.named_parameters()}
    before = tiny_model.encode(["a cat"])

    class Inside(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self):
            return tiny_model.encode(["a cat"])

    named = {f"module.{n}": v for n, v in values.items()}
    seen = torch.func.functional_call(Inside(), named, ())
    read = seen.stream(encoder) if encoder in seen.encoders else seen.pooled_stream(encoder)
    read.sum().backward()
    assert any(v.grad is not None for v in values.values())
    after = tiny_model.encode(["a cat"])
    assert torch.equal(after.states, before.states)
    assert not torch.allclose(read, after.stream(encoder) if read.ndim == 3 else after.pooled)


def test_encode_can_run_one_encoder_alone(tiny_model):
    whole = tiny_model.encode(["a cat"])
    for name in tiny_model.text_encoders:
        part = tiny_model.encode(["a cat"], encoders=[name])
        assert set(part.layout) == set(part.masks) == {name}
        assert part.states.shape == whole.states.shape
        if name in whole.encoders:
            torch.testing.assert_close(part.stream(name), whole.stream(name))
        if whole.pooled_stream(name) is not None:
            torch.testing.assert_close(part.pooled_stream(name), whole.pooled_stream(name))


def test_an_edit_of_one_stream_reaches_every_family(tiny_model):
    seen = tiny_model.encode(["a cat"])
    edited = seen.edit(lambda name, x: torch.zeros_like(x))
    assert not edited.states.any()
    if seen.pooled is not None:
        assert not seen.edit(pooled=lambda name, x: 0 * x).pooled.any()


def test_an_over_long_prompt_is_cut_with_a_warning(tiny_model, caplog, monkeypatch):
    monkeypatch.setattr(tiny_model, "_cut", set())
    text = "a cat " * 1667  # 10,000 characters
    with caplog.at_level(logging.WARNING, logger="safelight"):
        seen = tiny_model.encode(["a cat", text])
    assert all("the rest is cut off" in record.message for record in caplog.records)
    assert len(caplog.records) == len(tiny_model.text_encoders)
    assert len(seen) == 2
    for name, mask in seen.masks.items():
        assert mask[1].sum() == tiny_model.tokens[name]


def test_a_long_prompt_is_named_once_and_many_are_summed_up(tiny_sd1, caplog, monkeypatch):
    monkeypatch.setattr(tiny_sd1, "_cut", set())
    long = [f"{i} " + "cat " * 90 for i in range(9)]
    with caplog.at_level(logging.WARNING, logger="safelight"):
        for _ in range(2):
            tiny_sd1.encode([long[0]])
        assert len(caplog.records) == 1
        tiny_sd1.encode(long)
    named, rest = caplog.records[:-1], caplog.records[-1]
    assert len(named) == 4 and "more prompts" in rest.message


def test_a_prompt_that_just_fits_makes_no_noise(tiny_sd1, caplog):
    with caplog.at_level(logging.WARNING, logger="safelight"):
        seen = tiny_sd1.encode(["cat " * 75])
    assert seen.masks["clip_l"].sum() == 77
    assert not caplog.records


def test_an_empty_prompt_is_a_prompt(tiny_model):
    assert tiny_model([""], **SMALL)[0].image.isfinite().all()


@pytest.mark.parametrize("prompts", ["a cat", [], [3], ["a", None]])
def test_prompts_of_the_wrong_form_are_refused(prompts):
    with pytest.raises(BadInput, match="text|no prompts"):
        texts(prompts)


def test_an_unknown_encoder_is_named(tiny_sd1):
    with pytest.raises(BadInput, match="clip_l"):
        tiny_sd1.encode(["a"], encoders=["t5"])


def test_concepts_reads_the_last_content_token(tiny_model):
    concepts = tiny_model.concepts(["a cat", "cat"])
    seen = tiny_model.encode(["a cat", "cat"])
    name = seen.encoders[0]
    last = seen.masks[name].sum(1) - 2
    tokens = seen.states[:, seen.layout[name].tokens]
    torch.testing.assert_close(concepts[0], tokens[0, last[0]])
    torch.testing.assert_close(concepts[1], tokens[1, last[1]])


def test_concepts_of_a_later_encoder(tiny_sd3):
    seen = tiny_sd3.encode(["cat"])
    last = seen.masks["t5"].sum() - 2
    torch.testing.assert_close(tiny_sd3.concepts(["cat"], "t5")[0], seen.states[0, 77 + last])


def test_text_projections_are_layers_of_the_denoiser_that_read_the_states(tiny_model):
    width = tiny_model.encode(["a"]).states.shape[-1]
    found = dict(tiny_model.text_projections())
    assert found
    for name, layer in found.items():
        assert tiny_model.denoiser.get_submodule(name) is layer
        assert layer.in_features == width


# Pictures


def test_a_picture_does_not_depend_on_its_batch(tiny_model):
    prompts = ["a cat", "a dog", "a church", "a boat", "a cat"]
    together = stacked(tiny_model(prompts, seed=5, **SMALL))
    halves = stacked(tiny_model(prompts, seed=5, batch=2, **SMALL))
    alone = stacked([tiny_model([text], seed=5 + i, **SMALL)[0] for i, text in enumerate(prompts)])
    torch.testing.assert_close(halves, together, atol=1e-5, rtol=0)
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)
    assert not torch.allclose(together[0], together[4], atol=1e-3)  # same text, other seed


def test_a_noisy_scheduler_keeps_pictures_apart_too():
    from diffusers import EulerAncestralDiscreteScheduler

    model = tiny("sd1")
    model.scheduler = EulerAncestralDiscreteScheduler.from_config(model.scheduler.config)
    together = stacked(model(["a cat", "a dog"], seed=[4, 9], **SMALL))
    alone = model(["a dog"], seed=9, **SMALL)[0].image
    torch.testing.assert_close(alone, together[1], atol=1e-5, rtol=0)


def test_the_same_seed_paints_the_same_picture(tiny_model):
    first, second = (tiny_model(["a cat"], seed=3, **SMALL)[0].image for _ in range(2))
    assert torch.equal(first, second)


def test_the_default_picture_has_the_models_own_size_and_range(tiny_model):
    outcome = tiny_model(["a cat"], seed=8)[0]
    assert outcome.prompt == "a cat" and outcome.seed == 8 and not outcome.refused
    assert outcome.image.shape == (3, *tiny_model.default_size)
    assert outcome.image.min() >= 0 and outcome.image.max() <= 1


def test_guidance_runs_both_halves_in_one_call_and_none_is_needed_at_one():
    model, rows = tiny("sd1"), []
    model.denoiser.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    condition = model.encode(["a cat", "a dog"])
    model.sample(condition, guidance=4.0, steps=3)
    assert rows == [4, 4, 4]
    rows.clear()
    model.sample(condition, guidance=1.0, steps=3)
    assert rows == [2, 2, 2]


def test_a_negative_condition_may_differ_per_picture(tiny_sd1):
    condition = tiny_sd1.encode(["a cat", "a dog"])
    negative = tiny_sd1.encode(["a boat", "a car"])
    both = tiny_sd1.sample(condition, negative=negative, seed=1, steps=2)
    for i in range(2):
        one = tiny_sd1.sample(
            tiny_sd1.encode([condition.prompts[i]]),
            negative=tiny_sd1.encode([negative.prompts[i]]),
            seed=1 + i,
            steps=2,
        )
        torch.testing.assert_close(one[0], both[i], atol=1e-5, rtol=0)


def test_a_distilled_model_says_that_it_takes_no_negative(tiny_flux):
    condition = tiny_flux.encode(["a cat"])
    with pytest.raises(Unsupported, match="guidance built in"):
        tiny_flux.sample(condition, negative=condition, steps=1)


def test_the_default_negative_of_sdxl_is_zeros_only_where_the_pipeline_says_so(tiny_sdxl):
    assert not tiny_sdxl.empty(2).states.any()
    other = tiny("sdxl")
    other.config["force_zeros_for_empty_prompt"] = False
    assert other.empty(2).states.any()


def test_guards_may_edit_the_noise_and_ask_for_other_predictions(tiny_model):
    steps = []

    def edit(noise, step):
        steps.append((step.index, step.total, step.t.item(), step.latents.shape))
        torch.testing.assert_close(step.predict(step.condition).shape, noise.shape)
        return torch.zeros_like(noise)

    condition = tiny_model.encode(["a cat", "a dog"])
    edited = tiny_model.sample(condition, seed=1, steps=3, on_noise=[edit])
    assert [(index, total) for index, total, *_ in steps] == [(0, 3), (1, 3), (2, 3)]
    assert steps[0][2] > steps[-1][2]
    assert not torch.allclose(edited, tiny_model.sample(condition, seed=1, steps=3))


def test_without_guidance_a_guard_sees_the_prediction_itself(tiny_model):
    condition = tiny_model.encode(["a cat"])

    def check(noise, step):
        if not tiny_model.guides(1.0):
            torch.testing.assert_close(step.predict(condition), noise)
        return noise

    tiny_model.sample(condition, steps=2, guidance=1.0, on_noise=[check])


def test_progress_counts_every_step_of_every_picture(tiny_sd1):
    seen = []
    tiny_sd1(["a"] * 3, batch=2, progress=lambda *now: seen.append(now), **SMALL)
    assert seen == [(2, 6), (4, 6), (5, 6), (6, 6)]


@pytest.mark.parametrize(
    "wrong",
    [
        dict(size=(15, 16)),
        dict(size=(0, 16)),
        dict(steps=0),
        dict(seed=[1]),
        dict(batch=0),
    ],
)
def test_wrong_settings_are_one_clear_error(tiny_sd1, wrong):
    with pytest.raises(BadInput):
        tiny_sd1(["a cat", "a dog"], **{**SMALL, **wrong})


def test_a_negative_condition_of_the_wrong_length_is_refused(tiny_sd1):
    with pytest.raises(BadInput, match="expected 1 or 2"):
        tiny_sd1.sample(tiny_sd1.encode(["a", "b"]), negative=tiny_sd1.encode(["a"] * 3), steps=1)


def test_conditions_join_and_repeat(tiny_model):
    one, two = tiny_model.encode(["a"]), tiny_model.encode(["b", "c"])
    whole = join(one, two)
    assert whole.prompts == ("a", "b", "c") and len(whole) == 3
    assert len(repeat(one, 4)) == 4 and repeat(two, 2) is two


def test_decode_is_differentiable_and_encode_images_is_near_its_inverse_in_scale(tiny_model):
    z = torch.randn(2, *tiny_model.latent_shape((16, 16)), requires_grad=True)
    tiny_model.decode(z).sum().backward()
    assert z.grad.any()
    again = tiny_model.encode_images(tiny_model.decode(z.detach()))
    assert again.shape == z.shape


def test_latents_are_scaled_as_they_are_unscaled(tiny_model):
    z = torch.randn(2, *tiny_model.latent_shape((16, 16)))
    torch.testing.assert_close(tiny_model._scaled(tiny_model._unscaled(z)), z)


def test_centred_latents_of_sdxl_are_scaled_back_too():
    model = tiny("sdxl")
    model.vae.register_to_config(latents_mean=[1.0, 2, 3, 4], latents_std=[2.0, 3, 4, 5])
    z = torch.randn(2, 4, 8, 8)
    assert not torch.allclose(model._unscaled(z), z / 0.13025)
    torch.testing.assert_close(model._scaled(model._unscaled(z)), z)


# Training


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_noised_agrees_with_the_scheduler(prediction):
    from diffusers import DDIMScheduler

    model = tiny("sd1", prediction=prediction)
    reference = DDIMScheduler.from_config(model.scheduler.config)
    z, eps = torch.randn(2, 3, 4, 8, 8)
    t = torch.tensor([0.0, 500, 999])
    z_t, target = model.noised(z, eps, t)
    torch.testing.assert_close(z_t, reference.add_noise(z, eps, t.long()))
    if prediction == "v_prediction":
        torch.testing.assert_close(target, reference.get_velocity(z, eps, t.long()))
    else:
        assert target is (eps if prediction == "epsilon" else z)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_perfect_flow_leads_back_to_the_clean_latents(request, family):
    """`noised` and the scheduler's step speak of the same thing: t / 1000 is the share of noise."""
    model = request.getfixturevalue(f"tiny_{family}")
    z, eps = torch.randn(2, 1, *model.latent_shape((16, 16)))
    scheduler = model.schedule(10, z.shape)
    x = eps
    for t in scheduler.timesteps:
        x_t, flow = model.noised(z, eps, t)
        torch.testing.assert_close(x, x_t, atol=1e-4, rtol=0)
        x = scheduler.step(flow, t, x, return_dict=False)[0]
    torch.testing.assert_close(x, z, atol=1e-4, rtol=0)


def test_random_times_are_seeded_and_in_range(tiny_model):
    draw = [tiny_model.random_times(500, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*draw)
    assert draw[0].min() >= 0 and draw[0].max() < 1000 and draw[0].std() > 50


def test_predict_is_differentiable_and_takes_a_time_per_row(tiny_model):
    condition = tiny_model.encode(["a cat", "a dog"])
    condition = replace(condition, states=condition.states.clone().requires_grad_())
    z = torch.randn(2, *tiny_model.latent_shape((16, 16)))
    t = torch.tensor([100.0, 900.0])
    said = tiny_model.predict(z, t, condition)
    said.square().sum().backward()
    assert condition.states.grad.any()
    alone = tiny_model.predict(z[1:], t[1], tiny_model.encode(["a dog"]))
    torch.testing.assert_close(alone, said[1:], atol=1e-5, rtol=1e-4)


# Weights


def test_every_parameter_has_one_name_and_modules_are_frozen(tiny_model):
    names = tiny_model.parameters()
    assert {name.split(".")[0] for name in names} == set(tiny_model.modules)
    assert not any("text_model." in name for name in names)
    assert not any(value.requires_grad for value in names.values())
    assert not any(module.training for module in tiny_model.modules.values())


def test_hashes_name_the_weights():
    model, same, other = tiny("sd1"), tiny("sd1"), tiny("sd1", seed=1)
    assert model.hashes() == same.hashes()
    assert all(model.hashes()[name] != sha for name, sha in other.hashes().items())
    with torch.no_grad():
        next(same.vae.parameters()).view(-1)[0] += 1e-3
    changed = {name for name, sha in same.hashes().items() if sha != model.hashes()[name]}
    assert changed == {"vae"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_weights_keep_the_hashes_of_what_was_loaded(dtype):
    model = tiny("sd3")
    before = model.hashes()
    model.cast(device=torch.device("cpu"), dtype=dtype)
    assert model.dtype == dtype
    assert model.hashes() == before
    with torch.no_grad():
        next(model.denoiser.parameters()).view(-1)[0] += 1
    assert model.hashes()["denoiser"] != before["denoiser"]


def test_half_precision_paints(tiny_model):
    model = tiny(tiny_model.family)
    model.cast(device=torch.device("cpu"), dtype=torch.bfloat16)
    half = model(["a cat"], seed=1, **SMALL)[0].image
    whole = tiny_model(["a cat"], seed=1, **SMALL)[0].image
    assert half.dtype == torch.float32
    assert (half - whole).abs().mean() < 0.05


def test_an_autoencoder_that_overflows_in_float16_decodes_in_float32():
    model, reference = tiny("sdxl"), tiny("sdxl")
    model.cast(device=torch.device("cpu"), dtype=torch.float16)
    z = torch.randn(1, 4, 8, 8)
    own = next(model.vae.parameters())
    torch.testing.assert_close(model.decode(z.half()), reference.decode(z), atol=5e-3, rtol=0)
    assert next(model.vae.parameters()) is own


def test_wrong_tensors_are_refused_and_nothing_is_left_behind(tiny_sd1):
    before = tiny_sd1.hashes()
    for values in (
        {"denoiser.nothing": torch.zeros(1)},
        {"vae.encoder.conv_in.weight": torch.zeros(1)},
    ):
        with pytest.raises(SafelightError), tiny_sd1.using(values):
            pass
    assert tiny_sd1.hashes() == before
