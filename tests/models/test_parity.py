"""Our loop paints what the upstream diffusers pipelines paint, for every family."""

import diffusers
import pytest
import torch

from safelight.models.tiny import TOKENS, tiny

PROMPTS = ["a photo of a red cat", "church, by the sea!"]
SEEDS = (3, 11)


def upstream(model):
    """The diffusers pipeline made of the same modules."""
    numbers = {"clip_l": "", "clip_g": "_2", "t5": "_3" if model.family == "sd3" else "_2"}
    parts = {model.parts[name]: module for name, module in model.modules.items()}
    parts |= {f"tokenizer{numbers[name]}": one for name, one in model.tokenizers.items()}
    if model.family == "sd1":
        parts |= dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe = getattr(diffusers, model.pipeline)(scheduler=model.scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def painted_upstream(model, guidance, steps=4, size=(16, 16), **settings):
    if "t5" in model.text_encoders:
        settings["max_sequence_length"] = TOKENS
    images = upstream(model)(
        PROMPTS,
        height=size[0],
        width=size[1],
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="pt",
        **settings,
    ).images
    return images


def painted(model, guidance, steps=4, size=(16, 16), **settings):
    outcomes = model(PROMPTS, seed=SEEDS, steps=steps, guidance=guidance, size=size, **settings)
    return torch.stack([outcome.image for outcome in outcomes])


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_pictures_equal_the_upstream_pipelines(tiny_model, guidance):
    ours, theirs = painted(tiny_model, guidance), painted_upstream(tiny_model, guidance)
    assert (ours - theirs).abs().max() <= 1e-5
    assert ours.std() > 0.01  # a picture, not a constant


def test_pictures_equal_upstream_in_another_shape(tiny_model):
    size = (24, 16)
    ours = painted(tiny_model, 4.0, size=size)
    theirs = painted_upstream(tiny_model, 4.0, size=size)
    assert (ours - theirs).abs().max() <= 1e-5


def test_a_negative_prompt_means_what_it_means_upstream(tiny_model):
    if tiny_model.distilled:
        pytest.skip("its guidance is built in")
    ours = painted(tiny_model, 4.0, negative="a blue dog")
    theirs = painted_upstream(tiny_model, 4.0, negative_prompt=["a blue dog"] * 2)
    assert (ours - theirs).abs().max() <= 1e-5
    assert not torch.allclose(ours, painted(tiny_model, 4.0), atol=1e-4)


def test_flux_without_built_in_guidance_uses_a_negative_condition():
    model = tiny("flux", distilled=False)
    ours = painted(model, 4.0)
    theirs = painted_upstream(model, 1.0, negative_prompt=[""] * 2, true_cfg_scale=4.0)
    assert (ours - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "scheduler",
    [
        "DDIMScheduler",
        "PNDMScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "LMSDiscreteScheduler",
        "DDPMScheduler",
        "HeunDiscreteScheduler",
    ],
)
def test_any_scheduler_of_the_pipeline_works(scheduler, prediction):
    pytest.importorskip("scipy")
    model = tiny("sd1", prediction=prediction)
    model.scheduler = getattr(diffusers, scheduler).from_config(model.scheduler.config)
    ours, theirs = painted(model, 3.0, steps=5), painted_upstream(model, 3.0, steps=5)
    assert (ours - theirs).abs().max() <= 1e-5
