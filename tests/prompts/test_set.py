"""Prompt sets are read strictly, filtered always, and hashed by content."""

import json
import sys

import pytest

from safelight.errors import BadInput, MissingExtra, NotFound
from safelight.prompts import TABLE, PromptSet
from safelight.prompts.minors import names_a_minor_in_harm
from safelight.prompts.set import LONGEST


@pytest.fixture
def csv_file(tmp_path):
    path = tmp_path / "two.csv"
    path.write_text(
        "id,prompt,category,safe_prompt,objects,seed\n"
        "a,a cat and a bomb,weapons,a cat,cat|bomb,7\n"
        "b,a dog,,,dog,\n"
    )
    return path


def test_a_csv_file_becomes_prompts_with_their_columns(csv_file):
    first, second = PromptSet.load(csv_file)
    assert (first.id, first.text, first.category, first.safe_prompt, first.seed) == (
        "a",
        "a cat and a bomb",
        "weapons",
        "a cat",
        7,
    )
    assert first.meta == {"objects": "cat|bomb"}
    assert (second.category, second.safe_prompt, second.seed) == ("", None, None)


def test_the_same_content_has_the_same_hash_in_every_format(csv_file, tmp_path):
    rows = [
        {"id": "a", "prompt": "a cat and a bomb", "category": "weapons", "safe_prompt": "a cat"}
        | {"objects": "cat|bomb", "seed": 7},
        {"id": "b", "prompt": "a dog", "objects": "dog"},
    ]
    lines = tmp_path / "two.jsonl"
    lines.write_text("\n".join(map(json.dumps, rows)))
    assert PromptSet.load(lines).sha256 == PromptSet.load(csv_file).sha256
    rows[1]["prompt"] = "a doge"
    assert PromptSet.of(rows, "other").sha256 != PromptSet.load(csv_file).sha256


def test_ids_come_from_the_text_when_none_are_given():
    first = PromptSet.of(["a cat", "a dog", "a cat"], "x")
    turned = PromptSet.of(["a dog", "a cat", "a cat"], "x")
    assert {p.id for p in first} == {p.id for p in turned}
    assert len({p.id for p in first}) == 3 and first.distinct == 2


def test_the_minors_filter_drops_and_counts():
    rows = ["a child with a bloody face", "a naked 12-year-old", "a child with a kite", "a bomb"]
    kept = PromptSet.of(rows, "x")
    assert kept.texts == ("a child with a kite", "a bomb")
    assert (kept.raw, kept.dropped, len(kept)) == (4, 2, 2)


@pytest.mark.parametrize(
    "text", ["a te\u200ben, nude", "A ｎｕｄｅ schoolgirl", "sexy_teen", "two boys, one murdered"]
)
def test_the_minors_filter_sees_through_disguise(text):
    assert names_a_minor_in_harm(text)


def test_the_minors_filter_reads_the_category_too():
    assert names_a_minor_in_harm("a teenager on a sofa", category="sexual")
    assert not names_a_minor_in_harm("a teenager on a sofa")
    assert not names_a_minor_in_harm("a drop of blood and a cat in the snow", category="gore")


def test_a_csv_without_a_prompt_column_is_refused_by_name(tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text("text,category\na cat,\n")
    with pytest.raises(BadInput, match="no 'prompt' column .it has: text, category"):
        PromptSet.load(path)


@pytest.mark.parametrize("text", ["", "   ", "x" * (LONGEST + 1), "x" * 10_000])
def test_empty_and_endless_prompts_are_refused(text):
    with pytest.raises(BadInput, match="row 2: the prompt"):
        PromptSet.of(["a cat", text], "x")


def test_an_id_used_twice_is_refused():
    with pytest.raises(BadInput, match="used twice"):
        PromptSet.of([{"id": "a", "prompt": "a cat"}, {"id": "a", "prompt": "a dog"}], "x")


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("empty.csv", b"prompt\n", "holds no prompts"),
        ("broken.jsonl", b'{"prompt": "a cat"}\n{"prompt"', "line 2: not JSON"),
        ("list.jsonl", b"[1]", "expected an object"),
        ("seed.jsonl", b'{"prompt": "a", "seed": "x"}', "not a whole number"),
        ("latin.csv", "prompt\nun café".encode("latin-1"), "not UTF-8"),
        ("notes.txt", b"a cat", "convert it"),
    ],
)
def test_unreadable_files_say_what_is_wrong(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BadInput, match=words):
        PromptSet.load(path)


def test_unknown_names_get_a_suggestion_and_folders_their_content(tmp_path):
    with pytest.raises(NotFound, match="Did you mean 'emoji/weapons/test'"):
        PromptSet.load("emoji/weapons/tset")
    with pytest.raises(NotFound, match="emoji/weapons/paraphrase"):
        PromptSet.load("emoji/weapons")
    with pytest.raises(NotFound, match="no prompt file"):
        PromptSet.load(tmp_path / "missing.csv")


def test_a_parquet_file_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"")
    with pytest.raises(MissingExtra, match=r"safelight\[parquet\]"):
        PromptSet.load(tmp_path / "x.parquet")


def test_part_of_a_set_says_so_in_its_name():
    some = PromptSet.of(["a", "b", "c"], "x")
    assert (some.take(2).name, len(some.take(2)), some.take(9)) == ("x[:2]", 2, some)
    with pytest.raises(BadInput):
        some.take(0)


def test_the_table_names_every_part_of_the_emoji_world():
    assert len(TABLE) == 31 and list(TABLE) == sorted(TABLE)


def test_all_categories_come_in_turns_with_their_own_ids_and_categories():
    one = PromptSet.load("emoji/all/test").take(12)
    assert one.categories == ("alcohol", "death", "drugs", "gesture", "gore", "weapons")
    assert [p.category for p in one][:6] == [p.category for p in one][6:]
    parts = {p.id: p for c in one.categories for p in PromptSet.load(f"emoji/{c}/test")}
    whole = PromptSet.load("emoji/all/test")
    assert len(whole) == len(parts) and all(parts[p.id] == p for p in whole)
