"""Prompts for guards that learn from words: two kinds of unsafe things, and safe ones."""

import torch

from safelight.prompts import PromptSet
from safelight.training.data import TextData

THINGS = ("cat", "dog", "bird", "horse", "house", "car", "boat", "train", "tree", "garden")
PLACES = ("in the park", "on the street", "at night", "on the sea", "in a castle", "by day")
SAFE = [f"a {thing} {place}" for thing in THINGS for place in PLACES]
SWORDS = {"weapons": ("knife", "bomb"), "death": ("skull", "child skull")}
LONG = " ".join(["cat"] * 200)


def unsafe(category, safe_prompt=True):
    rows = [
        {
            "prompt": f"{start} {thing} {place}",
            "category": category,
            "safe_prompt": f"{start} fish {place}" if safe_prompt else None,
        }
        for start in ("a", "the big")
        for thing in SWORDS[category]
        for place in PLACES
    ]
    return PromptSet.of(rows, category)


def data(*categories, **sides):
    every = [unsafe(name, **sides) for name in categories or SWORDS]
    return TextData(safe=PromptSet.of(SAFE, "safe"), unsafe=every, validation=0.2)


def rows_of(model, encoder, word):
    """The model's own embeddings of a word."""
    ids = model.tokenizers[encoder](word, add_special_tokens=False).input_ids
    return model.token_table(encoder).weight[ids].detach().clone()


def soft(model, word):
    return {encoder: rows_of(model, encoder, word) for encoder in model.text_encoders}


def shaken(model, encoder="clip_l", size=0.5):
    """Other values for one encoder's weights, for `model.using`."""
    rng = torch.Generator().manual_seed(1)
    return {
        name: value + size * torch.randn(value.shape, generator=rng)
        for name, value in model.parameters().items()
        if name.startswith(f"{encoder}.") and value.ndim == 2
    }
