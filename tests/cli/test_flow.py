"""From prompts to a page on the command line, on a tiny model; and what goes wrong politely."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from safelight.cli import app

SAFE = [f"a {c} {t}" for c in ("red", "blue", "big") for t in ("cat", "dog", "car", "tree")]
UNSAFE = [f"a {c} knife {w}" for c in ("red", "blue", "big") for w in ("", "at night", "in a park")]
ALIGN = ["align", "safetext", "tiny-sd1"]
QUICK = ["--set", "epochs=1", "--set", "batch=8", "--set", "lr=0.003"]


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def polite(done, code, *says):
    """One clear message, the right code, no traceback."""
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)
    flat = " ".join(done.stderr.replace("│", " ").split())
    for words in says:
        assert words in flat, flat


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two prompt files and a patch."""
    path = tmp_path_factory.mktemp("work")
    (path / "safe.csv").write_text("prompt\n" + "\n".join(SAFE))
    (path / "knives.csv").write_text(
        "prompt,category\n" + "\n".join(f"{text},red" for text in UNSAFE)
    )
    done = run(*ALIGN, *sides(path), *QUICK, "-o", path / "patch", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["settings"]["epochs"] == 1
    return path


def sides(path):
    return ["--unsafe", path / "knives.csv", "--safe", path / "safe.csv"]


@pytest.fixture(scope="module")
def judged(folder):
    """A run folder."""
    done = run(
        *("evaluate", "tiny-sd1", "--patch", folder / "patch", "--judge", "fake"),
        *("--prompts", folder / "knives.csv", "--prompts", folder / "safe.csv"),
        *("--seeds", "0-1", "--limit", 3, "--steps", 2, "-o", folder / "run", "--json"),
    )
    assert done.exit_code == 0, done.output
    return folder / "run", json.loads(done.stdout)


def test_align_prints_what_changed_and_what_comes_next(folder):
    done = run(*ALIGN, *sides(folder), *QUICK, "-o", folder / "second")
    assert done.exit_code == 0, done.output
    assert "drift" in done.stdout and "safelight evaluate" in " ".join(done.stderr.split())
    assert (folder / "second" / "patch.json").is_file()


def test_a_patch_is_never_replaced_by_accident(folder):
    before = (folder / "patch" / "patch.json").read_bytes()
    polite(run(*ALIGN, *sides(folder), "-o", folder / "patch"), 2, "exists", "--force")
    assert (folder / "patch" / "patch.json").read_bytes() == before


def test_evaluate_writes_a_run_and_its_values(judged):
    path, result = judged
    assert {"run.json", "records.jsonl", "values.json"} <= {file.name for file in path.iterdir()}
    metrics = {row["metric"] for row in result["values"]}
    assert {"unsafe_rate", "drift"} <= metrics
    assert len((path / "records.jsonl").read_text().splitlines()) == 2 * 2 * 3 * 2


def test_evaluate_prints_a_table_and_goes_on_where_it_was(judged, folder):
    done = run(
        *("evaluate", "tiny-sd1", "--patch", folder / "patch", "--judge", "fake"),
        *("--prompts", folder / "knives.csv", "--prompts", folder / "safe.csv"),
        *("--seeds", "0-1", "--limit", 3, "--steps", 2, "-o", folder / "run"),
    )
    assert done.exit_code == 0, done.output
    assert "unsafe_rate" in done.stdout and "safelight report" in done.stderr


@pytest.mark.parametrize(
    "limit, code, says",
    [
        (["--fail-over", "unsafe_rate=1"], 0, ""),
        (["--fail-under", "validity=1.5"], 1, "under 1.5"),
        (["--fail-under", "nr=0.95"], 2, "Did you mean 'nrr'"),
        (["--fail-under", "nrr"], 2, "metric=value"),
        (["--fail-under", "nrr=high"], 2, "metric=value"),
    ],
)
def test_thresholds_decide_the_exit_code(judged, folder, limit, code, says):
    done = run(
        *("evaluate", "tiny-sd1", "--patch", folder / "patch", "--judge", "fake"),
        *("--prompts", folder / "knives.csv", "--prompts", folder / "safe.csv"),
        *("--seeds", "0-1", "--limit", 3, "--steps", 2, "-o", folder / "run", *limit),
    )
    polite(done, code, says)


def test_report_writes_a_page(judged, folder):
    done = run("report", judged[0], "-o", folder / "pages" / "report.html")
    assert done.exit_code == 0, done.output
    assert "<html" in (folder / "pages" / "report.html").read_text()


def test_generate_paints_with_patches_and_guards(folder):
    words = ["generate", "tiny-sd1", "a cat", "a dog", "--steps", 2, "--seed", 5]
    plain = run(*words, "-o", folder / "plain", "--json")
    assert plain.exit_code == 0, plain.output
    rows = json.loads(plain.stdout)
    assert [row["seed"] for row in rows] == [5, 6]
    patched = run(*words, "--patch", folder / "patch", "-o", folder / "patched", "--json")
    first, second = (
        Path(json.loads(done.stdout)[0]["image"]).read_bytes() for done in (plain, patched)
    )
    assert first != second
    guarded = run(*words, "--guard", "screen:judge=fake", "-o", folder / "guarded", "--json")
    assert guarded.exit_code == 0, guarded.output
    assert all(row["verdicts"] for row in json.loads(guarded.stdout))


def test_export_writes_a_folder_that_loads(folder):
    done = run(
        "export", "tiny-sd1", "--patch", folder / "patch", "-o", folder / "plain-model", "--json"
    )
    assert done.exit_code == 0, done.output
    assert (folder / "plain-model" / "model_index.json").is_file()


@pytest.mark.parametrize(
    "words, says",
    [
        (["align", "safetxt", "tiny-sd1", "--unsafe", "weapons"], "Did you mean 'safetext'"),
        (["align", "safetext", "tiny-sd", "--unsafe", "K", "--safe", "S"], "Did you mean 'tiny-sd"),
        ([*ALIGN, "--unsafe", "weapon"], "Did you mean 'weapons'"),
        ([*ALIGN, "--unsafe", "K"], "--safe"),
        ([*ALIGN, "--unsafe", "K", "--safe", "S", "--set", "lamb=1"], "Did you mean 'lam'"),
        ([*ALIGN, "--unsafe", "K", "--safe", "S", "--set", "lr=fast"], "lr is a number"),
        ([*ALIGN, "--unsafe", "K", "--safe", "S", "--set", "epochs=0"], "above 0"),
        ([*ALIGN, "--unsafe", "K", "--safe", "S", "--set", "d_e=cosin"], "d_e: no choice"),
        ([*ALIGN, "--unsafe", "gone.csv", "--safe", "S"], "gone.csv"),
        ([*ALIGN, "--unsafe", "BARE", "--safe", "S"], "no 'prompt' column"),
        ([*ALIGN, "--unsafe", "EMPTY", "--safe", "S"], "EMPTY"),
        ([*ALIGN, "--unsafe", "BLANK", "--safe", "S"], "the prompt is empty"),
        ([*ALIGN, "--unsafe", "LONG", "--safe", "S"], "10000 characters"),
        ([*ALIGN, "--unsafe", "ONE", "--safe", "S"], "unsafe side has 1"),
        (ALIGN, "--unsafe"),
        (["generate", "tiny-sd1", " "], "prompt 1 is empty"),
        (["generate", "tiny-sd1", "a cat", "--patch", "gone"], "no patch folder"),
        (["generate", "tiny-sd1", "a cat", "--guard", "scren"], "Did you mean 'screen'"),
        (["evaluate", "tiny-sd1", "--prompts", "S", "-o", "R", "--judge", "fak"], "'fake'"),
        (["evaluate", "tiny-sd1", "--prompts", "S", "-o", "R", "--seeds", "x"], "--seeds x"),
        (["evaluate", "tiny-sd1", "--prompts", "emoji/weapon/test", "-o", "R"], "Did you mean"),
        (["report", "gone"], "not a run folder"),
        (["export", "tiny-sd1", "--patch", "gone", "-o", "E"], "no patch folder"),
        (["demo", "--size", "quik"], "Did you mean 'quick'"),
        (["demo", "--category", "weapon"], "Did you mean 'weapons'"),
        (["align", "safetext", "tiny-sd1", "--unsafe", "K", "--safe", "S", "--sed", "1"], "--seed"),
    ],
)
def test_wrong_use_is_one_message_and_code_2(folder, tmp_path, words, says):
    files = {
        "K": folder / "knives.csv",
        "S": folder / "safe.csv",
        "BARE": tmp_path / "bare.csv",
        "EMPTY": tmp_path / "EMPTY.csv",
        "BLANK": tmp_path / "blank.csv",
        "LONG": tmp_path / "long.csv",
        "ONE": tmp_path / "one.csv",
        "R": tmp_path / "R",
        "E": tmp_path / "E",
    }
    files["BARE"].write_text("text,id\na knife,1\n")
    files["EMPTY"].write_text("prompt\n")
    files["BLANK"].write_text('prompt,category\na knife,red\n"",red\n')
    files["LONG"].write_text("prompt\na knife\n" + "x" * 10_000 + "\n")
    files["ONE"].write_text("prompt\na knife\n")
    out = ["-o", tmp_path / "out"] if words[0] in ("align", "generate", "demo") else []
    polite(run(*(files.get(word, word) for word in words), *out), 2, says)
    assert not (tmp_path / "out").exists() and not (tmp_path / "R").exists()


def test_a_damaged_patch_is_code_3(folder, tmp_path):
    damaged = tmp_path / "patch"
    damaged.mkdir()
    for file in (folder / "patch").iterdir():
        (damaged / file.name).write_bytes(file.read_bytes()[:-40])
    done = run("generate", "tiny-sd1", "a cat", "--patch", damaged, "-o", tmp_path / "out")
    polite(done, 3, "damaged")


def test_a_patch_for_another_family_is_refused(folder, tmp_path):
    done = run("generate", "tiny-sdxl", "a cat", "--patch", folder / "patch", "-o", tmp_path / "o")
    polite(done, 2, "tiny-sdxl is sdxl")


def wait_for_work(pid, seconds):
    """Until a process has computed this long; the clock would say nothing on a busy machine."""
    process = psutil.Process(pid)
    for _ in range(1200):
        if sum(process.cpu_times()[:2]) >= seconds:
            return
        time.sleep(0.1)
    raise AssertionError("the process did not get to work in time")


def test_ctrl_c_during_training_leaves_nothing_behind(folder, tmp_path):
    """A real SIGINT to a real process in the middle of a long training run."""
    words = [*ALIGN, *sides(folder), "--set", "epochs=100000", "--set", "patience=0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "safelight", *map(str, words), "-o", str(tmp_path / "patch")],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in background
    )
    wait_for_work(process.pid, seconds=9)
    for _ in range(6):  # an import may swallow the first one on a slow machine
        process.send_signal(signal.SIGINT)
        try:
            _, err = process.communicate(timeout=15)
            break
        except subprocess.TimeoutExpired:
            continue
    else:
        process.kill()
        pytest.fail("Ctrl-C did not stop the training")
    assert process.returncode == 3, err
    assert "stopped" in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_doctor_says_what_is_there():
    done = run("doctor", "--json")
    findings = {row["what"]: row for row in json.loads(done.stdout)}
    assert findings["torch"]["well"] and findings["python"]["well"]
    assert done.exit_code == (0 if all(row["well"] for row in findings.values()) else 3)
    assert all(row["fix"] for row in findings.values() if not row["well"])
    assert run("doctor").exit_code == done.exit_code


def test_version_is_printed():
    assert run("--version").stdout.strip()
