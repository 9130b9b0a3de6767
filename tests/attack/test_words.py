"""Words of a prompt: cut without loss, and which of them make it unsafe."""

import pytest

from safelight.attack.words import parts, unsafe_words, words
from safelight.flow import Prompt


@pytest.mark.parametrize("text", ["", "cat", "  A cat, (big)  dog's--bone! ", "...", "ö-ä x_y"])
def test_joining_the_parts_gives_the_text_back(text):
    assert "".join(parts(text)) == text


def test_words_are_letters_and_digits_with_their_apostrophes():
    assert words("A cat, the dog's 2 well-known bones_!") == (
        *("A", "cat", "the", "dog's", "2", "well-known", "bones"),
    )


def test_unsafe_words_are_those_that_the_safe_prompt_lacks():
    prompt = Prompt(id="x", text="A short Sword at night", safe_prompt="a sunflower at night")
    assert unsafe_words(prompt) == ("short", "sword")
    assert unsafe_words(Prompt(id="x", text="a Bomb and a cat"), ["bomb", "gun"]) == ("bomb",)


def test_an_article_that_changes_with_its_noun_is_not_unsafe():
    prompt = Prompt(id="x", text="An axe and a lake of oil", safe_prompt="the boat on the sea")
    assert unsafe_words(prompt) == ("axe", "lake", "oil")
    assert unsafe_words(prompt, ["of"]) == ("axe", "lake", "of", "oil")
