"""`safelight judge`: agreement of stored and fresh verdicts, and one line for every mistake."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from safelight.bench import records as rows
from safelight.cli import app, doctor
from safelight.flow import Record, Verdict


def run(*words, code=0):
    done = CliRunner().invoke(app, ["judge", *map(str, words)], env={"COLUMNS": "150"})
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    return done


def paint(path, red):
    """A picture that the fake judge scores by its red."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.zeros((8, 8, 3), np.uint8)
    array[..., 0] = round(red * 255)
    array[0, 0] = 255 - array[0, 0]
    Image.fromarray(array).save(path)


@pytest.fixture
def finished(tmp_path):
    """A run with two judges' verdicts about eight pictures, of which the first flags four."""
    folder = tmp_path / "run"
    records = []
    for i in range(8):
        name = f"images/{i}.png"
        paint(folder / name, i / 8)
        verdicts = (
            Verdict(i >= 4, i / 8, "one", "", {}),
            Verdict(None if i == 0 else i >= 6, i / 8, "two", "", {}),
        )
        records.append(Record(
            prompt_id=f"p{i}", text="a cat", prompts="set", image=name, verdicts=verdicts
        ))  # fmt: skip
    records.append(Record(prompt_id="refused", text="a dog", prompts="set"))
    rows.append(folder, records)
    judges = [{"name": "one", "threshold": 0.5}, {"name": "two", "threshold": 0.75}]
    (folder / "run.json").write_text(json.dumps({"judges": judges}))
    return folder


@pytest.fixture
def labels(tmp_path):
    file = tmp_path / "labels.csv"
    file.write_text("image,unsafe\n" + "".join(f"{i}.png,{int(i >= 5)}\n" for i in range(8)))
    return file


def test_the_judges_of_a_run_are_compared_without_asking_them_again(finished):
    told = json.loads(run("agreement", finished, "--json").stdout)
    (between,) = told["judges"]
    assert told["pictures"] == 8 and told["labels"] == []
    assert between["table"] == {"both": 2, "only one": 2, "only two": 0, "neither": 3}
    assert between["unknown"] == 1 and 0 < between["kappa"]["value"] < 1
    text = run("agreement", finished).stdout
    assert "one against two" in text and "kappa" in text and "could not tell: 1" in text


def test_judges_are_compared_with_labels(finished, labels):
    told = json.loads(run("agreement", finished, "--labels", labels, "--json").stdout)
    one, two = told["labels"]
    assert one["table"] == {
        "tp": 3, "fp": 1, "fn": 0, "tn": 4, "unknown_unsafe": 0, "unknown_safe": 0
    }  # fmt: skip
    assert two["table"]["unknown_safe"] == 1 and two["table"]["fn"] == 1
    assert one["best_threshold"]["value"] == pytest.approx(4.5 / 8)
    done = run("agreement", finished, "--labels", labels, "--judge", "one")
    assert "one against labels, threshold 0.5" in done.stdout
    assert "fewer than 100 labelled" in done.stderr


def test_another_judge_is_asked_about_the_stored_pictures(finished, labels):
    words = ("--labels", labels, "--judge", "fake", "--judge", "fake:threshold=0.7", "--json")
    told = json.loads(run("agreement", finished, *words).stdout)
    usual, strict = told["labels"]
    assert usual["judge"] == "fake" and usual["table"]["tp"] == 3
    assert strict["threshold"] == 0.7 and strict["table"]["tp"] == 2
    assert usual["auroc"]["value"] == 1


def test_pictures_of_a_file_are_judged_and_compared_with_its_labels(tmp_path):
    for i in range(4):
        paint(tmp_path / "pictures" / f"{i}.png", i / 4)
    Image.new("RGB", (4, 9), (250, 10, 10)).save(tmp_path / "pictures" / "narrow.png")
    listed = [f"pictures/{i}.png,{int(i >= 2)},a cat" for i in range(4)]
    file = tmp_path / "mine.csv"
    file.write_text("\n".join(["image,unsafe,prompt", *listed, "pictures/narrow.png,yes,"]))
    told = json.loads(run("agreement", file, "--judge", "fake", "--json").stdout)
    assert told["labelled"] == 5
    assert told["labels"][0]["table"]["tp"] == 3 and told["labels"][0]["table"]["tn"] == 2


@pytest.mark.parametrize(
    "content, says",
    [
        ("picture,unsafe\nx.png,1\n", "no column 'image'"),
        ("image\nx.png\n", "no column 'unsafe'"),
        ("image,unsafe\n0.png,perhaps\n", "line 2: unsafe is 1 or 0"),
        ("image,unsafe\n0.png,1\n0.png,0\n", "labelled twice"),
        ("image,unsafe\nother.png,1\n", "labels none of these"),
        ("image,unsafe\n", "names no picture"),
        ("image,unsafe\n,1\n", "line 2: no picture is named"),
    ],
)
def test_a_wrong_file_of_labels_is_one_line(finished, tmp_path, content, says):
    file = tmp_path / "labels.csv"
    file.write_text(content)
    assert says in run("agreement", finished, "--labels", file, code=2).stderr


def test_wrong_use_is_one_line(finished, tmp_path):
    assert "Did you mean 'fake'" in run(
        "agreement", finished, "--judge", "fke", "--judge", "one", code=2
    ).stderr  # fmt: skip
    assert "no file at" in run("agreement", tmp_path / "nowhere.csv", code=2).stderr
    assert "not a run folder" in run("agreement", tmp_path, code=2).stderr
    alone = run("agreement", finished, "--judge", "one", code=2)
    assert "name two judges" in alone.stderr
    assert "setting" in run(
        "agreement", finished, "--judge", "fake:treshold=1", "--judge", "one", code=2
    ).stderr  # fmt: skip
    (tmp_path / "x.csv").write_text("image,unsafe\nx.csv,1\n")
    assert "not a picture" in run(
        "agreement", tmp_path / "x.csv", "--judge", "fake", code=2
    ).stderr  # fmt: skip


def test_figures_of_other_packages_are_named_and_their_absence_is_one_line(finished, monkeypatch):
    import sys

    assert "Did you mean 'lpips'" in run("measure", finished, "--figure", "lpis", code=2).stderr
    monkeypatch.setitem(sys.modules, "lpips", None)
    done = run("measure", finished, "--figure", "lpips", code=2)
    assert "pip install 'safelight[lpips]'" in done.stderr
    gone = run("measure", finished, "--figure", "clean_fid", "--real", "nowhere", code=2)
    assert "no folder of pictures" in gone.stderr


def test_doctor_says_what_each_judge_needs(monkeypatch):
    gone = ("onnxruntime", "nudenet")
    monkeypatch.setattr("safelight.judge.base.find_spec", lambda x: None if x in gone else x)
    said = {name: doctor._judge(name) for name in ("opennsfw", "nudenet", "q16", "vlm", "emoji")}
    install = "not ready (optional): needs {}: pip install 'safelight[{}]'"
    assert said["opennsfw"] == install.format("onnxruntime", "checkers")
    assert said["nudenet"] == install.format("onnxruntime, nudenet", "nudenet")
    assert "needs prompts=FILE" in said["q16"] and "would download openai/clip" in said["q16"]
    assert "1.7 GB" in said["q16"] and "model=NAME" in said["vlm"] and said["emoji"] == "ready"


def test_doctor_knows_weights_that_are_here(tmp_path, monkeypatch):
    import huggingface_hub

    assert doctor._fetched(str(tmp_path))
    assert not doctor._fetched("nobody/nothing")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "/cache/x")
    assert doctor._fetched("nobody/nothing")
