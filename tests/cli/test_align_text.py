"""What `safelight align` prints of a text-side alignment, and how it refuses bad input."""

import json

import pytest
from typer.testing import CliRunner

from safelight.cli import app
from safelight.models.patch import Patch

SAFE = [f"a {c} {t}" for c in ("red", "blue", "big") for t in ("cat", "dog", "car", "tree")]
UNSAFE = [f"a {c} knife {w}" for c in ("red", "blue", "big") for w in ("", "at night", "in a park")]
QUICK = ["--set", "epochs=1", "--set", "batch=8", "--set", "lr=0.003"]


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """--unsafe and --safe."""
    path = tmp_path_factory.mktemp("sides")
    (path / "safe.csv").write_text("prompt\n" + "\n".join(SAFE))
    (path / "bare.csv").write_text("prompt\n" + "\n".join(UNSAFE))
    rows = "\n".join(f"{text},weapons" for text in UNSAFE)
    (path / "knives.csv").write_text(f"prompt,category\n{rows}")
    return path


@pytest.mark.parametrize("method", ["safetext", "des"])
def test_the_table_shows_what_is_left_of_the_geometry(sides, tmp_path, method):
    data = ["--unsafe", sides / "knives.csv", "--safe", sides / "safe.csv"]
    safe = "\n".join(f"a {t} {w}" for t in ("cat", "car", "church") for w in ("red", "by the sea",
                     "at night", "in a park", "on a hill", "in snow", "here", "there", "up",
                     "down"))  # fmt: skip
    (tmp_path / "many.csv").write_text(f"prompt\n{safe}")
    data[-1] = tmp_path / "many.csv"
    done = run("align", method, "tiny-sd1", *data, *QUICK, "-o", tmp_path / "patch")
    assert done.exit_code == 0, done.output
    assert "spread, against before" in done.stdout and "same 1 neighbours" in done.stdout
    info = json.loads((tmp_path / "patch" / "patch.json").read_text())["info"]
    assert f"{info['geometry']['spread_ratio']:.3f}" in done.stdout
    assert "as it was" not in done.stderr


def test_an_encoder_that_was_left_out_is_named(sides, tmp_path):
    data = ["--unsafe", sides / "knives.csv", "--safe", sides / "safe.csv"]
    only = ["--set", "encoders=clip_g"]
    done = run("align", "des", "tiny-sdxl", *data, *QUICK, *only, "-o", tmp_path / "patch")
    assert done.exit_code == 0, done.output
    words = " ".join(done.stderr.split())
    assert "trained clip_g only; clip_l is as it was" in words


@pytest.mark.parametrize(
    "method, settings, unsafe, says",
    [
        ("des", [], "bare.csv", "--set concepts=WORD"),
        ("des", ["concepts=a,b"], "knives.csv", "concepts names 2"),
        ("des", ["concepts=<|endoftext|>"], "knives.csv", "no tokens"),
        ("sage", [], "knives.csv", "different safe prompts"),
        ("sage", ["batch=8"], "knives.csv", "batch must be larger than k"),
        ("sage", ["perturb=row"], "knives.csv", "Did you mean 'raw'"),
    ],
)
def test_bad_input_is_one_message_and_nothing_half_written(
    sides, tmp_path, method, settings, unsafe, says
):
    data = ["--unsafe", sides / unsafe, "--safe", sides / "safe.csv"]
    pairs = [word for pair in settings for word in ("--set", pair)]
    done = run("align", method, "tiny-sd1", *data, *pairs, "-o", tmp_path / "patch")
    assert done.exit_code == 2, done.output
    flat = " ".join(done.stderr.replace("│", " ").split())
    assert says in flat and "Traceback" not in done.output
    assert not (tmp_path / "patch").exists()


def test_named_concepts_need_no_prompts_and_the_table_says_what_it_is_about(tmp_path):
    quick = ["--set", "iterations=1", "--set", "paint_steps=1", "--set", "painter=frozen",
             "--set", "paintings=1"]  # fmt: skip
    named = run("align", "esd", "tiny-sd1", "--set", "concepts=knife,axe", *quick,
                "-o", tmp_path / "named")  # fmt: skip
    assert named.exit_code == 0, named.output
    assert "esd on its concepts" in named.stdout
    assert Patch.load(tmp_path / "named").info["concepts"] == ["knife", "axe"]
