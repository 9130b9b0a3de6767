"""Learnt embeddings stand in place of `<*>`, and start noise in place of a seed's."""

import pytest
import torch

from safelight.errors import BadInput
from safelight.flow import Card, Outcome, Prompt, Verdict
from safelight.guard.base import Guard, Guarded


def rows_of(model, encoder, word):
    """The model's own embeddings of a word."""
    ids = model.tokenizers[encoder](word, add_special_tokens=False).input_ids
    return model.token_table(encoder).weight[ids].detach().clone()


def soft(model, word):
    return {encoder: rows_of(model, encoder, word) for encoder in model.text_encoders}


@pytest.mark.parametrize(
    "text", ["<*>", "a photo of <*>", "<*> in the park", "a <*> on the street", "a <*> and a <*>"]
)
@pytest.mark.parametrize("word", ["cat", "big red bird"])
def test_a_words_own_embeddings_read_as_the_word(tiny_model, text, word):
    said = tiny_model.encode([text.replace("<*>", word), "a dog"])
    shown = tiny_model.encode([text, "a dog"], soft=[soft(tiny_model, word), None])
    torch.testing.assert_close(shown.states, said.states, atol=1e-6, rtol=1e-5)
    if said.pooled is not None:
        torch.testing.assert_close(shown.pooled, said.pooled, atol=1e-6, rtol=1e-5)
    for encoder in said.masks:
        assert torch.equal(shown.masks[encoder], said.masks[encoder])


def test_gradients_reach_the_embeddings_of_every_encoder(tiny_model):
    learnt = {name: value.requires_grad_() for name, value in soft(tiny_model, "cat").items()}
    seen = tiny_model.encode(["a <*>"], soft=[learnt])
    total = seen.states.square().sum()
    (total if seen.pooled is None else total + seen.pooled.square().sum()).backward()
    assert all(value.grad.abs().max() > 0 for value in learnt.values())


def test_an_encoder_without_embeddings_reads_the_text_without_the_placeholder(tiny_sdxl):
    seen = tiny_sdxl.encode(["a <*> cat"], soft=[{"clip_l": rows_of(tiny_sdxl, "clip_l", "red")}])
    first, second = (tiny_sdxl.encode([text]) for text in ("a red cat", "a cat"))
    torch.testing.assert_close(seen.stream("clip_l"), first.stream("clip_l"))
    torch.testing.assert_close(seen.stream("clip_g"), second.stream("clip_g"))
    assert seen.prompts == ("a cat",)


def test_without_embeddings_the_placeholder_is_text(tiny_sd1):
    plain = tiny_sd1.encode(["a <*> cat"])
    assert torch.equal(plain.states, tiny_sd1.encode(["a <*> cat"], soft=[None]).states)
    assert plain.prompts == ("a <*> cat",)


def test_nothing_stays_behind(tiny_model):
    before = tiny_model.encode(["a cat"]).states
    tiny_model.encode(["<*>"], soft=[soft(tiny_model, "dog")])
    assert torch.equal(tiny_model.encode(["a cat"]).states, before)


@pytest.mark.parametrize(
    "text, given, words",
    [
        ("a cat", [{"clip_l": torch.ones(1, 32)}], "need a '<\\*>'"),
        ("a <*>", [{"clip_l": torch.ones(1, 31)}], r"expected \(tokens, 32\)"),
        ("a <*>", [{"clip_l": torch.ones(80, 32)}], "80 learnt embeddings"),
        ("a <*>", [{"t5": torch.ones(1, 32)}], "has the encoders clip_l"),
        ("a <*>", [None, None], "for 2 prompts of 1"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(tiny_sd1, text, given, words):
    with pytest.raises(BadInput, match=words):
        tiny_sd1.encode([text], soft=given)


def noise(model, seed):
    shape = model.latent_shape(model.default_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_noise_of_a_seed_as_start_latents_paints_the_seeds_picture(tiny_model):
    told = tiny_model.encode(["a cat", "a dog"])
    own = tiny_model.sample(told, seed=[5, 6])
    given = tiny_model.sample(told, seed=[5, 9], latents=[None, noise(tiny_model, 6)])
    torch.testing.assert_close(given, own)
    assert not torch.allclose(tiny_model.sample(told, seed=[5, 9]), own)


def test_start_latents_that_do_not_fit_are_refused(tiny_sd1):
    told = tiny_sd1.encode(["a cat"])
    with pytest.raises(BadInput, match="shape"):
        tiny_sd1.sample(told, latents=torch.zeros(1, 4, 3, 3))
    with pytest.raises(BadInput, match="2 of 1"):
        tiny_sd1.sample(told, latents=[None, None])


def test_show_paints_prompts_with_all_that_they_carry(tiny_model):
    prompts = [
        Prompt(id="0", text="a cat"),
        Prompt(id="1", text="a <*>", soft=soft(tiny_model, "cat")),
        Prompt(id="2", text="a cat", latents=noise(tiny_model, 3)),
    ]
    shown = Guarded(tiny_model, ()).show(prompts, [3, 3, 8])
    plain = tiny_model(["a cat"], seed=3)[0]
    assert [(o.prompt, o.seed) for o in shown] == [("a cat", 3), ("a <*>", 3), ("a cat", 8)]
    for outcome in shown:
        torch.testing.assert_close(outcome.image, plain.image, atol=1e-4, rtol=1e-4)


def test_guards_that_read_words_do_not_see_the_placeholder(tiny_sd1):
    seen = []

    class Reader(Guard):
        card = Card(title="reader", source="tests")

        def screen_prompts(self, prompts):
            seen.extend(prompts)
            return [Verdict("red" in p, 0.0, "reader") for p in prompts]

        def screen_images(self, images, prompts):
            seen.extend(prompts)
            return ()

    prompts = [
        Prompt(id="0", text="a <*> cat", soft=soft(tiny_sd1, "big")),
        Prompt(id="1", text="red <*>", soft=soft(tiny_sd1, "cat")),
    ]
    first, second = Guarded(tiny_sd1, [Reader()]).show(prompts, [0, 1])
    assert seen == ["a cat", "red", "a cat"]
    assert not first.refused and second == Outcome("red <*>", 1, None, second.verdicts)


@pytest.mark.parametrize("side", ["front", "behind"])
@pytest.mark.parametrize("text", ["a cat", "", "a <*> house"])
def test_embeddings_around_a_text_read_as_words_there(tiny_model, side, text):
    given = [soft(tiny_model, "big")] if "<*>" in text else None
    said = text.replace("<*>", "big")
    literal = f"red dog {said}".strip() if side == "front" else f"{said} red dog".strip()
    around = {side: [soft(tiny_model, "red dog")]}
    with torch.no_grad():
        shown = tiny_model.encode([text], soft=given, **around)
        expected = tiny_model.encode([literal])
    torch.testing.assert_close(shown.states, expected.states, atol=1e-6, rtol=1e-5)
    if shown.pooled is not None:
        torch.testing.assert_close(shown.pooled, expected.pooled, atol=1e-6, rtol=1e-5)
    assert all(torch.equal(shown.masks[name], mask) for name, mask in expected.masks.items())


def test_embeddings_around_a_text_that_do_not_fit_at_all_are_refused(tiny_sd1):
    with pytest.raises(BadInput, match="76 embeddings around the prompt do not fit"):
        tiny_sd1.encode(["a cat"], behind=[{"clip_l": torch.ones(76, 32)}])


def test_what_was_written_encodes_to_the_same_again(tiny_model):
    given = [soft(tiny_model, "big"), None]
    seen = tiny_model.encode(
        ["a <*> cat", "a <*> dog"], soft=given, behind=[None, soft(tiny_model, "red")]
    )
    again = tiny_model.encode_written(seen.written)
    assert torch.equal(again.states, seen.states)
    second = tiny_model.encode_written(seen.written.rows([1]))
    torch.testing.assert_close(second.states[0], seen.states[1], atol=1e-6, rtol=1e-5)


def test_an_edited_condition_no_longer_claims_to_be_what_was_written(tiny_model):
    seen = tiny_model.encode(["a cat"])
    assert seen.written.texts == ("a cat",)
    assert seen.edit(lambda encoder, part: part + 1).written is None


def test_rows_of_another_condition_are_put_in_and_all_others_keep_every_bit(tiny_model):
    seen, other = tiny_model.encode(["a cat", "a dog", "a boat"]), tiny_model.encode(["a red car"])
    both = seen.put([1], other)
    assert torch.equal(both.states[[0, 2]], seen.states[[0, 2]])
    assert torch.equal(both.states[1], other.states[0])
    if seen.pooled is not None:
        assert torch.equal(both.pooled[1], other.pooled[0])
    assert both.written.texts == ("a cat", "a red car", "a boat")
    assert both.prompts == seen.prompts
    for name, mask in both.masks.items():
        assert torch.equal(mask[1], other.masks[name][0])
