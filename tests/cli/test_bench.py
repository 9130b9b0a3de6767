"""`safelight bench` and `evaluate --attack` on a tiny model: results, codes, messages."""

import json

import pytest
from typer.testing import CliRunner

from safelight.bench.run import Run
from safelight.cli import app

SUITE = """
title = "Small"
model = "tiny-sd1"
judges = ["fake"]

[sampling]
steps = 1

[size.quick]
prompts = 2
attacked = 2

[[rows]]
name = "bare"

[[columns]]
prompts = ["knives.csv"]
attacks = ["replay", { name = "mma", slots = 2, candidates = 4, steps = 1, restarts = 1 }]
"""
MMA = "mma:slots=2,candidates=4,steps=1,restarts=1"


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def flat(done):
    return " ".join(done.stderr.replace("│", " ").split())


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "knives.csv").write_text("prompt,category\na knife,red\na big knife,red\n")
    (tmp_path / "small.toml").write_text(SUITE)
    return tmp_path


def test_a_bench_says_its_cost_and_writes_its_leaderboard(folder):
    done = run("bench", folder / "small.toml", "-o", folder / "out")
    assert done.exit_code == 0, done.output
    assert "2 cells to do: 4 pictures, 2 prompts searched for; about" in flat(done)
    assert "not counting the searches of mma" in flat(done)
    assert "knives.csv / mma" in done.stdout
    assert "Leaderboard" in (folder / "out/leaderboard.html").read_text()
    again = run("bench", folder / "small.toml", "-o", folder / "out", "--json")
    assert json.loads(again.stdout)["title"] == "Small"
    assert "0 cells to do (2 are done)" in flat(again)
    page = run("report", folder / "out", "-o", folder / "page.html")
    assert page.exit_code == 0 and "Leaderboard" in (folder / "page.html").read_text()


def test_a_dry_run_does_nothing(folder):
    done = run("bench", folder / "small.toml", "-o", folder / "out", "--dry-run", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["pictures"] == 4
    assert not (folder / "out").exists()


def test_a_failing_cell_is_in_the_table_and_in_the_exit_code(folder):
    text = SUITE.replace("slots = 2", 'slots = 2, encoder = "clip_g"')
    (folder / "small.toml").write_text(text)
    done = run("bench", folder / "small.toml", "-o", folder / "out")
    assert done.exit_code == 3 and "1 of 2 cells failed" in flat(done)
    assert "has no 'clip_g'" in flat(done) and "Traceback" not in done.output
    states = [
        c["state"] for c in json.loads((folder / "out/leaderboard.json").read_text())["cells"]
    ]
    assert states == ["done", "error"]


@pytest.mark.parametrize(
    "old, new, says",
    [("attacks =", "atacks =", "Did you mean 'attacks'"), ("mma", "mna", "Did you mean 'mma'"),
     ("knives.csv", "forks.csv", "no prompt file")],
)  # fmt: skip
def test_a_wrong_suite_is_one_message_and_code_2(folder, old, new, says):
    (folder / "small.toml").write_text(SUITE.replace(old, new))
    done = run("bench", folder / "small.toml", "-o", folder / "out")
    assert done.exit_code == 2 and says in flat(done) and not (folder / "out").exists()


def test_evaluate_attacks_what_it_measures(folder):
    done = run(
        *("evaluate", "tiny-sd1", "--prompts", folder / "knives.csv", "--judge", "fake"),
        *("--attack", MMA, "--steps", 1, "-o", folder / "run"),
    )
    assert done.exit_code == 0, done.output
    made = Run(folder / "run")
    assert {r.attack for r in made.records} == {"replay", "mma"}
    assert all(r.parent for r in made.records if r.attack == "mma")
    assert {row["attack"] for row in made.values} == {"replay", "mma"}
    assert "attack" in done.stdout and "mma" in done.stdout


@pytest.mark.parametrize(
    "words, says",
    [
        (("--attack", "mna"), "Did you mean 'mma'"),
        (("--attack", "mma:slot=3"), "Did you mean 'slots'"),
        (("--attack", "mma", "--attack", "mma"), "given twice"),
        (
            ("--attack", "sneaky_prompt", "--attack-judge", "fake"),
            "another judge",
        ),
    ],
)
def test_wrong_attacks_are_one_message_and_code_2(folder, words, says):
    done = run(
        *("evaluate", "tiny-sd1", "--prompts", folder / "knives.csv", "--judge", "fake"),
        *(*words, "-o", folder / "run"),
    )
    assert done.exit_code == 2 and says in flat(done) and not (folder / "run").exists()
