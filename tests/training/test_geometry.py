"""Spread and neighbourhoods of harmless prompts: their values, and what they are blind to."""

import pytest
import torch

from safelight.training import geometry
from safelight.training.embedding import Piece
from safelight.training.geometry import compare, neighbours, overlap, spread


def rows(n=12, d=6, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def reading(x):
    return {"clip_l": Piece(x[:, None], torch.ones(len(x), 1, dtype=torch.long))}


def test_spread_is_the_trace_of_the_covariance_of_unit_rows():
    x = torch.tensor([[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0]])  # mean of the unit rows: (0, 1/3)
    assert spread(x).item() == pytest.approx((3 - 3 / 9) / 2)
    unit = rows() / rows().norm(dim=1, keepdim=True)
    assert spread(rows()).item() == pytest.approx(torch.cov(unit.T).trace().item(), rel=1e-5)


def test_spread_does_not_see_scale_and_is_zero_for_a_collapsed_batch():
    assert spread(7 * rows()).item() == pytest.approx(spread(rows()).item(), rel=1e-5)
    assert spread(rows(1).expand(5, 6)).item() == pytest.approx(0, abs=1e-6)
    assert spread(rows() + 3).item() < spread(rows()).item()  # crowding together is seen


def test_neighbours_are_the_nearest_by_cosine_without_the_row_itself():
    x = torch.tensor([[1.0, 0.0], [9.0, 1.0], [0.0, 1.0], [-1.0, 0.1]])
    assert neighbours(x, 1).tolist() == [[1], [0], [1], [2]]


def test_overlap_is_jaccards():
    a = torch.tensor([[1, 2, 3], [0, 2, 3]])
    b = torch.tensor([[3, 2, 1], [0, 4, 5]])
    assert overlap(a, b).item() == pytest.approx((1 + 1 / 5) / 2)


def test_nothing_changed_is_one_and_one():
    seen = compare(reading(rows(40)), reading(rows(40)))
    assert seen["spread_ratio"] == pytest.approx(1) and seen["jaccard"] == 1
    assert (seen["prompts"], seen["k"]) == (40, 10)


def test_crowding_and_scrambling_are_told_apart():
    x = rows(80)
    crowded = compare(reading(x), reading(x + 4))
    scrambled = compare(reading(x), reading(x[torch.randperm(80)]))
    assert crowded["spread_ratio"] < 0.3 and crowded["jaccard"] > 0.5
    assert scrambled["spread_ratio"] == pytest.approx(1, rel=1e-4) and scrambled["jaccard"] < 0.3
    assert crowded["k"] == geometry.K


def test_pieces_are_averaged():
    two = reading(rows(20)) | {"t5": Piece(rows(20, seed=1)[:, None], torch.ones(20, 1).long())}
    moved = two | {"t5": Piece(two["t5"].states + 2, two["t5"].mask)}
    seen = compare(two, moved)
    own = [one["spread_ratio"] for one in seen["pieces"].values()]
    assert own[0] == pytest.approx(1) and own[1] < 0.9
    assert seen["spread_ratio"] == pytest.approx(sum(own) / 2)


@pytest.mark.parametrize("n", [1, 2])
def test_too_few_prompts_say_nothing(n):
    seen = compare(reading(rows(n)), reading(rows(n)))
    assert seen["spread_ratio"] is None and seen["jaccard"] is None
