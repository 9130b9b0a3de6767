"""`safelight explain` shows tokens with their scores, in the terminal, as HTML, SVG and JSON."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from typer.testing import CliRunner

from safelight.cli import app
from safelight.report import tokens

CONCEPTS = "target,anchor\nknife,horse\nbomb,fish\n"
SAFE = "prompt\n" + "".join(f"a {c} {x}\n" for c in ("red", "big") for x in ("cat", "car", "tree"))


def run(*words, **env):
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "120", **env})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sanitizer that learnt from a concept list."""
    path = tmp_path_factory.mktemp("work")
    (path / "concepts.csv").write_text(CONCEPTS)
    (path / "safe.csv").write_text(SAFE)
    done = run(
        *("align", "sanitizer", "tiny-sd1", "--set", f"concepts={path / 'concepts.csv'}"),
        *("--safe", path / "safe.csv", "--set", "epochs=1", "--set", "batch=16"),
        *("--set", "nearby=0", "--set", "variants=0", "-o", path / "g", "--json"),
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["settings"]["concepts"] == ["knife > horse", "bomb > fish"]
    return path


def explain(folder, *words, **env):
    return run("explain", "tiny-sd1", "--guard", folder / "g", *words, **env)


def test_the_terminal_shows_every_token_and_the_highest_scores(folder):
    done = explain(folder, "a small knife", "")
    assert done.exit_code == 0, done.output
    assert "a small knife" in done.stdout and "clip_l" in done.stdout
    assert "no tokens" in done.stdout


def test_json_has_a_score_for_every_token(folder):
    done = explain(folder, "a small knife", "--json")
    (row,) = json.loads(done.stdout)
    assert row["tokens"] == ["a ", "small ", "knife "] and len(row["scores"]) == 3
    assert all(0 <= score <= 1 for score in row["scores"])
    assert row["by"] == "Sanitizer" and row["reads"] == "clip_l"


def test_a_page_and_a_picture_are_written(folder):
    for name in ("page.html", "picture.svg"):
        done = explain(folder, "a small knife & <b>", "-o", folder / "new" / name)
        assert done.exit_code == 0, done.output
        assert name in " ".join(done.stderr.split()).replace(" ", "")
    page = (folder / "new/page.html").read_text()
    assert 'class="token"' in page and "http://" not in page.replace("http://www.w3.org", "")
    root = ET.fromstring((folder / "new/picture.svg").read_text())
    said = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert said[:4] == ["clip_l", "a", "small", "knife"]
    assert len(list(root.iter("{http://www.w3.org/2000/svg}title"))) == len(said) - 1


@pytest.mark.parametrize(
    "words, code, says",
    [
        (["-o", "page.pdf"], 2, "neither .html nor .svg"),
        (["--guard", "screen:judge=fake"], 0, ""),  # beside one that has scores
    ],
)
def test_what_cannot_be_written_is_refused_before_any_work(folder, words, code, says):
    done = explain(folder, "a cat", *words)
    assert done.exit_code == code and says in done.stderr
    assert not Path("page.pdf").exists()


def test_a_guard_without_token_scores_is_refused(folder):
    done = run("explain", "tiny-sd1", "a cat", "--guard", "screen:judge=fake")
    assert done.exit_code == 2
    flat = " ".join(done.stderr.split())
    assert "no token scores" in flat and "safelight align sanitizer" in flat


def test_a_sanitizer_for_another_model_is_refused(folder):
    done = run("explain", "tiny-sdxl", "a cat", "--guard", folder / "g")
    assert done.exit_code == 2 and "trained for sd1" in " ".join(done.stderr.split())
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    "text, says",
    [
        ("target,anchor\nknife,horse\nknife,dog\n", "'knife' 2 times"),
        ("target,anchor\nknife,\n", "entry 1"),
        ("target,anchor\nknife,KNIFE\n", "same tokens"),
        ("word\nknife\n", "columns target and anchor"),
    ],
)
def test_a_bad_concept_list_leaves_nothing_behind(folder, tmp_path, text, says):
    (tmp_path / "c.csv").write_text(text)
    done = run(
        *("align", "sanitizer", "tiny-sd1", "--set", f"concepts={tmp_path / 'c.csv'}"),
        *("--safe", folder / "safe.csv", "-o", tmp_path / "g"),
    )
    assert done.exit_code == 2 and says in " ".join(done.stderr.split())
    assert "Traceback" not in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["c.csv"]


def test_an_unknown_fusion_is_refused(folder, tmp_path):
    for pair in ("fusion=max", "estimate=max", "supervise=max"):
        done = run(
            *("align", "sanitizer", "tiny-sd1", "--set", f"concepts={folder / 'concepts.csv'}"),
            *("--safe", folder / "safe.csv", "--set", pair, "-o", tmp_path / "g"),
        )
        assert done.exit_code == 2 and "no choice named 'max'" in " ".join(done.stderr.split())


def test_prompts_without_safe_counterparts_are_refused(folder, tmp_path):
    (tmp_path / "knives.csv").write_text("prompt,category\na knife,sharp\na long knife,sharp\n")
    done = run(
        *("align", "sanitizer", "tiny-sd1", "--unsafe", tmp_path / "knives.csv"),
        *("--safe", folder / "safe.csv", "-o", tmp_path / "g"),
    )
    flat = " ".join(done.stderr.split())
    assert done.exit_code == 2 and "sharp" in flat and "safe_prompt" in flat
    assert not (tmp_path / "g").exists()


def test_a_run_keeps_token_scores_for_its_report(folder, tmp_path):
    done = run(
        *("evaluate", "tiny-sd1", "--guard", folder / "g", "--prompts", folder / "safe.csv"),
        *("--judge", "fake", "--steps", 1, "--limit", 5, "-o", tmp_path / "run"),
    )
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "run/tokens.json").read_text())
    assert {row["prompts"] for row in rows} == {"safe[:5]"} and len(rows) == 4
    assert all(len(row["tokens"]) == len(row["scores"]) for row in rows)
    done = run("report", tmp_path / "run", "-o", tmp_path / "report.html")
    assert done.exit_code == 0, done.output
    page = (tmp_path / "report.html").read_text()
    assert "What the guard saw" in page and page.count('class="token"') >= 12


def test_a_run_without_such_a_guard_has_no_such_section(folder, tmp_path):
    done = run(
        *("evaluate", "tiny-sd1", "--guard", "screen:judge=fake", "--prompts", folder / "safe.csv"),
        *("--judge", "fake", "--steps", 1, "--limit", 2, "-o", tmp_path / "run"),
    )
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "run/tokens.json").exists()
    assert run("report", tmp_path / "run", "-o", tmp_path / "r.html").exit_code == 0
    assert "What the guard saw" not in (tmp_path / "r.html").read_text()


def test_long_prompts_wrap_in_the_picture():
    words = tuple(f"word{i} " for i in range(60))
    row = {"prompt": "x", "by": "g", "reads": "clip_l", "tokens": words, "scores": [0.7] * 60}
    root = ET.fromstring(tokens.svg([row]))
    width = float(root.get("width"))
    boxes = [box for box in root.iter("{http://www.w3.org/2000/svg}rect") if box.get("x")]
    assert all(float(box.get("x")) + float(box.get("width")) <= width for box in boxes)
    assert len({box.get("y") for box in boxes}) > 3
