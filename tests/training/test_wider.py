"""Made-up prompts: unsafe ones keep a safe twin, safe ones never get a word that is near unsafe."""

import torch

from safelight.flow import Prompt
from safelight.prompts import PromptSet
from safelight.training.augment import prefixed, strewn
from safelight.training.pairs import pair
from safelight.training.wider import (
    Words,
    instead_of,
    led,
    near_ones,
    recombined,
    scattered,
    sorted_words,
    substituted,
    varied,
)

UNSAFE = [
    Prompt(id=str(i), text=f"a {kind} sword at night", category="weapons",
           safe_prompt=f"a {kind} tulip at night")
    for i, kind in enumerate(("red", "long", "old", "new"))
]  # fmt: skip
WORDS = Words({"sword": ("dagger", "blade")}, ("river", "lamp", "stone", "cloud"))


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_neighbours_stand_where_the_phrase_stood_and_keep_the_counterpart():
    made = near_ones(UNSAFE, WORDS, 2.0, rng())
    assert len(made) == 8
    for prompt in made:
        assert any(word in prompt.text for word in ("dagger", "blade"))
        assert "sword" not in prompt.text
        assert prompt.safe_prompt in {one.safe_prompt for one in UNSAFE}
        assert prompt.category == "weapons"


def test_scattered_phrases_differ_from_their_counterpart_in_the_phrase_only():
    made = scattered(UNSAFE, WORDS, 3.0, rng(), most=5)
    assert len(made) == 12 and len({prompt.text for prompt in made}) > 6
    for prompt in made:
        two = pair(prompt.text, prompt.safe_prompt)
        said = two.phrase.split()
        assert set(said) <= {"sword", "dagger", "blade"} and len(said) <= 3
        rest = set(prompt.text.split()) - set(said)
        assert rest <= set(WORDS.far) and 1 <= len(prompt.text.split()) - len(said) <= 5
        assert "tulip" in prompt.safe_prompt


def test_a_share_of_nothing_and_prompts_without_counterpart_give_nothing():
    lone = [Prompt(id="x", text="a sword", category="weapons")]
    for make in (near_ones, scattered, led):
        assert make(UNSAFE, WORDS, 0.0, rng()) == []
        assert make(lone, WORDS, 1.0, rng()) == []
        assert make(UNSAFE, Words({}, ()), 1.0, rng()) == []


def test_words_stand_in_front_of_the_prompt_and_of_its_counterpart():
    made = led(UNSAFE, WORDS, 2.0, rng())
    assert len(made) == 8
    for prompt in made:
        two = pair(prompt.text, prompt.safe_prompt)
        assert two.phrase == "sword" and prompt.category == "weapons"
        front = prompt.text.split(" a ")[0].split()
        assert 1 <= len(front) <= 5 and set(front) <= set(WORDS.far)


def test_variants_take_turns_and_use_harmless_words_only():
    safe = ["a cat on a hill", "two dogs in a garden", "red fish under water"]
    made = varied(safe, WORDS.harmless, 2.0, rng())
    assert sorted(old for old, _ in made) == sorted(safe * 2)
    for (old, new), kind in zip(made, ["in"] * 2 + ["front"] * 2 + ["alone"] * 2, strict=True):
        drawn = set(new.split()) - set(old.split())
        assert drawn and drawn <= set(WORDS.far)
        assert new.endswith(old) == (kind == "front")
        assert (set(new.split()) <= set(WORDS.far)) == (kind == "alone")
    assert varied(safe, (), 3, rng()) == []
    assert varied((), WORDS.harmless, 3, rng()) == varied(safe, WORDS.harmless, 0, rng()) == []


def test_words_in_front_and_alone_have_a_length():
    for text, new in prefixed(["a cat"] * 20, WORDS.far, rng(), most=3):
        assert 1 <= len(new.split()) - len(text.split()) <= 3
    for _, new in strewn(["a cat"] * 20, WORDS.far, rng(), most=3):
        assert 1 <= len(new.split()) <= 3


def test_the_encoder_sorts_its_vocabulary(tiny_sd1):
    safe = PromptSet.of(["a cat on a hill"], "safe").prompts
    words = sorted_words(tiny_sd1, "clip_l", UNSAFE, safe, ("river",), rng())
    near = {word for found in words.near.values() for word in found}
    assert not near & set(words.far)
    assert "sword" not in words.far and "river" not in {*words.far, *near}
    alone = sorted_words(tiny_sd1, "clip_l", [Prompt(id="x", text="a sword")], safe, (), rng())
    assert alone.near == {} and alone.far


def test_one_word_of_a_phrase_of_several_becomes_another():
    several = [pair("a long red drop of blood, nice", "a long red tulip, nice")]
    made = recombined([*several, pair("a sword", "a tulip")], WORDS.far, 8, rng())
    assert len(made) == 8 and {old for old, _ in made} == {"a long red tulip, nice"}
    for _, new in made:
        first, of, last = new.removeprefix("a long red ").removesuffix(", nice").split()
        assert of == "of" and (first == "drop") + (last == "blood") == 1
        assert {first, last} & set(WORDS.far)
    assert recombined(several, (), 8, rng()) == [] == recombined(several[:0], WORDS.far, 8, rng())


def test_a_word_of_a_phrase_becomes_another_that_is_like_it():
    several = [pair(f"a {kind} Drop of blood, nice", f"a {kind} tulip, nice") for kind in "xy"]
    akin = {"drop": ("rain", "dew"), "blood": ("sweat",), "sword": ("lamp",)}
    made = substituted([*several, pair("a sword", "a tulip")], akin, 60, rng())
    phrases = {("rain", "blood"), ("dew", "blood"), ("Drop", "sweat")}
    assert {new for _, new in made} == {
        f"a {kind} {first} of {last}, nice" for kind in "xy" for first, last in phrases
    }
    assert all(old == f"a {new[2]} tulip, nice" for old, new in made)
    assert substituted(several, {}, 8, rng()) == [] == substituted([], akin, 8, rng())
    assert 0 < len(substituted(several, akin, 2, rng())) <= 2


def test_harmless_words_stand_where_target_contexts_have_their_phrase():
    pairs = [pair("a sword, at night", "a tulip, at night"), pair("two swords", "two tulips")]
    made = instead_of(pairs, ["lamp", "river", "lamp", "river"], rng())
    assert len(made) == 4 and set(made) <= {
        f"{front}{word}{back}"
        for word in ("lamp", "river")
        for front, back in (("a ", ", at night"), ("two ", ""))
    }
    assert instead_of([], ["lamp"], rng()) == []
