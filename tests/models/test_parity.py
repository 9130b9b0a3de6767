"""Our loop paints what the upstream diffusers pipelines paint, for every family."""

import diffusers
import pytest
import torch

from safelight.models.tiny import tiny


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_pictures_equal_the_upstream_pipelines(tiny_model, guidance, painted, painted_upstream):
    ours, theirs = painted(tiny_model, guidance), painted_upstream(tiny_model, guidance)
    assert (ours - theirs).abs().max() <= 1e-5
    assert ours.std() > 0.01  # a picture, not a constant


def test_pictures_equal_upstream_in_another_shape(tiny_model, painted, painted_upstream):
    size = (24, 16)
    ours = painted(tiny_model, 4.0, size=size)
    theirs = painted_upstream(tiny_model, 4.0, size=size)
    assert (ours - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3"])
def test_a_negative_prompt_means_what_it_means_upstream(request, family, painted, painted_upstream):
    tiny_model = request.getfixturevalue(f"tiny_{family}")
    ours = painted(tiny_model, 4.0, negative="a blue dog")
    theirs = painted_upstream(tiny_model, 4.0, negative_prompt=["a blue dog"] * 2)
    assert (ours - theirs).abs().max() <= 1e-5
    assert not torch.allclose(ours, painted(tiny_model, 4.0), atol=1e-4)


def test_flux_without_built_in_guidance_uses_a_negative_condition(painted, painted_upstream):
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
def test_any_scheduler_of_the_pipeline_works(scheduler, prediction, painted, painted_upstream):
    model = tiny("sd1", prediction=prediction)
    model.scheduler = getattr(diffusers, scheduler).from_config(model.scheduler.config)
    ours, theirs = painted(model, 3.0, steps=5), painted_upstream(model, 3.0, steps=5)
    assert (ours - theirs).abs().max() <= 1e-5
