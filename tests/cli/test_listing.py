"""`--help`, `list` and `show` answer at once: they never import torch."""

import json
import subprocess
import sys
import time
from dataclasses import MISSING, fields

import pytest
from typer.testing import CliRunner

from safelight.cards import entries, entry
from safelight.cli import app
from safelight.names import KINDS, find, table

HEAVY = ("torch", "diffusers", "transformers", "numpy", "peft")


def run(*words):
    return CliRunner().invoke(app, list(words))


@pytest.mark.parametrize(
    "words",
    [
        *(["--help"], ["list"], ["show", "safetext"], ["list", "--json"], ["align", "--help"]),
        *(["synthesize", "pairs", "--help"], ["show", "llm"]),
    ],
)
def test_listings_import_nothing_heavy(words):
    code = (
        "import sys; from safelight.cli import app\n"
        f"try: app({words!r})\n"
        "except SystemExit as done: assert not done.code, done.code\n"
        f"print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip().splitlines()[-1] == "[]", done.stderr


def test_help_is_fast():
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "safelight", "--help"], capture_output=True, check=True)
    assert time.perf_counter() - began < 3  # about 0.3 s on an idle machine


def test_list_names_everything_in_the_tables():
    listed = json.loads(run("list", "--json").stdout)
    names = {(one["kind"], one["name"]) for one in listed}
    assert names == {(kind, name) for kind in KINDS for name in table(kind)}
    assert all(one.keys() >= {"name", "kind", "summary", "source"} for one in listed)


def test_list_can_be_narrowed():
    listed = json.loads(run("list", "align", "--json").stdout)
    assert {one["kind"] for one in listed} == {"align"}
    assert run("list", "align").exit_code == 0
    assert "safetext" in run("list", "align").stdout


def test_every_listed_method_says_what_it_does():
    for kind in ("align", "guard", "judge", "models", "synthesize"):
        assert all(one.summary for one in entries(kind)), kind


def test_cards_read_from_source_equal_those_of_the_class():
    method = find("align", "safetext")
    read = entry("align", "safetext")
    assert read.card == method.card
    assert [setting.name for setting in read.settings] == [field.name for field in fields(method)]
    for setting, field in zip(read.settings, fields(method), strict=True):
        assert field.default is not MISSING
        assert eval(setting.default) == field.default
        assert setting.help, f"{setting.name} is not explained"


def test_show_prints_settings_defaults_and_claims():
    shown = run("show", "safetext").stdout
    assert "arXiv:2502.20623" in shown and "neg_abs_cosine" in shown and "0.987" in shown
    as_json = json.loads(run("show", "safetext", "--json").stdout)
    assert as_json["card"]["source"] == "arXiv:2502.20623"
    assert "lam" in {setting["name"] for setting in as_json["settings"]}


@pytest.mark.parametrize(
    "words, says",
    [
        (["show", "safetxt"], "Did you mean 'safetext'"),
        (["list", "judge"], "Did you mean 'judges'"),
        (["lst"], "list"),
    ],
)
def test_an_unknown_name_is_wrong_use_with_a_hint(words, says):
    done = run(*words)
    assert done.exit_code == 2
    assert says in done.stderr
    assert "Traceback" not in done.output
