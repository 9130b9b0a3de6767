"""Harmless captions near unsafe ones: found in the vocabulary, judged by their own pictures."""

import torch

from safelight.flow import Prompt, Verdict
from safelight.models.patch import Patch
from safelight.training.lookalikes import lookalikes

UNSAFE = [
    Prompt(id=str(i), text=f"a {kind} at night", safe_prompt="a tulip at night")
    for i, kind in enumerate(("red sword", "sky", "long knife"))
]
BENIGN = ["a cat on a hill", "a red house"]


class Eyes:
    """A judge that flags every third text and cannot tell about the one after it."""

    def __init__(self, flags=(True, None, False)):
        self.flags, self.seen, self.shown = flags, [], []

    def __call__(self, images, texts):
        flags = [self.flags[(len(self.seen) + i) % len(self.flags)] for i in range(len(texts))]
        self.seen += zip(texts, flags, strict=True)
        self.shown.append(images)
        return [Verdict(flag, 0.5, "eyes") for flag in flags]

    def about_words(self):
        return {text[2:]: flag for text, flag in self.seen if len(text.split()) == 2}


def found_by(model, eyes, count=30, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return lookalikes(model, UNSAFE, BENIGN, eyes, count, rng, steps=1)


def test_only_captions_whose_own_picture_is_harmless_stay_each_with_that_picture(tiny_sd1):
    eyes = Eyes()
    found = found_by(tiny_sd1, eyes)
    captions = eyes.seen[-found.looked_at :]
    assert found.captions == tuple(text for text, flag in captions if flag is False)
    assert 0 < len(found) < found.looked_at <= 30
    shown = torch.cat(eyes.shown)[-found.looked_at :]
    harmless = torch.tensor([flag is False for _, flag in captions])
    assert torch.equal(found.images, shown[harmless]) and len(found.images) == len(found)
    assert found.told() == {
        "kept": len(found),
        "looked_at": found.looked_at,
        "words": len(found.words),
    }


def test_words_stand_in_place_of_phrases_and_beside_a_word_of_them(tiny_sd1):
    eyes = Eyes()
    found = found_by(tiny_sd1, eyes)
    flags = eyes.about_words()
    assert set(found.words) == {word for word, flag in flags.items() if flag is False}
    unsafe = {prompt.text for prompt in UNSAFE}
    alone = beside = 0
    for text, _ in eyes.seen[-found.looked_at :]:
        assert text.endswith("at night") and text not in unsafe
        phrase = text.split()[1:-2]
        alone += len(phrase) == 1 and phrase[0] in found.words
        beside += len(phrase) == 2 and bool(set(phrase) & {"red", "sword", "long", "knife"})
    assert alone and beside and alone + beside == found.looked_at


def test_nothing_harmless_nearby_leaves_nothing(tiny_sd1):
    found = found_by(tiny_sd1, Eyes((True,)))
    assert len(found) == 0 and found.words == () and found.images.shape[0] == 0


def test_the_same_seed_finds_the_same_and_another_does_not(tiny_sd1):
    first, again, other = (found_by(tiny_sd1, Eyes(), seed=seed) for seed in (0, 0, 1))
    assert first.captions == again.captions != other.captions
    assert torch.equal(first.images, again.images)


def test_the_untouched_model_paints_them(tiny_sd1):
    weight = next(name for name in tiny_sd1.parameters() if name.startswith("denoiser"))
    patch = Patch(full={weight: torch.randn(tiny_sd1.parameters()[weight].shape)}, method="x",
                  family="sd1")  # fmt: skip
    plain = found_by(tiny_sd1, Eyes())
    with tiny_sd1.patched(patch):
        assert torch.equal(plain.images, found_by(tiny_sd1, Eyes()).images)
