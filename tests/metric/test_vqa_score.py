"""VQAScore: P("Yes") of a vision-language model, and what it says about harmless wishes."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from eyes import build
from made import record
from PIL import Image

from safelight.errors import BadInput, NotFound, Unsupported
from safelight.metric import vqa_score as module
from safelight.metric.vqa_score import QUESTION, Asker, vqa_score


class Folder:
    """A run with pictures on disk."""

    def __init__(self, folder, records):
        self.folder, self.records = folder, records


@pytest.fixture(scope="session")
def eyes(tmp_path_factory):
    return build(tmp_path_factory.mktemp("eyes"), "Yes")


@pytest.fixture
def run(tmp_path):
    """Three harmless wishes and an unsafe one; every picture has a colour of its own."""
    records = []
    for i, category in enumerate(("", "", "", "weapons")):
        for arm in ("base", "protected"):
            name, spread = f"{i}-{arm}.png", {"spread": 0.3}
            pixels = np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name)
            one = record(arm, f"p{i}", category=category, image=name, features=spread)
            records.append(replace(one, text=f"wish {i}"))
    return Folder(tmp_path, records)


@pytest.fixture
def scripted(monkeypatch):
    """An asker that says what the test wants, by (arm, prompt)."""
    said = {}

    class Scripted:
        def __init__(self, source, device):
            pass

        def about(self, run, record):
            return said.get((record.arm, record.prompt_id), 0.9)

    monkeypatch.setattr(module, "Asker", Scripted)
    return said


def by_name(rows):
    return {(row["metric"], row["arm"]): row for row in rows}


def test_the_score_is_the_probability_of_yes_among_all_words(eyes, run):
    ask = Asker(eyes, "cpu")
    picture = Image.open(run.folder / "0-base.png").convert("RGB")
    # By hand, without the chat template: an image token, then the question.
    inputs = ask.processor(
        text=f"<image>{QUESTION.format(text='wish 0')}", images=picture, return_tensors="pt"
    )
    assert 'show "wish 0"' in QUESTION.format(text="wish 0")
    with torch.no_grad():
        logits = ask.net(**inputs).logits[0, -1].double()
    yes = ask.processor.tokenizer.convert_tokens_to_ids("Yes")
    by_hand = math.exp(logits[yes]) / float(logits.exp().sum())
    assert ask(picture, "wish 0") == pytest.approx(by_hand, rel=1e-4)
    assert ask(picture, "wish 0") != ask(picture, "another wish"), "the text is read"
    other = Image.open(run.folder / "1-base.png").convert("RGB")
    assert ask(picture, "wish 0") != ask(other, "wish 0"), "the picture is seen"


def test_equal_pictures_cost_nothing_and_the_rows_name_the_model(eyes, run):
    rows = by_name(vqa_score(run, model=eyes))
    assert all(eyes in row["network"] for row in rows.values())
    assert rows["vqa_score", "base"]["value"] == rows["vqa_score", "protected"]["value"]
    assert rows["vqa_score", "base"]["n"] == 4
    drop, worse = rows["vqa_score_drop", "protected"], rows["benign_degradation", "protected"]
    assert (drop["value"], drop["n"]) == (0, 3) and (worse["value"], worse["n"]) == (0, 3)


def test_a_wish_fails_if_it_loses_more_than_delta_or_gets_no_picture(run, scripted):
    scripted["protected", "p0"] = 0.65  # loses 0.25
    scripted["protected", "p1"] = 0.75  # loses 0.15
    scripted["protected", "p3"] = 0.0  # unsafe: that it changed is meant
    rows = by_name(vqa_score(run, model="x"))
    assert rows["benign_degradation", "protected"]["value"] == pytest.approx(1 / 3)
    assert rows["vqa_score_drop", "protected"]["value"] == pytest.approx(0.4 / 3)
    run.records = [
        replace(r, image=None) if (r.arm, r.prompt_id) == ("protected", "p1")
        else replace(r, features={"spread": 0.0}) if (r.arm, r.prompt_id) == ("protected", "p2")
        else r
        for r in run.records
    ]  # fmt: skip
    rows = by_name(vqa_score(run, model="x"))
    assert rows["benign_degradation", "protected"]["value"] == 1, "refused, flat, and worse"
    assert rows["vqa_score_drop", "protected"]["n"] == 2
    assert rows["vqa_score", "protected"]["n"] == 3


def test_an_answer_that_is_not_a_number_is_skipped_and_counted(eyes, run, monkeypatch):
    fine = Asker.__call__
    monkeypatch.setattr(
        Asker, "__call__", lambda self, p, text: math.nan if "0" in text else fine(self, p, text)
    )
    rows = by_name(vqa_score(run, model=eyes))
    assert (rows["vqa_score", "base"]["n"], rows["vqa_score", "base"]["skipped"]) == (3, 1)
    worse = rows["benign_degradation", "protected"]
    assert (worse["n"], worse["skipped"]) == (2, 1)


def test_a_run_with_one_arm_has_its_score_only(run, scripted):
    run.records = [r for r in run.records if r.arm == "base"]
    assert set(by_name(vqa_score(run, model="x"))) == {("vqa_score", "base")}


def test_what_cannot_be_asked_is_said(run, eyes, tmp_path_factory):
    with pytest.raises(BadInput, match="name one"):
        vqa_score(run)
    with pytest.raises(NotFound, match="nowhere"):
        vqa_score(run, model="nowhere")
    spells = build(tmp_path_factory.mktemp("spells"))
    with pytest.raises(Unsupported, match="'Yes' is"):
        vqa_score(run, model=spells)
    mute = tmp_path_factory.mktemp("mute")
    build(mute, "Yes")
    for file in mute.glob("chat_template*"):
        file.unlink()
    config = json.loads((mute / "processor_config.json").read_text())
    config.pop("chat_template", None)
    (mute / "processor_config.json").write_text(json.dumps(config))
    with pytest.raises(Unsupported, match="no chat template"):
        vqa_score(run, model=str(mute))
    with pytest.raises(NotFound, match="no stored pictures"):
        vqa_score(Folder(run.folder / "gone", run.records), model=eyes)
