"""Rows survive a round trip, a kill in the middle of a line, and a full disk."""

import errno
import os

import pytest

from safelight.bench import records
from safelight.errors import BadInput
from safelight.flow import Record, Verdict

VERDICT = Verdict(True, 0.9, "judge", "bomb", {"object:bomb": 0.9, "object:cat": 0.0})
ROW = Record(
    prompt_id="a",
    text="une bombe \u2028 \u0085 \n 爆弾",
    prompts="set",
    category="weapons",
    image="images/aa/a.png",
    verdicts=(VERDICT, Verdict(None, 0.0, "other")),
    features={"spread": 0.25, "drift": {"net": 0.5}},
    meta={"objects": "bomb"},
)


def test_a_row_survives_a_round_trip(tmp_path):
    records.append(tmp_path, [ROW, ROW])
    first, second = records.read(tmp_path)
    assert first == second
    assert first.verdicts[0].scores == {"object:bomb": 0.9}, "a score of 0 is left out"
    assert first.verdicts[1].flagged is None
    same = {k: v for k, v in vars(first).items() if k != "verdicts"}
    assert same == {k: v for k, v in vars(ROW).items() if k != "verdicts"}


@pytest.mark.parametrize("cut", [1, 10, 200])
def test_an_unfinished_last_line_is_ignored_and_then_removed(tmp_path, cut):
    records.append(tmp_path, [ROW, ROW])
    path = tmp_path / records.RECORDS
    path.write_bytes(path.read_bytes()[:-cut])
    assert len(records.read(tmp_path)) == 1
    records.heal(tmp_path)
    records.append(tmp_path, [ROW])
    assert len(records.read(tmp_path)) == 2


def test_damage_before_the_last_line_is_an_error_and_not_a_smaller_run(tmp_path):
    records.append(tmp_path, [ROW])
    with (tmp_path / records.RECORDS).open("ab") as file:
        file.write(b'{"prompt_id": "b"}\n')
    with pytest.raises(BadInput, match="line 2"):
        records.read(tmp_path)


def test_an_append_that_fails_half_way_leaves_no_half_line(tmp_path, monkeypatch):
    records.append(tmp_path, [ROW])

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            records.append(tmp_path, [ROW])
    records.append(tmp_path, [ROW])
    assert len(records.read(tmp_path)) == 2


def test_a_picture_is_stored_once_under_its_hash_or_only_named(tmp_path):
    name = records.put_image(tmp_path, b"png")
    assert records.put_image(tmp_path, b"png") == name
    assert (tmp_path / name).read_bytes() == b"png"
    other = records.put_image(tmp_path, b"secret", store=False)
    assert other.startswith("images/") and not (tmp_path / other).exists()


def test_a_file_that_could_not_be_written_whole_does_not_appear(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        records.write_json(tmp_path / "values.json", [])
    assert list(tmp_path.iterdir()) == []


def test_nan_is_never_written_as_a_number(tmp_path):
    with pytest.raises(ValueError):
        records.write_json(tmp_path / "values.json", [float("nan")])
