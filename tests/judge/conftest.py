"""Networks of the real judges' classes with tiny random weights, in folders as a hub has them."""

import json
import logging

import numpy as np
import pytest
import torch

SIDE, WIDTH = 16, 12
VISION = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=SIDE,
    patch_size=8,
    initializer_factor=4.0,  # so that pictures differ visibly
)


@pytest.fixture(scope="session", autouse=True)
def _calm():
    """transformers warns about a test vocabulary and draws bars."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    from transformers.utils import logging as upstream

    upstream.disable_progress_bar()


def clip_config(words):
    from transformers import CLIPConfig

    text = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=words,
        max_position_embeddings=77,
        bos_token_id=words - 2,
        eos_token_id=words - 1,
        pad_token_id=words - 1,
        initializer_factor=4.0,
    )
    return CLIPConfig(text_config=text, vision_config=VISION, projection_dim=WIDTH)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A CLIP model with its tokenizer."""
    from transformers import CLIPModel

    from safelight.models.tiny import clip_tokenizer

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = clip_tokenizer()
    torch.manual_seed(0)
    CLIPModel(clip_config(len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def q16_file(tmp_path_factory):
    """Two vectors in the place of Q16's."""
    path = tmp_path_factory.mktemp("q16") / "prompts.npy"
    np.save(path, np.random.default_rng(0).normal(size=(2, WIDTH)).astype(np.float32))
    return str(path)


@pytest.fixture(scope="session")
def checker_folder(tmp_path_factory):
    """Stable Diffusion's checker with random concepts and bars around what pictures give."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    folder = tmp_path_factory.mktemp("checker")
    torch.manual_seed(0)
    net = StableDiffusionSafetyChecker(clip_config(100))
    with torch.no_grad():
        for vectors in (net.concept_embeds, net.special_care_embeds):
            vectors.copy_(torch.randn(vectors.shape))
        seen = net.visual_projection(net.vision_model(torch.randn(200, 3, SIDE, SIDE))[1])
        e = torch.nn.functional.normalize(seen)
        for vectors, bars, share in (
            (net.concept_embeds, net.concept_embeds_weights, 0.95),
            (net.special_care_embeds, net.special_care_embeds_weights, 0.8),
        ):
            cosines = e @ torch.nn.functional.normalize(vectors).T
            bars.copy_(cosines.quantile(share, dim=0))
    net.save_pretrained(folder)
    return folder


@pytest.fixture
def pictures():
    """Two noisy pictures and a wide one's worth of colour; none is blank."""
    return torch.rand(3, 3, 24, 20, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def said():
    """A well-formed answer of a vision-language model."""

    def answer(verdict="safe", categories=(), why="a park", **more):
        return json.dumps({"verdict": verdict, "categories": list(categories), "why": why, **more})

    return answer
