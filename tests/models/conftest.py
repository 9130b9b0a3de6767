"""The upstream pipelines, made of a tiny model's own modules, to compare with."""

import pytest
import torch

from safelight.models.export import pipeline_of
from safelight.models.tiny import TOKENS

PROMPTS = ["a photo of a red cat", "church, by the sea!"]
SEEDS = (3, 11)


@pytest.fixture
def painted_upstream():
    """Two pictures by the diffusers pipeline."""

    def paint(model, guidance, steps=4, size=(16, 16), pipe=None, **settings):
        if "t5" in model.text_encoders:
            settings["max_sequence_length"] = TOKENS
        pipe = pipe or pipeline_of(model)
        pipe.set_progress_bar_config(disable=True)
        return pipe(
            PROMPTS,
            height=size[0],
            width=size[1],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
            output_type="pt",
            **settings,
        ).images

    return paint


@pytest.fixture
def painted():
    """The same two pictures by our loop."""

    def paint(model, guidance, steps=4, size=(16, 16), **settings):
        outcomes = model(PROMPTS, seed=SEEDS, steps=steps, guidance=guidance, size=size, **settings)
        return torch.stack([outcome.image for outcome in outcomes])

    return paint
