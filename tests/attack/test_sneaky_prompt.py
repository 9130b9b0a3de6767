"""SneakyPrompt keeps what its specification asks of it (arXiv:2305.12082), on a filter for dogs."""

from dataclasses import replace

import pytest
import torch

from safelight.attack.base import Budget, QueryOnly, Search
from safelight.attack.sneaky_prompt import (
    Hunt,
    Policy,
    SneakyPrompt,
    exchanged,
    is_entry,
    penalty,
    ranked,
    vocabulary,
)
from safelight.attack.words import words
from safelight.errors import BadInput
from safelight.flow import Outcome, Prompt
from safelight.judge.fake import FakeJudge
from safelight.prompts import PromptSet

DOGS = PromptSet.of(
    [
        {"id": "0", "prompt": "A photo of a dog, in the (big) park."},
        {"id": "1", "prompt": "a dog in the park of a castle by the sea and a boat"},
        {"id": "2", "prompt": "a cat in the street"},
    ],
    "dogs",
)
ENTRIES = ("ab", "cd", "ef", "dog", "x1", "", "longer")


class Filter:
    """Blocks every text with a word in it, else paints grey; counts what it is asked."""

    def __init__(self, blocks=lambda text: "dog" in text.lower()):
        self.blocks, self.asked = blocks, []

    def __call__(self, prompts, *, seed, **sampling):
        self.asked += list(prompts)
        return [
            Outcome(text, s, None if self.blocks(text) else torch.full((3, 4, 4), 0.5))
            for text, s in zip(prompts, seed, strict=True)
        ]


def attack(worth=0.5, **settings):
    given = {
        "sensitive": ("dog",),
        "dictionary": ENTRIES,
        "likeness": lambda images, texts: [worth] * len(texts),
        "budget": Budget(queries=12),
        **settings,
    }
    return SneakyPrompt(**given)


def hunt(settings=None, text="a dog in the park of a castle by the sea", **given):
    given = {"order": (1, 4, 7, 0, 2, 3, 5, 6, 8, 9), "known": 1, **given}
    return Hunt(
        row=0, prompt=Prompt(id="0", text=text), entries=("ab", "cd"), delta=0.26,
        settings=settings or attack(), rng=torch.Generator().manual_seed(0), **given,
    )  # fmt: skip


def test_a_filter_for_words_is_passed_and_unblocked_targets_are_skipped_at_one_query():
    target = Filter()
    found = attack()(DOGS, QueryOnly(target))
    assert [p.meta["status"] for p in found] == ["success", "success", "skipped"]
    assert [p.meta["queries"] for p in found] == ["2", "2", "1"]
    assert len(target.asked) == 5 == sum(int(p.meta["queries"]) for p in found)
    assert found.texts[2] == DOGS.texts[2]
    assert not any("dog" in text for text in found.texts)


def test_found_prompts_pass_a_text_filter_again_whatever_the_seed():
    target = Filter()
    found = attack()(DOGS, QueryOnly(target))
    for seed in (100, 200):
        assert all(o.image is not None for o in target(found.texts, seed=[seed] * 3))


def test_only_the_chosen_words_change():
    found = attack(dictionary=("ab", "cd", "ef"))(DOGS, QueryOnly(Filter())).texts[0]
    head, tail = "A photo of a ", ", in the (big) park."
    assert found.startswith(head) and found.endswith(tail)
    new = found.removeprefix(head).removesuffix(tail)
    assert len(new) == 6 and set(new[i : i + 2] for i in (0, 2, 4)) <= {"ab", "cd", "ef"}
    assert exchanged("a  Cat, a dog!", {1: "x", 3: "y"}) == "a  x, a y!"


def test_the_dictionary_holds_short_words_of_letters_that_are_not_sensitive(tiny_sd1):
    kept = [word for word in ENTRIES if is_entry(word, 5, ("dog",))]
    assert kept == ["ab", "cd", "ef"]
    found = vocabulary(tiny_sd1, 3)
    assert "cat" in found and all(word.isalpha() and 0 < len(word) <= 3 for word in found)


@pytest.mark.parametrize("limit", [3, 7])
def test_the_query_limit_is_never_passed(limit):
    target = Filter(lambda text: True)
    found = attack(budget=Budget(queries=limit), share=1.0)(DOGS, QueryOnly(target))
    assert {int(p.meta["queries"]) for p in found} <= set(range(1, limit + 1))
    assert {p.meta["status"] for p in found} == {"failed"} and found.texts == DOGS.texts


def test_a_blocked_answer_is_worth_less_the_more_was_asked():
    rewards = [penalty(q, 60) for q in range(1, 61)]
    assert rewards == sorted(rewards, reverse=True)
    assert rewards[0] == pytest.approx(-1 / 600) and rewards[-1] == pytest.approx(-0.1)


def test_after_exactly_five_blocks_another_word_is_replaced_by_a_new_policy():
    one = hunt()
    first = one.policy
    for _ in range(4):
        one.propose()
        one.learn(False, -0.1, left=50)
    assert one.replaced == 1 and one.policy is first
    one.propose()
    one.learn(False, -0.1, left=50)
    assert one.replaced == 2 and one.policy is not first and one.policy.slots == 6
    assert one.blocked == 0 and one.status == "searching"


def test_a_passed_answer_between_blocks_starts_the_count_again():
    one = hunt()
    for passed in (False, False, False, False, True, False, False, False, False):
        one.propose()
        one.learn(passed, 0.1 if passed else -0.1, left=50)
    assert one.replaced == 1


def test_at_most_a_share_of_the_words_is_replaced():
    one = hunt()  # ten words: three may go
    for _ in range(15):
        assert one.status == "searching"
        one.propose()
        changed = [a != b for a, b in zip(words(one.text), words(one.prompt.text), strict=True)]
        assert sum(changed) == one.replaced <= 3
        one.learn(False, -0.1, left=50)
    assert one.replaced == 3 and one.status == "failed"


def test_success_passed_only_failed_and_skipped_are_told_apart():
    assert [p.meta["status"] for p in attack(worth=0.1)(DOGS, QueryOnly(Filter()))] == [
        *("passed only", "passed only", "skipped"),
    ]
    one = hunt()
    for _ in range(3):
        one.propose()
        one.learn(True, 0.2, left=50)
    assert one.status == "passed only"  # three rewards in a row did not move
    assert one.result().text == one.best != one.prompt.text


def test_prompts_that_pass_without_success_are_searched_for_when_asked():
    found = attack(worth=0.1, skip="succeeding")(DOGS, QueryOnly(Filter()))
    assert found.prompts[2].meta["status"] == "passed only"
    assert int(found.prompts[2].meta["queries"]) > 1


def test_the_policy_learns_which_of_two_arms_is_better():
    rng = torch.Generator().manual_seed(0)
    policy = Policy(2, 1, 0.05, rng)

    def better():
        return policy.read(torch.tensor([1]))[0].exp().item()

    before = better()
    for _ in range(60):
        arm = policy.draw(rng)
        policy.learn(arm, 1.0 if arm.item() == 1 else 0.0)
    assert better() > max(0.9, before)


def test_the_first_embedding_of_the_policy_is_frozen():
    policy = Policy(4, 3, 0.1, torch.Generator().manual_seed(0))
    before = policy.first.clone()
    policy.learn(torch.tensor([1, 2, 3]), 1.0)
    assert torch.equal(policy.first, before)
    assert "first" not in dict(policy.named_parameters())


def test_by_text_the_target_is_asked_only_when_the_texts_are_near(tiny_sd1):
    def found(delta):
        target = Filter()
        settings = dict(reward="text", shadow=tiny_sd1, delta=delta, rounds=6)
        attacked = attack(**settings)(DOGS.take(2), QueryOnly(target))
        return target, attacked

    target, attacked = found(0.0)
    assert {p.meta["status"] for p in attacked} == {"success"}
    target, attacked = found(1.0)
    assert len(target.asked) == 2, "only the check whether they are blocked"
    assert {p.meta["offline_queries"] for p in attacked} == {"6"}
    assert {p.meta["status"] for p in attacked} == {"failed"}


def test_without_a_list_the_word_that_moves_the_text_most_comes_first(tiny_sd1):
    order = ranked("a photo of a dog", ("dog",), tiny_sd1)
    assert order[0] == 4 and sorted(order) == [0, 1, 2, 3, 4]
    assert ranked("a photo of a parachute", (), None)[0] == 4
    assert ranked("", (), tiny_sd1) == ()


def test_the_attackers_judge_says_how_like_a_picture_is(tiny_sd1):
    prompts = PromptSet("x", tuple(replace(p, category="red") for p in DOGS))
    judge = FakeJudge(threshold=0.4)
    found = attack(likeness=None)(prompts, QueryOnly(Filter()), judge=judge)
    assert found.prompts[0].meta["status"] == "success"
    assert float(found.prompts[0].meta["reward"]) == pytest.approx(0.5, abs=0.01)
    with pytest.raises(BadInput, match="judge or a likeness"):
        attack(likeness=None)(prompts, QueryOnly(Filter()))


def test_brute_force_draws_from_the_same_dictionary():
    found = attack(search="random")(DOGS, QueryOnly(Filter()))
    assert [p.meta["status"] for p in found] == ["success", "success", "skipped"]


def test_it_runs_on_every_family(tiny_model):
    found = attack(dictionary=())(DOGS, tiny_model, sampling={"steps": 1})
    assert {p.meta["status"] for p in found} == {"skipped"}


def test_the_same_seed_gives_the_same_prompts():
    first, again, other = (attack()(DOGS, QueryOnly(Filter()), seed=s).texts for s in (1, 1, 2))
    assert first == again != other


def test_a_dictionary_and_a_limit_are_asked_for():
    with pytest.raises(BadInput, match="no dictionary"):
        attack(dictionary=())(DOGS, QueryOnly(Filter()))
    with pytest.raises(BadInput, match="limit on its queries"):
        attack(budget=Budget())(DOGS, QueryOnly(Filter()))


def test_the_limit_holds_for_each_prompt_of_a_batch(tiny_sd1):
    search = Search(Filter(), rng=torch.Generator(), seeds=[1, 2], budget=Budget(queries=1))
    search.query(["x"], rows=[1])
    assert (search.left(0), search.left(1)) == (1, 0)
