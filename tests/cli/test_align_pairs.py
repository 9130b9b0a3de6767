"""`safelight align dpo --pairs`: an expert from a folder; killed and started again; bad input."""

import json
import sys
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from safelight.align.dpo import DPO
from safelight.cli import app
from safelight.errors import MissingExtra
from safelight.models.patch import Patch
from safelight.training.checkpoint import Checkpoint
from safelight.training.twins import Twin

QUICK = ["--set", "iterations=2", "--set", "epochs=1", "--set", "batch=2"]


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A folder with three pairs of weapons, two of gore and one of drugs."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    rows = []
    for i, category in enumerate(["weapons"] * 3 + ["gore"] * 2 + ["drugs"]):
        names = {side: f"{i}-{side}.png" for side in ("safe", "unsafe")}
        for name in names.values():
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name)
        rows.append(asdict(Twin(str(i), category, f"a knife {i}", f"a fish {i}", **names)))
    lines = "\n".join(json.dumps(row) for row in rows)
    (folder / "twins.jsonl").write_text(lines, encoding="utf-8")
    return folder


def test_an_expert_of_one_category_is_learnt_and_shown(pairs, tmp_path):
    out = tmp_path / "expert"
    done = run("align", "dpo", "tiny-sd1", "--pairs", pairs, "--category", "weapons", *QUICK,
               "-o", out)  # fmt: skip
    assert done.exit_code == 0, done.output
    patch = Patch.load(out)
    assert patch.info["categories"] == ["weapons"] and patch.low_rank
    assert patch.info["split"] == {"train": 2, "held": 1, "kept": 0}
    assert "on held-out pairs" in done.stdout and "pairs told apart" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["expert"]  # no checkpoint is left


def test_tensorboard_gets_every_step_of_the_descent(pairs, tmp_path):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    done = run("align", "dpo", "tiny-sd1", "--pairs", pairs, "--category", "weapons", *QUICK,
               "-o", tmp_path / "expert", "--tensorboard", tmp_path / "curves")  # fmt: skip
    assert done.exit_code == 0, done.output
    history = Patch.load(tmp_path / "expert").info["history"]
    drawn = reading.EventAccumulator(str(tmp_path / "curves")).Reload()
    assert "train/loss" in drawn.Tags()["scalars"]
    for name in ("loss", "win", "lose"):
        points = drawn.Scalars(f"train/{name}")
        assert [point.step for point in points] == [1, 2]
        assert [point.value for point in points] == pytest.approx([h[name] for h in history])


def test_without_tensorboard_its_curves_are_refused_before_anything_is_learnt(
    pairs, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    done = run("align", "dpo", "tiny-sd1", "--pairs", pairs, "--category", "weapons", *QUICK,
               "-o", tmp_path / "expert", "--tensorboard", tmp_path / "curves")  # fmt: skip
    assert done.exit_code == MissingExtra.exit_code
    assert "safelight[tensorboard]" in " ".join(done.output.split())
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_stopped_goes_on_where_it_was(pairs, tmp_path, monkeypatch):
    words = ["align", "dpo", "tiny-sd1", "--pairs", pairs, "--category", "gore,weapons",
             "--set", "iterations=4", "--set", "epochs=2", "--set", "batch=2"]  # fmt: skip
    assert run(*words, "-o", tmp_path / "whole").exit_code == 0
    monkeypatch.setattr(Checkpoint, "due", lambda self: True)
    real, steps = DPO.loss, []

    def loss(self, model, batch, rng):
        steps.append(1)
        if len(steps) == 10:  # in the second epoch; the held-out pairs are looked at as well
            raise KeyboardInterrupt
        return real(self, model, batch, rng)

    monkeypatch.setattr(DPO, "check", lambda self, model, material: {"objective": 1.0, "win": 0.0})
    monkeypatch.setattr(DPO, "loss", loss)
    steps += [1] * 6
    stopped = run(*words, "-o", tmp_path / "again")
    assert stopped.exit_code == 3 and "stopped" in stopped.stderr
    kept = tmp_path / ".again.training"
    assert kept.is_file() and not (tmp_path / "again").exists()
    done = run(*words, "-o", tmp_path / "again")
    assert done.exit_code == 0, done.output
    assert "how far a run has come" in " ".join(done.stderr.split())
    assert len(steps) == 10 + 1  # the fourth step only
    assert not kept.exists()
    one, two = (Patch.load(tmp_path / name) for name in ("whole", "again"))
    assert all((up == two.low_rank[name][1]).all() for name, (_, up, _) in one.low_rank.items())


@pytest.mark.parametrize(
    "words, says",
    [
        (["dpo", "tiny-sd1", "--unsafe", "weapons"], "dpo learns from pairs of pictures"),
        (["dpo", "tiny-sd1", "--pairs", "{pairs}", "--safe", "x"], "neither --unsafe nor --safe"),
        (["safetext", "tiny-sd1", "--pairs", "{pairs}"], "safetext learns from prompts"),
        (["safetext", "tiny-sd1", "--category", "gore"], "--category chooses from --pairs"),
        (["dpo", "tiny-sd1", "--pairs", "nowhere"], "no pairs of pictures at nowhere"),
        (["dpo", "tiny-sd1", "--pairs", "{pairs}", "--category", "hate"], "no pairs of hate"),
        (["dpo", "tiny-sd1", "--pairs", "{pairs}", "--category", "drugs"], "one pair of 'drugs'"),
        (["dpo", "tiny-sd1", "--pairs", "{pairs}", "--set", "rank=0"], "rank must be at least 1"),
        (["dpo", "tiny-sd1", "--pairs", "{pairs}", "--set", "variant=ipo"], "named 'ipo'"),
        (["dpa", "tiny-sd1", "--pairs", "{pairs}"], "Did you mean 'dpo'"),
    ],
)
def test_the_wrong_data_is_one_clear_message(pairs, tmp_path, words, says):
    given = [word.format(pairs=pairs) for word in words]
    done = run("align", *given, *QUICK[:4], "-o", tmp_path / "p")
    assert done.exit_code == 2, done.output
    assert says in " ".join(done.stderr.replace("│", " ").split())
    assert not list(tmp_path.iterdir())


def test_a_missing_picture_is_named_and_nothing_is_left(pairs, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in pairs.iterdir():
        if file.name != "1-safe.png":
            (broken / file.name).write_bytes(file.read_bytes())
    done = run("align", "dpo", "tiny-sd1", "--pairs", broken, "--category", "weapons", *QUICK,
               "-o", tmp_path / "p")  # fmt: skip
    assert done.exit_code == 2
    words = " ".join(done.stderr.split())
    assert "1-safe.png" in words and "safelight synthesize pairs" in words
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]
