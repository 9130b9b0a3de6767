"""`safelight synthesize pairs` on a tiny model: results, codes, messages."""

import json

import pytest
from typer.testing import CliRunner

from safelight.cli import app
from safelight.training.twins import Twins


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weapons.csv").write_text("target,anchor\nknife,tulip\nbomb,ball\n")

    def command(*words, out="pairs"):
        given = ("--unsafe", "weapons.csv", "--per-category", 4, "--steps", 1, "-o", out)
        line = [str(word) for word in ("synthesize", "pairs", "tiny-sd1", *given, *words)]
        return CliRunner().invoke(app, line, env={"COLUMNS": "200"})

    return command


def flat(done):
    return " ".join(done.stderr.replace("│", " ").split())


def test_pairs_are_made_and_counted(run, tmp_path):
    done = run()
    assert done.exit_code == 0, done.output
    assert "pairs by tiny-sd1" in done.stdout and "weapons" in done.stdout
    assert "saved 4 pairs in pairs" in flat(done)
    assert len(Twins.load(tmp_path / "pairs")) == 4
    again = run("--json")
    assert again.exit_code == 0, again.output
    said = json.loads(again.stdout)
    assert said["n"] == 4 and said["categories"]["weapons"]["pairs"] == 4
    if not said["parquet"]:
        assert "pyarrow is not installed" in flat(done)


def test_a_judge_that_agrees_with_nothing_is_a_failure(run):
    done = run("--judge", "fake:threshold=2")
    assert done.exit_code == 3 and "not one pair is left" in flat(done)
    assert "did not flag the unsafe picture 4 times" in flat(done)


def test_a_category_without_a_pair_is_a_failure_after_all_else_is_done(run, endpoint, tmp_path):
    (tmp_path / "alone.csv").write_text("target,category\nskull,death\n")
    good = {"pairs": [{"unsafe": "a big knife", "safe": "a big tulip"}]}
    endpoint.answer = lambda body: json.dumps(
        good if "knife" in body["messages"][1]["content"] else {"refused": "no"}
    )
    writer = f"llm:model=pen,url={endpoint.url},pause=0"
    done = run("--unsafe", "alone.csv", "--writer", writer)
    assert done.exit_code == 3 and "saved 1 pairs" in flat(done) and "death" in done.stdout
    assert "skipped skull (death): refused: no" in flat(done)
    assert "categories without a pair: death: no prompts were written" in flat(done)


@pytest.mark.parametrize(
    "words, says",
    [
        (("--writer", "template"), "no writer named 'template'. Did you mean 'templates'"),
        (("--writer", "llm"), "llm needs a model"),
        (("--writer", "llm:modle=x"), "Did you mean 'model'"),
        (("--judge", "fak"), "Did you mean 'fake'"),
        (("--unsafe", "wepons"), "Did you mean 'weapons'"),
        (("--unsafe", "gone.csv"), "no file at gone.csv"),
    ],
)
def test_wrong_use_is_one_message_and_code_2(run, tmp_path, words, says):
    done = run(*words)
    assert done.exit_code == 2 and says in flat(done) and "Traceback" not in done.output
    assert not (tmp_path / "pairs").exists()


def test_other_settings_and_an_unreachable_model_have_their_codes(run):
    assert run().exit_code == 0
    other = run("--seed", 1)
    assert other.exit_code == 2 and "different: seed" in flat(other)
    nobody = "llm:model=pen,url=http://127.0.0.1:9/v1,tries=1"
    done = run("--writer", nobody, out="other")
    assert done.exit_code == 3 and "no answer from http://127.0.0.1:9/v1" in flat(done)
