"""Distances between readings: their values, their gradients, and which tokens they see."""

from typing import get_args

import pytest
import torch

from safelight.training.embedding import Distance, Piece, Reduction, distance, remember, size

METRICS, REDUCTIONS = get_args(Distance), get_args(Reduction)


def piece(seed: int = 0, content: int = 3) -> Piece:
    """Two rows of five tokens in four dimensions."""
    rng = torch.Generator().manual_seed(seed)
    mask = torch.zeros(2, 5, dtype=torch.long)
    mask[:, :content] = 1
    return Piece(torch.randn(2, 5, 4, generator=rng), mask)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("metric", METRICS)
def test_a_piece_is_as_near_as_can_be_to_itself(metric, reduction):
    nearest = -1.0 if "cosine" in metric else 0.0
    here = distance(piece(), piece(), metric, reduction)
    torch.testing.assert_close(here, torch.full((2,), nearest))
    assert (distance(piece(), piece(1), metric, reduction) > here).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("metric", METRICS)
def test_the_gradient_is_finite_where_both_are_equal(metric, reduction):
    x = piece().states.requires_grad_()
    distance(Piece(x, piece().mask), piece(), metric, reduction).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("metric", ["euclidean", "neg_abs_cosine"])
def test_each_reduction_has_its_own_gradient(metric):
    gradients = []
    for reduction in REDUCTIONS:
        x = piece().states.requires_grad_()
        distance(Piece(x, piece().mask), piece(1), metric, reduction).sum().backward()
        gradients.append(x.grad)
    for i, one in enumerate(gradients):
        assert all(not torch.allclose(one, other) for other in gradients[i + 1 :])


def test_padding_matters_to_flatten_only():
    moved = Piece(piece().states.clone(), piece().mask)
    moved.states[:, 3:] += 1
    seen = {r: distance(moved, piece(), "euclidean", r).sum().item() for r in REDUCTIONS}
    assert seen["flatten"] > 0 and seen["per_token_mean"] > 0
    assert seen["non_pad_only"] == seen["eos_only"] == 0


def test_eos_only_compares_the_last_content_token_of_each():
    short, long = piece(content=2), piece(content=4)
    expected = (short.states[:, 1] - long.states[:, 3]).norm(dim=1)
    torch.testing.assert_close(distance(short, long, "euclidean", "eos_only"), expected)


def test_direct_and_absolute_cosine_differ_past_a_right_angle():
    back = Piece(-piece().states, piece().mask)
    assert distance(back, piece(), "neg_cosine", "flatten").allclose(torch.tensor(1.0))
    assert distance(back, piece(), "neg_abs_cosine", "flatten").allclose(torch.tensor(-1.0))


def test_a_size_is_the_distance_from_nothing():
    nothing = Piece(torch.zeros(2, 5, 4), piece().mask)
    for reduction in REDUCTIONS:
        expected = distance(piece(), nothing, "euclidean", reduction)
        torch.testing.assert_close(size(piece(), reduction), expected)


def test_a_reference_is_what_the_model_says_and_stays_when_the_model_changes(tiny_sd1):
    tau = remember(tiny_sd1, ["a cat", "a dog", "a cat"], ["clip_l"])
    before = tau(["a dog"])["clip_l"].states.clone()
    torch.testing.assert_close(before, tiny_sd1.encode(["a dog"]).stream("clip_l").detach())

    weight = next(tiny_sd1.text_encoders["clip_l"].parameters())
    kept = weight.data
    weight.data = kept + 1
    assert torch.equal(tau(["a dog"])["clip_l"].states, before)
    weight.data = kept


def test_the_nearest_prompt_is_the_prompt_itself_when_it_is_there(tiny_sd1):
    texts = ["a cat", "a red car", "two birds on a hill"]
    tau = remember(tiny_sd1, texts, ["clip_l"])
    assert tau.nearest(["a red car"], texts) == ["a red car"]
    assert tau.nearest(["a red car"], ["a cat", "two birds on a hill"])[0] != "a red car"
