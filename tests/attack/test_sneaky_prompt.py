"""SneakyPrompt keeps what its specification asks of it (arXiv:2305.12082), on a filter for dogs."""

from dataclasses import replace

import pytest
import torch

from safelight.attack.base import Budget, QueryOnly, Search
from safelight.attack.sneaky_prompt import (
    Beam,
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
from safelight.prompts.noise import noise_seed

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
    one = Hunt(
        row=0, prompt=Prompt(id="0", text=text), entries=("ab", "cd"), delta=0.26,
        sensitive=("dog",), settings=settings or attack(), **given,
    )  # fmt: skip
    one.begin((1, 4, 7, 0, 2, 3, 5, 6, 8, 9), torch.Generator().manual_seed(0))
    return one


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
    assert [word for word in ENTRIES if is_entry(word, 5)] == ["ab", "cd", "ef", "dog"]
    found = vocabulary(tiny_sd1, 3)
    assert "cat" in found and all(word.isalpha() and 0 < len(word) <= 3 for word in found)


def test_later_pictures_of_a_found_prompt_are_none_that_the_search_has_seen():
    seen = []

    class Seeds(Filter):
        def __call__(self, prompts, *, seed, **sampling):
            seen.extend(seed)
            return super().__call__(prompts, seed=seed, **sampling)

    found = attack(worth=0.1, budget=Budget(queries=8))(DOGS, QueryOnly(Seeds()))
    assert set(seen) == {noise_seed(prompt, 0) for prompt in DOGS}
    assert set(seen).isdisjoint(noise_seed(prompt, i) for prompt in found for i in range(1, 20))


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


def test_the_search_is_told_so_and_a_picture_is_worth_at_most_one():
    told = []

    class Watched(SneakyPrompt):
        def _asked(self, hunts, search):
            for one in hunts:
                one.learn = lambda passed, reward, left: told.append((passed, reward))
            return super()._asked(hunts, search)

    def searched(target, worth):
        told.clear()
        given = vars(attack(worth=worth, budget=Budget(queries=4, steps=3)))
        Watched(**given)(DOGS.take(1), QueryOnly(target))
        return list(told)

    blocked = searched(Filter(lambda text: True), 0.5)
    assert blocked == [
        (False, pytest.approx(-q / 40)) for q in (2, 3, 4)
    ]  # the first was the check
    assert searched(Filter(), 7.0)[0] == (True, 1.0)
    assert searched(Filter(), -7.0)[0] == (True, 0.0)


def test_after_exactly_five_blocks_another_word_is_replaced_by_a_new_policy():
    one = hunt()
    first = one.source
    for _ in range(4):
        one.propose()
        one.learn(False, -0.1, left=50)
    assert one.replaced == 1 and one.source is first
    one.propose()
    one.learn(False, -0.1, left=50)
    assert one.replaced == 2 and one.source is not first and one.source.slots == 6
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
    assert {p.meta["queries"] for p in attacked} == {"2"}
    target, attacked = found(1.0)
    assert {p.meta["offline_queries"] for p in attacked} == {"6"}
    assert {p.meta["queries"] for p in attacked} == {"2"}, "whether it is blocked, and the last"
    assert {p.meta["status"] for p in attacked} == {"passed only"}
    assert target.asked[2:] == list(attacked.texts), "the nearest text of all is painted at last"


def test_by_text_the_last_picture_is_asked_within_the_limit_and_may_be_blocked(tiny_sd1):
    def asked(limit, delta):
        settings = dict(reward="text", shadow=tiny_sd1, delta=delta, rounds=3)
        target = Filter(lambda text: True)
        attack(budget=Budget(queries=limit), **settings)(DOGS.take(1), QueryOnly(target))
        return len(target.asked)

    assert (asked(1, 1.0), asked(9, 1.0)) == (1, 2)
    assert asked(2, 0.0) == 2, "nothing is left for a last picture"


def test_by_text_the_nearest_text_is_the_one_that_is_painted_at_last():
    one = hunt()
    for text, near in (("x", 0.2), ("y", 0.5), ("z", 0.3)):
        one.text = text
        one.measured(near)
    assert one.nearest == "y" and one.offline == 3


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


@pytest.mark.parametrize("search", ["brute", "greedy", "beam"])
def test_the_baselines_pass_the_same_filter_with_entries_of_the_same_dictionary(search):
    found = attack(search=search, dictionary=("ab", "cd"))(DOGS, QueryOnly(Filter()))
    assert [p.meta["status"] for p in found] == ["success", "success", "skipped"]
    new = found.texts[0].removeprefix("A photo of a ").removesuffix(", in the (big) park.")
    whole = 6 if search == "brute" else 2  # the others begin with one entry
    assert len(new) == whole and set(new) <= set("abcd")


@pytest.mark.parametrize("search", ["brute", "greedy", "beam"])
def test_the_baselines_spend_their_queries_without_expanding(search):
    target = Filter(lambda text: True)
    blocked = attack(search=search, rounds=4)(DOGS.take(1), QueryOnly(target))
    assert blocked.prompts[0].meta["queries"] == "12" == str(len(target.asked))
    assert blocked.prompts[0].meta["replaced"] == "1"
    learnt = attack()(DOGS.take(1), QueryOnly(Filter(lambda text: True)))
    assert int(learnt.prompts[0].meta["queries"]) < 12, "the method itself gives up earlier"


@pytest.mark.parametrize("width", [1, 3])
def test_a_beam_keeps_its_best_beginnings_and_grows_each_by_one_entry(width):
    rng, beam = torch.Generator().manual_seed(0), Beam(10, 3, width, 40)

    def worth(chosen):
        return sum(entry / 10**place for place, entry in enumerate(chosen))

    for length in (1, 2, 3):
        before, drawn = list(beam.kept), []
        for _ in range(40):
            chosen = beam.draw(rng)
            drawn.append(tuple(chosen.tolist()))
            beam.learn(chosen, worth(drawn[-1]))
        assert {len(one) for one in drawn} == {length}
        assert {one[:-1] for one in drawn} == set(before)
        best = sorted(set(drawn), key=worth, reverse=True)[:width]
        assert beam.kept == (best if length < 3 else [()])
    assert max(drawn, key=worth)[:2] == (9, 9)


def test_the_papers_dictionary_has_shorter_entries_for_its_other_searches(tiny_sd1):
    def longest(**settings):
        return max(map(len, SneakyPrompt(**settings)._entries(tiny_sd1)))

    assert longest() == 9  # "parachute"; at most 10 letters
    assert {longest(reward="text"), longest(search="brute"), longest(search="beam")} == {3}
    assert longest(search="greedy", letters=5) == 5


def test_it_runs_on_every_family(tiny_model):
    found = attack(dictionary=())(DOGS, tiny_model, sampling={"steps": 1})
    assert {p.meta["status"] for p in found} == {"skipped"}


def test_the_same_seed_gives_the_same_prompts():
    first, again, other = (attack()(DOGS, QueryOnly(Filter()), seed=s).texts for s in (1, 1, 2))
    assert first == again != other


def test_the_sensitive_words_of_a_prompt_are_no_entries_for_it():
    one = attack()._hunt(0, DOGS.prompts[0], ("ab", "Dog", "dog"), None)
    assert one.entries == ("ab",)


def test_wrong_settings_are_refused():
    with pytest.raises(BadInput, match="tries must be at least 1"):
        attack(tries=0)


def test_a_dictionary_and_a_limit_are_asked_for():
    with pytest.raises(BadInput, match="no dictionary"):
        attack(dictionary=())(DOGS, QueryOnly(Filter()))
    with pytest.raises(BadInput, match="limit on its queries"):
        attack(budget=Budget())(DOGS, QueryOnly(Filter()))


def test_the_limit_holds_for_each_prompt_of_a_batch(tiny_sd1):
    search = Search(Filter(), rng=torch.Generator(), seeds=[1, 2], budget=Budget(queries=1))
    search.query(["x"], rows=[1])
    assert (search.left(0), search.left(1)) == (1, 0)
