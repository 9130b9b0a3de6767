"""Pairs of pictures on disk: saved, loaded, refused."""

from dataclasses import replace

import pytest
import torch

from safelight.errors import BadInput, NotFound
from safelight.training.twins import Twin, Twins


@pytest.fixture
def twins():
    rng = torch.Generator().manual_seed(0)
    rows = tuple(
        Twin(f"{i}", "weapons", f"knife {i}\u2028still", "tulip", f"u{i}", f"s{i}", i, {"a": "b"})
        for i in range(3)
    )
    pictures = {
        name: torch.rand(3, 8, 8, generator=rng) for row in rows for name in (row.unsafe, row.safe)
    }
    return Twins("mine", rows, pictures=pictures)


def test_saved_pairs_are_loaded_as_they_were_in_eight_bits(twins, tmp_path):
    twins.save(tmp_path / "pairs")
    again = Twins.load(tmp_path / "pairs")
    assert [(r.id, r.unsafe_prompt, r.seed, r.meta) for r in again] == [
        (r.id, r.unsafe_prompt, r.seed, r.meta) for r in twins
    ]
    before, after = (x.images(x.rows, "unsafe", (8, 8)) for x in (twins, again))
    torch.testing.assert_close(before, after, atol=0.5 / 255 + 1e-6, rtol=0)
    assert not torch.equal(after, again.images(again.rows, "safe", (8, 8)))
    again.save(tmp_path / "copy")
    assert Twins.load(tmp_path / "copy").sha256 == again.sha256


def test_a_missing_picture_stops_a_copy_and_leaves_nothing(twins, tmp_path):
    twins.save(tmp_path / "pairs")
    loaded = Twins.load(tmp_path / "pairs")
    (tmp_path / "pairs" / loaded.rows[1].safe).unlink()
    with pytest.raises(BadInput, match="no safe picture .* of 1"):
        loaded.save(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    with pytest.raises(BadInput, match="pair 1 is missing or damaged"):
        loaded.images(loaded.rows, "safe", (8, 8))


def test_rows_that_are_no_pairs_are_refused(tmp_path):
    with pytest.raises(NotFound, match=r"needs a file twins\.jsonl"):
        Twins.load(tmp_path)
    for text, says in (("", "it is empty"), ('{"id": 1}\n', "line 1"), ("half", "line 1")):
        (tmp_path / "twins.jsonl").write_text(text)
        with pytest.raises(BadInput, match=says):
            Twins.load(tmp_path)


def test_categories_that_are_left_out_stay_at_hand(twins):
    gore = tuple(replace(row, id=f"g{row.id}", category="gore") for row in twins)
    whole = replace(twins, rows=twins.rows + gore)
    chosen = whole.only("gore")
    assert chosen.rows == gore and chosen.others == twins.rows
    assert chosen.all().rows == gore + twins.rows and not chosen.all().others
    assert chosen.sha256 == replace(whole, rows=gore).sha256
    assert whole.only("gore", "weapons").others == ()
