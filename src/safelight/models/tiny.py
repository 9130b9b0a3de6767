"""Tiny random models of every family, built in a moment: for tests, docs and dry runs.

They paint noise, but through the very classes that real checkpoints use: every tensor has its real
place and only the widths are small. Their tokenizers know some common words and spell the rest.

    model = tiny("sdxl", seed=1)
"""

from __future__ import annotations

import json
import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from safelight.errors import NotFound, unknown
from safelight.models.base import Sampling, TextToImage

WORDS = tuple(
    """a an the of in on with and photo picture painting portrait drawing red blue green big small
    cat dog bird horse fish church house car boat train tree park garden street castle man woman
    person child knife bomb skull beer parachute sky sea night day""".split()  # noqa: SIM905
)

WIDTH = 32  # of every text encoder and attention
TOKENS = 24  # of T5; CLIP reads 77 as always


def tiny(family: str, seed: int = 0, **settings: Any) -> TextToImage:
    """A tiny random model.

    Args:
        family: sd1, sdxl, sd3 or flux.
        seed: Of the weights; the same seed gives the same weights.
        settings: Of the family: `prediction` for the U-Nets, `distilled` for flux.

    Raises:
        NotFound: No such family.
    """
    builders: dict[str, Callable[..., TextToImage]] = {
        "sd1": _sd1,
        "sdxl": _sdxl,
        "sd3": _sd3,
        "flux": _flux,
    }
    if family not in builders:
        raise NotFound(unknown("family", family, builders))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return builders[family](**settings)


def tiny_sd1() -> TextToImage:
    """`tiny("sd1")`."""
    return tiny("sd1")


def tiny_sdxl() -> TextToImage:
    """`tiny("sdxl")`."""
    return tiny("sdxl")


def tiny_sd3() -> TextToImage:
    """`tiny("sd3")`."""
    return tiny("sd3")


def tiny_flux() -> TextToImage:
    """`tiny("flux")`."""
    return tiny("flux")


def _sd1(prediction: str = "epsilon") -> TextToImage:
    from diffusers import DDIMScheduler, UNet2DConditionModel

    from safelight.models.sd1 import SD1

    tokenizer = clip_tokenizer()
    return SD1(
        denoiser=UNet2DConditionModel(cross_attention_dim=WIDTH, **_UNET),
        vae=_vae(),
        text_encoders={"clip_l": _clip(tokenizer)},
        tokenizers={"clip_l": tokenizer},
        scheduler=DDIMScheduler(**_DDPM, prediction_type=prediction, clip_sample=False),
        name="tiny-sd1",
        sampling=Sampling(4, 5.0, (16, 16)),
    )


def _sdxl(prediction: str = "epsilon") -> TextToImage:
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel

    from safelight.models.sdxl import SDXL

    tokenizer, other = clip_tokenizer(), clip_tokenizer()
    return SDXL(
        denoiser=UNet2DConditionModel(
            cross_attention_dim=2 * WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
            transformer_layers_per_block=1,
            use_linear_projection=True,
            **_UNET,
        ),
        vae=_vae(scaling_factor=0.13025, force_upcast=True),
        text_encoders={"clip_l": _clip(tokenizer), "clip_g": _clip(other, projected=True)},
        tokenizers={"clip_l": tokenizer, "clip_g": other},
        scheduler=EulerDiscreteScheduler(**_DDPM, prediction_type=prediction),
        name="tiny-sdxl",
        sampling=Sampling(4, 5.0, (16, 16)),
        config={"force_zeros_for_empty_prompt": True},
    )


def _sd3() -> TextToImage:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    from safelight.models.sd3 import SD3

    first, second = clip_tokenizer(), clip_tokenizer()
    return SD3(
        denoiser=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=3 * WIDTH,
            pooled_projection_dim=2 * WIDTH,
            pos_embed_max_size=16,
        ),
        vae=_vae(scaling_factor=1.5305, shift_factor=0.0609),
        text_encoders={
            "clip_l": _clip(first, projected=True),
            "clip_g": _clip(second, projected=True),
            "t5": _t5(3 * WIDTH),
        },
        tokenizers={"clip_l": first, "clip_g": second, "t5": t5_tokenizer()},
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        name="tiny-sd3",
        sampling=Sampling(4, 5.0, (16, 16)),
        t5_tokens=TOKENS,
    )


def _flux(distilled: bool = True) -> TextToImage:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    from safelight.models.flux import Flux

    tokenizer = clip_tokenizer()
    return Flux(
        denoiser=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=distilled,
        ),
        vae=_vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoders={"clip_l": _clip(tokenizer), "t5": _t5(WIDTH)},
        tokenizers={"clip_l": tokenizer, "t5": t5_tokenizer()},
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        name="tiny-flux",
        sampling=Sampling(4, 3.5, (16, 16)),
        t5_tokens=TOKENS,
    )


_UNET: dict[str, Any] = dict(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    layers_per_block=1,
    block_out_channels=(16, 32),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    attention_head_dim=2,
    norm_num_groups=8,
)
_DDPM: dict[str, Any] = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
)


def _vae(**settings: Any) -> Any:
    """Two pixels per latent along one side."""
    from diffusers import AutoencoderKL

    settings = {"latent_channels": 4, "scaling_factor": 0.18215, **settings}
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
        **settings,
    )


def _clip(tokenizer: Any, projected: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_factor=5.0,  # so that prompts differ visibly
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def _t5(width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=256,
            d_model=width,
            d_kv=8,
            d_ff=2 * width,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )


def clip_tokenizer(tokens: int = 77) -> Any:
    """CLIP's byte-pair tokenizer with the alphabet and `WORDS`; it can spell any text."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizerFast  # type: ignore[attr-defined]

    alphabet = sorted(ByteLevel.alphabet())
    merges: dict[str, str] = {}  # "ca t</w>" -> "cat</w>", in order of their use
    for word in WORDS:
        left, *letters = [*word[:-1], f"{word[-1]}</w>"]
        for letter in letters:
            merges[f"{left} {letter}"] = left + letter
            left += letter
    ends = ("<|startoftext|>", "<|endoftext|>")
    pieces = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *merges.values(), *ends]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    files = {
        "vocab.json": json.dumps(vocabulary),
        "merges.txt": "\n".join(["#version: 0.2", *merges]),
    }
    return _tokenizer(CLIPTokenizerFast, files, tokens)


def t5_tokenizer(tokens: int = TOKENS) -> Any:
    """T5's unigram tokenizer with printable ASCII and `WORDS`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import T5TokenizerFast  # type: ignore[attr-defined]

    letters = (*string.digits, *string.ascii_letters, *string.punctuation)
    pieces = ["▁", *letters, *(f"▁{word}" for word in WORDS)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    backend = Tokenizer(models.Unigram([*special, *((piece, -1.0) for piece in pieces)], unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁")]
    )
    backend.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    files = {"tokenizer.json": backend.to_str()}
    return _tokenizer(T5TokenizerFast, files, tokens, extra_ids=0)


def _tokenizer(cls: Any, files: dict[str, str], tokens: int, **settings: Any) -> Any:
    """By way of files: the one way in that is the same in transformers 4 and 5."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        return cls.from_pretrained(
            folder, model_max_length=tokens, local_files_only=True, **settings
        )
