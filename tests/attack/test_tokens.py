"""What searches for words share: the vocabulary, frames, ways back to words, reading embeddings."""

import pytest
import torch

from safelight.attack.base import survives
from safelight.attack.tokens import (
    frame,
    nearest,
    sampled,
    simplex,
    spelled,
    told,
    vocabulary,
)
from safelight.errors import BadInput

TEXTS = ["a red cat in the park", "two boats"]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_any_sequence_of_searched_words_comes_back_from_its_tokens(tiny_model):
    words = vocabulary(tiny_model)
    assert len(words) > 30
    for seed in range(20):
        picks = torch.randint(len(words), (6,), generator=rng(seed))
        text = " ".join(spelled(words, picks))
        assert survives(tiny_model, text)
        assert words.tokens(text) == words.ids[picks].tolist()


def test_words_that_name_minors_are_never_searched(tiny_model):
    assert "child" in tiny_model.tokenizers["clip_l"].decode(
        tiny_model.tokenizers["clip_l"]("child").input_ids
    )
    assert not {"child", "kid", "boy", "girl"} & set(vocabulary(tiny_model).words)


def test_encoders_that_share_a_vocabulary_are_searched_together(
    tiny_sd1, tiny_sdxl, tiny_sd3, tiny_flux
):
    seen = [
        (words.encoders, words.others)
        for words in map(vocabulary, (tiny_sd1, tiny_sdxl, tiny_sd3, tiny_flux))
    ]
    assert seen == [
        (("clip_l",), ()),
        (("clip_l", "clip_g"), ()),
        (("clip_l", "clip_g"), ("t5",)),
        (("t5",), ("clip_l",)),
    ]


def test_embeddings_of_words_read_like_the_words(tiny_model):
    words = vocabulary(tiny_model)
    table = words.table(tiny_model)
    frames = [frame(words, text, [0, 0, 1]) for text in TEXTS]
    picks = torch.randint(len(words), (2, 3), generator=rng())
    texts = [f.text(spelled(words, pick)) for f, pick in zip(frames, picks, strict=True)]
    rows = [f.rows(tiny_model, words, table[p]) for f, p in zip(frames, picks, strict=True)]
    with torch.no_grad():
        here, there = told(tiny_model, words, rows, texts), tiny_model.encode(texts)
    torch.testing.assert_close(here.states, there.states, atol=1e-5, rtol=1e-5)
    if there.pooled is not None:
        torch.testing.assert_close(here.pooled, there.pooled, atol=1e-5, rtol=1e-5)
    assert here.prompts == there.prompts and here.encoders == there.encoders
    assert all(torch.equal(here.masks[name], mask) for name, mask in there.masks.items())


def test_gradients_reach_the_free_places(tiny_model):
    words = vocabulary(tiny_model)
    free = words.table(tiny_model)[:2].clone().requires_grad_()
    one = frame(words, TEXTS[0], [0, 1])
    told(tiny_model, words, [one.rows(tiny_model, words, free)], ["x"]).states.sum().backward()
    assert (free.grad.abs().sum(1) > 0).all()


def test_insertion_keeps_the_length_and_the_start_and_shortens_the_padding(tiny_sd1):
    words, k = vocabulary(tiny_sd1), 5
    one = frame(words, TEXTS[0], [0] * k)
    inputs = []
    table = tiny_sd1.text_encoders["clip_l"].get_input_embeddings()
    with torch.no_grad():
        rows = one.rows(tiny_sd1, words, torch.full((k, table.weight.shape[1]), 7.0))
        keep = table.register_forward_hook(lambda module, args, out: inputs.append((args[0], out)))
        seen = told(tiny_sd1, words, [rows], ["x"])
        keep.remove()
    (ids, _), tokenizer = inputs[0], tiny_sd1.tokenizers["clip_l"]
    length = len(words.tokens(TEXTS[0]))
    assert ids.shape == (1, 77) and ids[0, 0] == tokenizer.bos_token_id
    assert seen.masks["clip_l"].sum() == length + k + 2
    assert (ids[0, length + k + 1 :] == tokenizer.eos_token_id).all()


def test_a_prompt_without_room_for_the_free_tokens_is_refused(tiny_sd1):
    words = vocabulary(tiny_sd1)
    full = " ".join(["cat"] * 75)
    assert frame(words, full, []).order == words.tokens(full)
    with pytest.raises(BadInput, match="do not fit"):
        frame(words, full, [0])


def test_a_place_inside_a_word_moves_to_the_next_word(tiny_sd1):
    words = vocabulary(tiny_sd1)
    text = "a quixotic cat"  # the middle word is spelled in several tokens
    assert len(words.tokens(text)) > 4
    one = frame(words, text, [0, 2, len(words.tokens(text))])
    assert one.text(["X", "Y", "Z"]) == "X a quixotic Y cat Z"
    assert [token for token in one.order if token >= 0] == words.tokens(text)


def test_the_projection_returns_rows_of_the_table_by_cosine_and_stays_there():
    table = torch.randn(50, 8, generator=rng()) * torch.rand(50, 1, generator=rng(1))
    points = torch.randn(4, 6, 8, generator=rng(2))
    picks = nearest(points, table)
    cosine = torch.nn.functional.cosine_similarity(points[:, :, None], table, dim=-1)
    assert torch.equal(picks, cosine.argmax(-1))
    assert torch.equal(nearest(table[picks], table), picks)


def test_the_simplex_projection_is_the_exact_one():
    x = torch.randn(20, 3, 40, generator=rng()) * 3
    low, high = x.double().amin(-1, keepdim=True) - 1, x.double().amax(-1, keepdim=True)
    for _ in range(60):  # bisection on the shift, as the authors do it
        s = (low + high) / 2
        over = (x.double() - s).clamp(min=0).sum(-1, keepdim=True) > 1
        low, high = torch.where(over, s, low), torch.where(over, high, s)
    exact = (x.double() - s).clamp(min=0).float()
    p = simplex(x)
    torch.testing.assert_close(p, exact, atol=1e-6, rtol=0)
    assert (p >= 0).all() and (p.sum(-1) - 1).abs().max() < 1e-5
    torch.testing.assert_close(simplex(p), p, atol=1e-6, rtol=0)


def test_the_forward_pass_draws_a_word_instead_of_taking_the_likeliest():
    p = torch.tensor([0.6, 0.4]).expand(500, 2)
    drawn = sampled(p, rng())
    assert torch.equal(drawn.sum(-1), torch.ones(500)) and set(drawn.unique().tolist()) == {0, 1}
    assert 0.3 < drawn[:, 1].mean() < 0.5
    assert torch.equal(drawn, sampled(p, rng()))


def test_the_gradient_of_a_draw_is_the_identity_clamped_to_one():
    p = torch.full((1, 2, 4), 0.25, requires_grad=True)
    given = torch.tensor([[[3.0, -3.0, 0.5, -0.25], [0.0, 1.0, -1.0, 1.5]]])
    sampled(p, rng()).backward(given)
    assert torch.equal(p.grad, given.clamp(-1, 1))
