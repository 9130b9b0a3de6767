"""CoProV2's published table becomes pairs."""

import pytest
import torch
from PIL import Image

from safelight.errors import BadInput, NotFound
from safelight.synthesize.base import by_category, read
from safelight.synthesize.coprov2 import read_coprov2
from safelight.synthesize.templates import Templates
from safelight.training.twins import Twins

TABLE = """prompt,image,category
a knife on a table,u_idx_0,Violence
a fork on a table,s_idx_0,Violence
a rude sign,u_idx_1,Harrasment
a friendly sign,s_idx_1,Harrasment
a knife again,u_idx_0,Violence
a bloody child,u_idx_2,Violence
a happy dog,s_idx_2,Violence
a bomb,u_idx_3,Violence
"""


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "CoProv2_train.csv"
    path.write_text(TABLE)
    return path


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i, name in enumerate(("u_idx_0.png", "s_idx_0.png", "u_idx_1.jpg", "s_idx_1.png")):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(folder / name)
    for side in "us":
        Image.new("RGB", (8, 8)).save(folder / f"{side}_idx_2.png")
    return folder


def test_rows_are_paired_by_id_once_and_spelt_right(table, caplog):
    twins = read_coprov2(table)
    assert [(t.id, t.category, t.unsafe_prompt, t.safe_prompt) for t in twins] == [
        ("idx_0", "Violence", "a knife on a table", "a fork on a table"),
        ("idx_1", "Harassment", "a rude sign", "a friendly sign"),
    ], "the first of two rows counts; a row without a partner and one about a minor do not"
    assert "1 rows have no other side" in caplog.text
    assert twins.rows[0].unsafe == ""


def test_a_users_pictures_make_a_folder_of_twins(table, pictures, tmp_path):
    twins = read_coprov2(table, pictures)
    assert [t.unsafe for t in twins] == ["u_idx_0.png", "u_idx_1.jpg"]
    assert twins.images(twins.rows, "safe", (8, 8)).shape == (2, 3, 8, 8)
    twins.save(tmp_path / "pairs")
    again = Twins.load(tmp_path / "pairs")
    assert [t.safe_prompt for t in again] == [t.safe_prompt for t in twins]
    assert [t.unsafe[-4:] for t in again] == [".png", ".jpg"]
    for side in ("unsafe", "safe"):
        a, b = (x.images(x.rows, side, (8, 8)) for x in (twins, again))
        assert torch.equal(a, b)


def test_its_prompts_can_be_painted_by_another_model(table):
    source = read(table)
    assert source.minors == 1
    topics = by_category([source])
    assert list(topics) == ["Harassment", "Violence"]
    rows = Templates().write(topics["Violence"], 9, store=None, watch=print).rows
    assert [(r.text, r.safe_prompt) for r in rows] == [("a knife on a table", "a fork on a table")]


def test_a_missing_picture_folder_or_column_is_said(table, pictures, tmp_path):
    (pictures / "s_idx_1.png").unlink()
    with pytest.raises(NotFound, match="has no picture s_idx_1"):
        read_coprov2(table, pictures)
    with pytest.raises(NotFound, match="no folder of pictures"):
        read_coprov2(table, tmp_path / "gone")
    with pytest.raises(NotFound, match="no file at"):
        read_coprov2(tmp_path / "gone.csv")
    table.write_text("prompt,image\na,u_idx_0\n")
    with pytest.raises(BadInput, match="needs the columns prompt, image, category"):
        read_coprov2(table)


@pytest.mark.parametrize(
    "row, says",
    [("a knife,picture_7,Violence", "line 2: expected a prompt and an image u_ID or s_ID"),
     (",u_idx_7,Violence", "line 2"),
     ("a knife,u_idx_7,Violence", "holds no pair")],
)  # fmt: skip
def test_a_row_of_another_form_is_refused(table, row, says):
    table.write_text(f"prompt,image,category\n{row}\n")
    with pytest.raises(BadInput, match=says):
        read_coprov2(table)
