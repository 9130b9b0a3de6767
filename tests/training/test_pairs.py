"""Target and anchor contexts: where they come from, and which token answers to which."""

import pytest
import torch

from safelight.errors import BadInput, NotFound
from safelight.flow import Prompt
from safelight.training.pairs import (
    aligned,
    article_ids,
    bare,
    check_tokens,
    concept_list,
    in_templates,
    of_prompts,
    pair,
    subjects,
)


def ids(*rows, length=10):
    """Rows of token ids, padded with 0, and their masks."""
    padded = [[*row, *[0] * (length - len(row))] for row in rows]
    masks = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
    return torch.tensor(padded), torch.tensor(masks)


def laid(target, anchor, articles=()):
    u, a = ids(target), ids(anchor)
    return aligned(*u, *a, articles)


def test_tokens_that_both_texts_share_answer_to_each_other():
    one = laid([1, 5, 6, 7, 9, 2], [1, 5, 8, 7, 9, 2])
    assert one.goal[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert one.target[0].nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize(
    "target, anchor, inside, after",
    [
        ([1, 5, 60, 61, 62, 7, 2], [1, 5, 8, 7, 2], [2, 2, 2], [3, 4]),  # three tokens on one
        ([1, 5, 60, 7, 2], [1, 5, 80, 81, 82, 7, 2], [4], [5, 6]),  # one on three: the last
        ([1, 5, 60, 61, 7, 2], [1, 5, 80, 81, 82, 7, 2], [2, 4], [5, 6]),  # ends on ends
        ([1, 60, 61, 2], [1, 2], [1, 1], [1]),  # the anchor has nothing there
    ],
)
def test_different_numbers_of_tokens_keep_the_shared_end_together(target, anchor, inside, after):
    one = laid(target, anchor)
    start = one.target[0].nonzero()[0].item()
    assert one.goal[0, start : start + len(inside)].tolist() == inside
    assert one.goal[0, start + len(inside) : len(target)].tolist() == after
    by_place = list(range(start + len(inside), len(target)))  # what plain comparison would do
    assert (after != by_place) == (len(target) != len(anchor))


def test_padding_answers_to_padding_and_never_to_content():
    one = laid([1, 60, 2], [1, 80, 81, 82, 2])
    assert one.goal[0, 3:].tolist() == [5, 5, 5, 6, 7, 8, 9]
    full = laid([1, 60, 2], [1, *range(80, 88), 2])
    assert full.goal[0, 3:].tolist() == [9] * 7  # an anchor without padding: its end mark


def test_an_article_is_no_part_of_a_target():
    assert laid([1, 3, 60, 2], [1, 4, 80, 2], articles=(3, 4)).target[0].tolist()[:4] == [
        *(False, False, True, False)
    ]
    assert laid([1, 3, 60, 2], [1, 4, 80, 2]).target[0].tolist()[:4] == [False, True, True, False]


def test_what_the_anchor_says_as_well_is_no_part_of_a_target():
    two = laid([1, 50, 7, 60, 2], [1, 80, 7, 90, 2])  # "knife under axe", "cat under dog"
    assert two.target[0].tolist()[:5] == [False, True, False, True, False]
    only = laid([1, 50, 50, 2], [1, 50, 2])  # nothing else differs: the same word once more
    assert only.target[0].any()


def test_alignment_fits_real_tokenizers(tiny_model):
    for encoder in tiny_model.text_encoders:
        u = tiny_model.tokenize(encoder, ["a parachute on a hill", "an axe, in the park"])
        a = tiny_model.tokenize(encoder, ["a cat on a hill", "a boat, in the park"])
        one = aligned(*u, *a, article_ids(tiny_model, encoder))
        for row in range(2):
            same = one.goal[row][~one.target[row]][: int(u[1][row].sum())]
            own = u[0][row][~one.target[row]][: len(same)]
            wrong = a[0][row][same] != own
            assert wrong.sum() <= 1  # an article at most


def test_a_pair_knows_the_words_in_which_it_differs():
    assert pair("in a park, an axe, painted", "in a park, a tulip, painted").phrase == "axe"
    assert pair("my old kitchen knife", "my old tulip").phrase == "kitchen knife"


def test_another_phrase_takes_the_targets_place_and_its_mark():
    new = pair("in a park, an axe, painted", "in a park, a tulip, painted").saying("rusty saw")
    assert new.target == "in a park, an rusty saw, painted"
    assert new.anchor == "in a park, a tulip, painted" and new.phrase == "rusty saw"


def test_prompts_with_a_safe_counterpart_are_pairs():
    rows = [Prompt(id="1", text="a knife", category="x", safe_prompt="a cat"),
            Prompt(id="2", text="a bomb", category="x")]  # fmt: skip
    assert [(p.target, p.anchor) for p in of_prompts(rows)] == [("a knife", "a cat")]


def test_a_category_without_any_safe_counterpart_is_named():
    rows = [Prompt(id="1", text="a knife", category="x", safe_prompt="a cat"),
            Prompt(id="2", text="a bomb", category="loud")]  # fmt: skip
    with pytest.raises(BadInput, match="category loud has a safe counterpart.*safe_prompt"):
        of_prompts(rows)


def test_a_concept_list_goes_into_every_template():
    pairs = in_templates(concept_list(["knife > cat", "sharp axe>dog"]), ["a {} here", "{}"])
    assert [(p.target, p.anchor, p.phrase) for p in pairs] == [
        ("a knife here", "a cat here", "knife"), ("a sharp axe here", "a dog here", "sharp axe"),
        ("knife", "cat", "knife"), ("sharp axe", "dog", "sharp axe"),
    ]  # fmt: skip


def test_a_csv_file_stands_for_its_rows(tmp_path):
    path = tmp_path / "concepts.csv"
    path.write_text("target,anchor,note\nknife,cat,x\nbomb,balloon,\n")
    assert concept_list([str(path)]) == ("knife > cat", "bomb > balloon")
    assert concept_list(concept_list([str(path)])) == concept_list([str(path)])


@pytest.mark.parametrize(
    "entries, words",
    [
        (["knife > cat", "knife > dog"], "'knife' 2 times"),
        (["Knife > cat", "knife > dog"], "'knife' 2 times"),
        (["knife >"], "entry 1"),
        ([" > cat"], "entry 1"),
        (["knife > cat", ""], "entry 2"),
        (["knife"], "such as 'knife > tulip'"),
        (["knife > cat > dog"], "entry 1"),
    ],
)
def test_empty_and_double_entries_are_refused(entries, words):
    with pytest.raises(BadInput, match=words):
        concept_list(entries)


def test_concept_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(NotFound, match="no concept list at"):
        concept_list([str(tmp_path / "none.csv")])
    (tmp_path / "c.csv").write_text("word\nknife\n")
    with pytest.raises(BadInput, match="columns target and anchor .it has: word"):
        concept_list([str(tmp_path / "c.csv")])
    (tmp_path / "b.csv").write_bytes(b"target,anchor\n\xff\xfe,x\n")
    with pytest.raises(BadInput, match="UTF-8"):
        concept_list([str(tmp_path / "b.csv")])
    (tmp_path / "e.csv").write_text("target,anchor\nknife,\n")
    with pytest.raises(BadInput, match="entry 1"):
        concept_list([str(tmp_path / "e.csv")])


@pytest.mark.parametrize(
    "target, anchor, words",
    [("  ", "a cat", "no token"), ("a cat", " ", "no token"), ("A  Cat", "a cat", "the same")],
)
def test_texts_that_an_encoder_cannot_tell_apart_are_refused(tiny_sd1, target, anchor, words):
    with pytest.raises(BadInput, match=words):
        check_tokens(tiny_sd1, [pair(target, anchor)], ["clip_l"])
    check_tokens(tiny_sd1, [pair("a dog", "a cat")], ["clip_l"])


def test_subjects_are_what_benign_texts_say_more_often_than_target_contexts_beside_the_phrase():
    benign = [
        f"a picture of a {what}, nice" for what in ("dog", "Cat", "dog.", "cat", "dog", "cat")
    ]
    beside = [pair(f"a picture of a {x}, nice", "a picture of a tulip, nice") for x in "uvwxyz"]
    rare = "a picture of an owl"
    assert subjects(beside, [*benign, rare]) == ("cat", "dog")
    with_dogs = [pair(f"a dog beside a {x}", "a dog beside a tulip") for x in "uvw"]
    assert subjects(with_dogs, benign, times=1.0, least=1) == ("cat", "nice", "of", "picture")
    assert bare("Dog,") == "dog"
