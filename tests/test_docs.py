"""Every snippet in the docs runs, on a tiny model in place of the built-in one."""

import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from typer.testing import CliRunner

from safelight import errors, names
from safelight.prompts import PromptSet

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
BLOCK = re.compile(r"^```(python|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TINY = {  # what the docs say -> what the tests run
    '"emoji-world"': '"tiny-sd1"',
    " emoji-world ": " tiny-sd1 ",
    "from safelight.judge.emoji import EmojiJudge, EmojiJudgeB": (
        "from safelight.judge.fake import FakeJudge\nEmojiJudge = EmojiJudgeB = FakeJudge"
    ),
    "from safelight.judge.emoji import EmojiJudgeB": (
        "from safelight.judge.fake import FakeJudge as EmojiJudgeB"
    ),
    "from safelight.judge.emoji import EmojiJudge": (
        "from safelight.judge.fake import FakeJudge as EmojiJudge"
    ),
    "--guard screen ": "--guard screen:judge=fake ",
    "safelight evaluate ": "safelight evaluate --judge fake --steps 2 ",
    "safelight generate ": "safelight generate --steps 2 ",
    "--unsafe weapons": "--unsafe weapons.csv --safe safe.csv --set batch=16",
}


@cache
def blocks(page):
    """(language, text) of each snippet of a page."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


@pytest.fixture
def room(tmp_path, monkeypatch):
    """An empty folder to work in, and few denoising steps."""
    from safelight.models import tiny

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PromptSet, "load", classmethod(small(PromptSet.load)))
    quick = tiny.tiny

    def few_steps(family, seed=0, **settings):
        from dataclasses import replace

        model = quick(family, seed, **settings)
        model.sampling = replace(model.sampling, steps=2)
        return model

    monkeypatch.setattr(tiny, "tiny", few_steps)
    rows = "prompt,category,safe_prompt\n" + "".join(
        f"a knife beside {i} houses,weapons,a dog beside {i} houses\n" for i in range(24)
    )
    Path("weapons.csv").write_text(rows)
    Path("safe.csv").write_text("prompt\n" + "".join(f"a park with {i} trees\n" for i in range(24)))
    return tmp_path


def small(load):
    """Built-in prompt sets by name, made up where this checkout has none."""

    def loaded(cls, name):
        if str(name) not in names.table("prompts"):
            return load(name)
        category = str(name).split("/")[1]
        benign = category in ("safe", "neighbours")
        thing = "a tree" if benign else "a knife"
        rows = [
            {"prompt": f"{thing} and {i} trees", "category": "" if benign else "red"}
            | {"objects": "green" if benign else "", "unsafe_objects": "" if benign else "red"}
            for i in range(70)
        ]
        return PromptSet.of(rows, str(name))

    return loaded


def on_a_tiny_model(text):
    for said, run in TINY.items():
        text = text.replace(said, run)
    return text


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda page: page.stem)
def test_every_snippet_of_a_page_runs(page, room):
    space = {}
    for language, text in blocks(page):
        if language == "python":
            exec(compile(on_a_tiny_model(text), f"{page.name}", "exec"), space)
        else:
            run_commands(on_a_tiny_model(text))


def run_commands(text):
    from safelight.cli import app

    for line in text.strip().splitlines():
        program, *arguments = shlex.split(line)
        assert program == "safelight"
        result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
        assert result.exit_code == 0, f"{line}\n{result.output}"


def test_every_link_leads_somewhere():
    for page in [*DOCS.rglob("*.md"), DOCS.parent / "CONTRIBUTING.md"]:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_is_in_the_index():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    for page in PAGES:
        assert page.name == "index.md" or f"({page.name})" in index


def test_the_cards_are_up_to_date():
    space = {"__name__": "cards", "__file__": str(DOCS / "cards.py")}
    exec(compile((DOCS / "cards.py").read_text(encoding="utf-8"), "cards.py", "exec"), space)
    for name, text in space["pages"]().items():
        assert (DOCS / "cards" / name).read_text(encoding="utf-8") == text, "run `make docs`"


def test_every_error_is_explained():
    text = (DOCS / "errors.md").read_text(encoding="utf-8")
    for error in errors.SafelightError.__subclasses__():
        assert f"| `{error.__name__}` |" in text
        assert re.search(rf"`{error.__name__}` .*\| {error.exit_code} \|", text)


def test_no_snippet_is_in_a_language_that_is_not_run():
    for page in PAGES:
        fences = re.findall(r"^```(\w+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert set(fences) <= {"python", "console", "json", "text", "toml"}, page.name


def test_every_toml_snippet_is_a_suite(tmp_path):
    from safelight.bench.suite import read

    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for i, snippet in enumerate(re.findall(r"^```toml\n(.*?)^```$", text, re.M | re.S)):
            file = tmp_path / f"{page.stem}-{i}.toml"
            file.write_text(snippet)
            for patch in re.findall(r'patches = \["([^"]+)"\]', snippet):
                (tmp_path / patch).mkdir(exist_ok=True)
            assert read(file).rows
