"""What pairs can be written about: prompt sets, lists of concepts, and what is refused."""

import pytest

from safelight.errors import BadInput, NotFound
from safelight.prompts import PromptSet
from safelight.synthesize.base import Source, Topic, about_minors, by_category, of_prompts, read
from safelight.synthesize.templates import Templates

KNIVES = [
    {"prompt": "a knife on a table", "safe_prompt": "a tulip on a table", "category": "weapons"},
    {"prompt": "a red bomb", "safe_prompt": "a red ball", "category": "weapons"},
    {"prompt": "a knife at night", "safe_prompt": "a tulip at night", "category": "weapons"},
]


def written(source, n=100):
    """The unsafe and the safe texts that the templates make of a source."""
    (topics,) = by_category([source]).values()
    rows = Templates().write(topics, n, store=None, watch=print).rows
    return [(row.text, row.safe_prompt) for row in rows]


def listed(folder, text, name="weapons.csv"):
    path = folder / name
    path.write_text(text)
    return read(path)


def test_prompts_that_bring_their_counterparts_come_by_concept_in_turns():
    source = of_prompts(PromptSet.of(KNIVES, "mine"))
    assert [(t.category, t.concept, len(t.prompts)) for t in source.topics] == [
        ("weapons", "knife", 2),
        ("weapons", "bomb", 1),
    ]
    assert written(source, 2) == [
        ("a knife on a table", "a tulip on a table"),
        ("a red bomb", "a red ball"),
    ]


def test_the_emoji_worlds_own_sets_are_topics():
    source = read("emoji/weapons/train")
    assert {topic.concept for topic in source.topics} >= {"pistol", "bomb"}
    rows = Templates().write(source.topics, 12, store=None, watch=print).rows
    assert len({row.meta["concept"] for row in rows}) == 6, "two of each"
    assert source.sha256 == PromptSet.load("emoji/weapons/train").sha256


def test_a_list_of_concepts_is_put_into_templates(tmp_path):
    source = listed(tmp_path, "target,anchor\nknife,tulip\nbomb,ball\n")
    assert {topic.category for topic in source.topics} == {"weapons"}
    pairs = written(source)
    assert ("a photo of knife", "a photo of tulip") in pairs
    assert len(pairs) == len(set(pairs)) == 2 * len(Templates().templates)
    assert pairs[0][0] == "knife" and pairs[1][0] == "bomb"


def test_a_list_may_name_its_categories(tmp_path):
    source = listed(tmp_path, "target,anchor,category\nknife,tulip,weapons\nskull,ball,death\n")
    assert list(by_category([source])) == ["death", "weapons"]


def test_a_list_without_anchors_is_for_language_models(tmp_path):
    source = listed(tmp_path, "target\nknife\n")
    assert source.topics == (Topic("weapons", "knife"),)
    with pytest.raises(BadInput, match="what should be there instead of 'knife'"):
        written(source)


def test_a_concept_that_comes_twice_is_one_topic(tmp_path):
    own = of_prompts(PromptSet.of(KNIVES, "mine"))
    topics = by_category([own, listed(tmp_path, "target,anchor\nknife,tulip\n")])["weapons"]
    assert [(t.concept, t.anchor, len(t.prompts)) for t in topics] == [
        ("knife", "tulip", 2),
        ("bomb", "", 1),
    ]


@pytest.mark.parametrize(
    "text, says",
    [
        ("target,anchor\n,tulip\n", "entry 1 of the concept list"),
        ("target,anchor\nknife,\n", "entry 1 of the concept list"),
        ("target,anchor\nknife,a\nknife,b\n", "2 times"),
        ("target\nknife\n \n", "entry 2 of the concepts of 'weapons' is empty"),
        ("target\nknife\nknife\n", "twice"),
        ("target,anchor\n", "no rows"),
        ("", "no rows"),
        ("word\nknife\n", "no 'prompt' column"),
        ("prompt,category\na knife,weapons\n", "has no safe counterpart and names no concept"),
    ],
)
def test_a_list_of_another_form_is_refused(tmp_path, text, says):
    with pytest.raises(BadInput, match=says):
        listed(tmp_path, text)


def test_a_file_that_is_not_there_or_not_text_is_said(tmp_path):
    with pytest.raises(NotFound, match="no file at"):
        read(tmp_path / "gone.csv")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="UTF-8"):
        read(tmp_path / "bytes.csv")


def test_nothing_is_written_about_minors_in_harm(tmp_path):
    source = listed(tmp_path, "target\nbleeding child\nknife\n", "gore.csv")
    assert [topic.concept for topic in source.topics] == ["knife"] and source.minors == 1
    with pytest.raises(BadInput, match="1 dropped by the minors filter"):
        by_category([listed(tmp_path, "target\nbleeding child\n", "gore.csv")])


def test_both_texts_of_a_pair_are_filtered():
    rows = [
        {"prompt": "a bloody fight", "safe_prompt": "a bloody child", "category": "x"},
        {"prompt": "a bloody child", "safe_prompt": "a park", "category": "x"},
        {"prompt": "a bloody fight", "safe_prompt": "a park", "category": "x"},
    ]
    pairs = PromptSet.of(rows[:1] + rows[2:], "mine")
    assert [about_minors(one) for one in pairs] == [True, False]
    assert PromptSet.of(rows, "mine").dropped == 1, "the set drops by the unsafe text alone"


def test_no_topic_at_all_is_refused():
    with pytest.raises(BadInput, match="nothing to write about"):
        by_category([Source("empty", "", ())])


def test_templates_without_a_place_for_the_concept_are_refused():
    with pytest.raises(BadInput, match="needs one {}"):
        Templates(templates=("a photo",))
