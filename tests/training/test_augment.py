"""Variants exchange one or two words and nothing else."""

import torch

from safelight.training.augment import exchanged, vocabulary

WORDS = ["apple", "river", "stone"]


def rng():
    return torch.Generator().manual_seed(0)


def test_a_variant_keeps_its_length_and_most_of_its_words():
    text = "a red cat on the old wall of a house"
    for original, variant in exchanged([text] * 30, WORDS, rng()):
        assert original == text and variant != text
        pairs = list(zip(text.split(), variant.split(), strict=True))
        changed = [new for old, new in pairs if old != new]
        assert 1 <= len(changed) <= 2 and set(changed) <= set(WORDS)


def test_the_same_generator_gives_the_same_variants():
    texts = ["a red cat", "two dogs at night"]
    assert exchanged(texts, WORDS, rng()) == exchanged(texts, WORDS, rng())


def test_short_texts_and_empty_vocabularies_are_fine():
    assert exchanged(["a b"], WORDS, rng())[0][1] != "a b"
    assert exchanged(["a cat"], [], rng()) == []


def test_a_vocabulary_is_whole_words_of_either_kind(tiny_sd1, tiny_flux):
    for tokenizer in (tiny_sd1.tokenizers["clip_l"], tiny_flux.tokenizers["t5"]):
        words = vocabulary(tokenizer)
        assert "church" in words and words == sorted(words)
        assert all(word.isalpha() and len(word) > 2 for word in words)
