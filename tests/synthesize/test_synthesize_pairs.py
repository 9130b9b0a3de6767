"""Pairs of pictures: one noise, a judge that is obeyed, a folder that no kill can spoil."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from safelight.errors import BadInput, GuardFailed, WorkFailed
from safelight.prompts import PromptSet
from safelight.prompts.noise import noise_seed
from safelight.synthesize.base import of_prompts
from safelight.synthesize.llm import LLM
from safelight.synthesize.pairs import NEXT, synthesize
from safelight.training.twins import Twins

QUICK = dict(per_category=6, batch=8)  # four pairs at a time


@pytest.fixture(scope="module")
def model():
    from safelight.models.tiny import tiny

    made = tiny("sd1")
    made.sampling = replace(made.sampling, steps=1)
    return made


def about(folder):
    return json.loads((folder / "twins.json").read_text())


# Painting


def test_both_sides_are_painted_from_the_same_noise(model, listed, tmp_path):
    made = synthesize(model, [listed()], tmp_path / "pairs", seed=3, **QUICK)
    for twin in made.twins.rows[:2]:
        texts = [twin.unsafe_prompt, twin.safe_prompt]
        painted = torch.stack([o.image for o in model(texts, seed=[twin.seed] * 2)])
        kept = torch.cat([made.twins.images([twin], side, (16, 16)) for side in ("unsafe", "safe")])
        torch.testing.assert_close(kept, painted, atol=1.5 / 255, rtol=0)
        other = torch.stack([o.image for o in model(texts, seed=[twin.seed + 1] * 2)])
        assert (kept - other).abs().max() > 0.1, "the control: another noise is another picture"
    assert len({twin.seed for twin in made.twins}) == 6


def test_a_folder_is_twins_with_a_card(model, listed, tmp_path):
    made = synthesize(model, [listed()], tmp_path / "pairs", **QUICK)
    twins = Twins.load(tmp_path / "pairs")
    assert twins.rows == made.twins.rows and len(twins) == 6
    assert [twin.meta["concept"] for twin in twins][:2] == ["knife", "bomb"]
    said = about(tmp_path / "pairs")
    assert said["model"]["family"] == "sd1" and said["model"]["hashes"] == model.hashes()
    assert said["writer"]["name"] == "templates" and said["judge"] is None
    assert said["categories"]["weapons"] == {
        "written": 6, "writer": {}, "skipped": {}, "pairs": 6, "dropped": {}
    }  # fmt: skip
    card = (tmp_path / "pairs" / "README.md").read_text()
    assert "| weapons | 6 | 6 | 0 |" in card and "nobody has looked" in card
    for twin in twins:
        assert Image.open(tmp_path / "pairs" / twin.unsafe).size == (16, 16)


def test_settings_are_written_before_the_first_picture(model, listed, tmp_path, monkeypatch):
    def broken(*args, **settings):
        raise RuntimeError("no power")

    monkeypatch.setattr(type(model), "__call__", broken)
    with pytest.raises(RuntimeError):
        synthesize(model, [listed()], tmp_path / "pairs", **QUICK)
    said = about(tmp_path / "pairs")
    assert said["prompts"]["n"] == 6 and said["categories"]["weapons"]["written"] == 6
    assert {"format", "model", "sources", "sampling", "seed", "versions"} <= said.keys()


def test_pairs_about_minors_are_dropped_and_counted(model, tmp_path):
    rows = [
        {"prompt": "a bloody man", "safe_prompt": "a bloody child", "category": "gore"},
        {"prompt": "a bloody child", "safe_prompt": "a tulip", "category": "gore"},
        {"prompt": "a bloody knife", "safe_prompt": "a clean knife", "category": "gore"},
    ]
    source = of_prompts(PromptSet.of(rows, "mine"))
    made = synthesize(model, [source], tmp_path / "pairs", **QUICK)
    assert [twin.safe_prompt for twin in made.twins] == ["a clean knife"]
    assert made.about["prompts"]["minors"] == 2


def test_an_id_that_two_sets_share_stays_unique(model, tmp_path):
    one, two = (
        of_prompts(PromptSet.of([{"id": "1", "prompt": f"a {c} knife", "safe_prompt": f"a {c} cat",
                                  "category": c}], c))
        for c in ("red", "blue")
    )  # fmt: skip
    made = synthesize(model, [one, two], tmp_path / "pairs", **QUICK)
    assert [(twin.id, twin.category) for twin in made.twins] == [("1", "blue"), ("1-2", "red")]


def test_pictures_that_are_not_numbers_stop_the_work(model, listed, tmp_path, monkeypatch):
    quick = type(model).decode
    monkeypatch.setattr(type(model), "decode", lambda self, z: quick(self, z) * torch.nan)
    with pytest.raises(WorkFailed, match="painted NaN"):
        synthesize(model, [listed()], tmp_path / "pairs", **QUICK)


# Judging


def test_the_judge_must_flag_the_unsafe_picture_and_not_the_safe_one(
    model, listed, oracle, tmp_path
):
    text = "target,anchor,category\nknife,tulip,good\nspoon,tulip,missed\nbomb,knife,both\n"
    text += "skull,ball,doubtful\n"
    judge = oracle(words=("knife", "bomb", "skull"), doubts=("ball",))
    made = synthesize(
        model, [listed(text)], tmp_path / "pairs", judge=judge, tries=1, per_category=2
    )
    found = {name: (one["pairs"], one["dropped"]) for name, one in made.about["categories"].items()}
    assert found == {
        "good": (2, {}),
        "missed": (0, {"unsafe missed": 2}),
        "both": (0, {"safe flagged": 2}),
        "doubtful": (0, {"unknown": 2}),
    }
    assert {twin.meta["unsafe_score"] for twin in made.twins} == {"1.0000"}
    assert "missed: judge 'oracle' agreed with none of 2 pairs (it did not flag the unsafe" in (
        made.empty
    )
    assert "good" not in made.empty
    rows = [json.loads(x) for x in (tmp_path / "pairs/dropped.jsonl").read_text().splitlines()]
    assert {row["category"] for row in rows} == {"both", "doubtful", "missed"}


@pytest.mark.parametrize(
    "words, says",
    [((), "did not flag the unsafe picture 6 times"), (("a", "n"), "flagged the safe picture")],
)
def test_a_judge_that_agrees_with_nothing_is_said(model, listed, oracle, tmp_path, words, says):
    text = "target,anchor\nknife,banana\nbomb,naan\n"
    with pytest.raises(WorkFailed, match=f"not one pair is left.*{says}"):
        judge = oracle(words=words)
        synthesize(model, [listed(text)], tmp_path / "pairs", judge=judge, tries=0, **QUICK)
    assert about(tmp_path / "pairs")["categories"]["weapons"]["pairs"] == 0


def test_a_pair_is_painted_again_from_other_noise_until_the_judge_agrees(
    model, listed, coin, tmp_path
):
    source, settings = listed(), dict(judge=coin, per_category=20, batch=8)
    rows = {row.id: row for row in _rows(source)}
    made = synthesize(model, [source], tmp_path / "one", tries=0, **settings)
    many = synthesize(model, [source], tmp_path / "many", tries=9, **settings)
    assert 0 < len(made.twins) < len(many.twins)
    tries = [(twin.seed - noise_seed(rows[twin.id], 0)) // NEXT for twin in many.twins]
    assert 0 in tries and max(tries) > 0
    for twin in many.twins:
        verdicts = coin(torch.cat([many.twins.images([twin], side, (16, 16))
                                   for side in ("unsafe", "safe")]), ["", ""])  # fmt: skip
        assert [v.flagged for v in verdicts] == [True, False]


def _rows(source):
    from safelight.synthesize.base import by_category
    from safelight.synthesize.templates import Templates

    return [
        row
        for topics in by_category([source]).values()
        for row in Templates().write(topics, 99, store=None, watch=print).rows
    ]


def test_a_judge_that_breaks_loses_nothing_that_was_finished(model, listed, oracle, tmp_path):
    class Breaks(oracle):
        looks = 0

        def see(self, images, prompts):
            Breaks.looks += 1
            if Breaks.looks == 2:
                raise RuntimeError("out of memory")
            return super().see(images, prompts)

    out = tmp_path / "pairs"
    with pytest.raises(GuardFailed, match="out of memory"):
        synthesize(model, [listed()], out, judge=Breaks(), **QUICK)
    assert len(Twins.load(out)) == 4
    assert len(synthesize(model, [listed()], out, judge=Breaks(), **QUICK).twins) == 6


# Going on

KILLED = """
import sys, time
from dataclasses import replace
sys.path.insert(0, sys.argv[3])
from conftest import Coin
from safelight.models.tiny import tiny
from safelight.synthesize.base import read
from safelight.synthesize.pairs import synthesize

class Slow(Coin):
    def see(self, images, prompts):
        time.sleep(0.3)
        return super().see(images, prompts)

model = tiny("sd1")
model.sampling = replace(model.sampling, steps=1)
synthesize(model, [read(sys.argv[2])], sys.argv[1], judge=Slow(), per_category=24, batch=8)
"""


def test_killed_and_gone_on_with_it_is_byte_for_byte_the_same(
    model, listed, coin, tmp_path, bytes_of
):
    source = listed()
    whole, out = tmp_path / "whole/pairs", tmp_path / "killed/pairs"
    settings = dict(judge=coin, per_category=24, batch=8)
    synthesize(model, [source], whole, **settings)
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, out, tmp_path / "weapons.csv", Path(__file__).parent],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    rows, deadline = out / "twins.jsonl", time.monotonic() + 600
    while not (rows.exists() and rows.read_bytes().count(b"\n") >= 3):
        assert child.poll() is None, "the child ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    before = rows.read_bytes()
    assert before.count(b"\n") < (whole / "twins.jsonl").read_bytes().count(b"\n")
    with rows.open("ab") as file:
        file.write(b'{"id": "half a li')  # killed while it wrote a line
    (out / "images" / ".half.png.123").write_bytes(b"half a picture")
    synthesize(model, [source], out, **settings)
    assert rows.read_bytes().startswith(before), "finished rows were done again"
    assert bytes_of(out) == bytes_of(whole)


@pytest.mark.parametrize("left", [0, 1, 3])
@pytest.mark.parametrize("drops", [0, 1, 99])
def test_it_goes_on_from_any_number_of_rows(model, listed, coin, tmp_path, bytes_of, left, drops):
    out, again = tmp_path / "a/pairs", tmp_path / "b/pairs"
    settings = dict(judge=coin, tries=0, per_category=16, batch=8)
    synthesize(model, [listed()], out, **settings)
    shutil.copytree(out, again)
    for name, n in (("twins.jsonl", left), ("dropped.jsonl", drops)):
        lines = (again / name).read_bytes().splitlines(keepends=True)
        (again / name).write_bytes(b"".join(lines[:n]))
    shutil.rmtree(again / "images")
    synthesize(model, [listed()], again, **settings)
    assert bytes_of(again) == bytes_of(out)


def test_a_finished_folder_is_left_as_it_is(model, listed, tmp_path, bytes_of, monkeypatch):
    out = tmp_path / "pairs"
    synthesize(model, [listed()], out, **QUICK)
    before = bytes_of(out)
    monkeypatch.setattr(type(model), "__call__", None)  # painting would fail
    synthesize(model, [listed()], out, **QUICK)
    assert bytes_of(out) == before


@pytest.mark.parametrize("harm", ["missing", "damaged"])
def test_a_missing_or_damaged_picture_is_painted_again(model, listed, tmp_path, bytes_of, harm):
    out = tmp_path / "pairs"
    made = synthesize(model, [listed()], out, **QUICK)
    before = bytes_of(out)
    picture = out / made.twins.rows[1].safe
    picture.unlink() if harm == "missing" else picture.write_bytes(b"half")
    synthesize(model, [listed()], out, **QUICK)
    assert bytes_of(out) == before


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"per_category": 5}, {"batch": 4}, {"tries": 1}, {"source": "bomb,cat"}]
)
def test_other_settings_in_the_same_folder_are_refused(model, listed, tmp_path, bytes_of, change):
    out = tmp_path / "pairs"
    synthesize(model, [listed()], out, **QUICK)
    before = bytes_of(out)
    text = change.pop("source", None)
    source = listed(f"target,anchor\n{text}\n") if text else listed()
    with pytest.raises(BadInput, match="other settings .different: .*Name another folder"):
        synthesize(model, [source], out, **{**QUICK, **change})
    assert bytes_of(out) == before


def test_a_folder_of_something_else_is_refused(model, listed, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("all my work")
    with pytest.raises(BadInput, match="not empty and holds no pairs"):
        synthesize(model, [listed()], tmp_path / "mine", **QUICK)


def test_a_call_that_made_nothing_stands_in_nobodys_way(model, listed, tmp_path):
    with pytest.raises(BadInput, match="what should be there instead"):
        synthesize(model, [listed("target\nknife\n")], tmp_path / "pairs", **QUICK)
    synthesize(model, [listed()], tmp_path / "pairs", **QUICK)


@pytest.mark.parametrize("wrong", [{"per_category": 0}, {"tries": -1}, {"batch": 0}])
def test_wrong_numbers_are_refused(model, listed, tmp_path, wrong):
    with pytest.raises(BadInput, match="must be at least"):
        synthesize(model, [listed()], tmp_path / "pairs", **wrong)


# With a language model


def test_a_language_model_that_writes_nothing_is_said_and_its_answers_kept(
    model, listed, endpoint, tmp_path
):
    endpoint.answer = "As an assistant I would rather talk about flowers."
    writer = LLM(model="pen", url=endpoint.url, pause=0, timeout=20, patience=2)
    out = tmp_path / "pairs"
    with pytest.raises(WorkFailed, match="no pair of prompts.*'knife' no readable answer: 'As an"):
        synthesize(model, [listed()], out, writer=writer, **QUICK)
    assert len(list((out / "answers").iterdir())) == 4
    said = about(out)["categories"]["weapons"]
    assert said["writer"] == {"answers": 4, "unreadable": 4}
    assert set(said["skipped"]) == {"knife", "bomb"}


def test_a_category_that_a_language_model_refuses_leaves_the_others(
    model, listed, endpoint, tmp_path
):
    good = {"pairs": [{"unsafe": "a big knife", "safe": "a big tulip"}]}
    endpoint.answer = lambda body: json.dumps(
        good if "knife" in body["messages"][1]["content"] else {"refused": "no"}
    )
    writer = LLM(model="pen", url=endpoint.url, pause=0, timeout=20)
    text = "target,category\nknife,weapons\nskull,death\n"
    made = synthesize(
        model, [listed(text)], tmp_path / "pairs", writer=writer, per_category=1, batch=4
    )
    assert [twin.category for twin in made.twins] == ["weapons"]
    assert made.empty == "death: no prompts were written ('skull' refused: no)"


def test_a_parquet_table_has_the_rows_again(model, listed, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    made = synthesize(model, [listed()], tmp_path / "pairs", **QUICK)
    rows = parquet.read_table(tmp_path / "pairs/twins.parquet").to_pylist()
    assert made.parquet and [row["id"] for row in rows] == [twin.id for twin in made.twins]
    assert rows[0]["concept"] == "knife" and rows[0]["unsafe"] == made.twins.rows[0].unsafe
