"""Tiny models are seeded, and can read any text."""

import string

import pytest
import torch

from safelight.errors import NotFound
from safelight.models.tiny import clip_tokenizer, t5_tokenizer, tiny


def test_the_seed_decides(tiny_model):
    same = tiny(tiny_model.family)
    assert same.hashes() == tiny_model.hashes()
    assert tiny(tiny_model.family, seed=1).hashes()["denoiser"] != same.hashes()["denoiser"]


def test_building_one_does_not_touch_the_global_randomness():
    before = torch.get_rng_state()
    tiny("sd1")
    assert torch.equal(torch.get_rng_state(), before)


def test_prompts_and_seeds_matter(tiny_model):
    cat, church, other = (
        tiny_model([text], seed=seed, steps=2)[0].image
        for text, seed in (("a cat", 1), ("a photo of a church", 1), ("a cat", 2))
    )
    assert (cat - church).abs().max() > 1e-3
    assert (cat - other).abs().max() > 1e-1


@pytest.mark.parametrize("tokenizer", [clip_tokenizer(), t5_tokenizer()], ids=["clip", "t5"])
def test_any_ascii_text_has_tokens_of_its_own(tokenizer):
    letters = [c for c in string.printable if not c.isspace()]
    unknown = tokenizer.convert_tokens_to_ids("<unk>") if "<unk>" in tokenizer.get_vocab() else -1
    for letter in letters:
        ids = tokenizer(letter).input_ids
        assert unknown not in ids and len(ids) > 1


def test_common_words_are_one_token():
    assert len(clip_tokenizer()("church").input_ids) == 3
    assert len(clip_tokenizer()("zebra").input_ids) > 3


def test_an_unknown_family_is_named():
    with pytest.raises(NotFound, match="Did you mean 'sdxl'"):
        tiny("sdlx")
