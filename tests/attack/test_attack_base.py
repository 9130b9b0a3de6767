"""The base of all attacks: access, budget, determinism, and what comes back."""

from dataclasses import dataclass, replace

import pytest
import torch

from safelight.attack.base import Attack, Budget, QueryOnly, Search, survives
from safelight.errors import BadInput, Unsupported, WorkFailed
from safelight.flow import Card, Prompt
from safelight.guard.base import Guarded
from safelight.prompts import PromptSet
from safelight.prompts.noise import noise_seed

CARD = Card(title="scripted", source="tests")
WISHES = PromptSet.of(
    [{"id": f"p{i}", "prompt": f"a {word}", "category": "red"} for i, word in enumerate(
        ("cat", "dog", "bird", "horse", "fish"))],
    "wishes",
)  # fmt: skip


@dataclass(kw_only=True)
class Scripted(Attack):
    """Appends a word."""

    card = CARD
    access = "prompts"
    word: str = "red"

    def rewrite(self, prompts, search):
        return [replace(prompt, text=f"{prompt.text} {self.word}") for prompt in prompts]


class Drawn(Scripted):
    access = "images"

    def rewrite(self, prompts, search):
        search.step(3)
        search.record(loss=1.0)
        search.query([prompt.text for prompt in prompts])
        n = int(torch.randint(1000, (1,), generator=search.rng))
        return [replace(prompt, text=f"{prompt.text} {n}") for prompt in prompts]


class Inner(Scripted):
    access = "gradients"


def without_seconds(prompts):
    return [replace(p, meta={k: v for k, v in p.meta.items() if k != "seconds"}) for p in prompts]


def test_an_attacked_prompt_knows_its_parent_and_keeps_the_rest(tiny_sd1):
    attacked = Scripted()(WISHES, tiny_sd1)
    assert [p.text for p in attacked] == [f"{text} red" for text in WISHES.texts]
    assert [p.parent for p in attacked] == [p.id for p in WISHES]
    assert [p.id for p in attacked] == [f"{p.id}~test_attack_base" for p in WISHES]
    assert {p.category for p in attacked} == {"red"}
    assert attacked.name == "wishes"


def test_an_attacked_prompt_is_painted_from_the_noise_of_its_parent(tiny_sd1):
    for old, new in zip(WISHES, Scripted()(WISHES, tiny_sd1), strict=True):
        assert noise_seed(old, 2) == noise_seed(new, 2)


def test_queries_steps_and_seconds_are_counted_per_prompt(tiny_sd1):
    curve = []
    attacked = Drawn()(WISHES, tiny_sd1, batch=2, sampling={"steps": 1}, curve=curve)
    assert {(p.meta["queries"], p.meta["steps"]) for p in attacked} == {("1", "3")}
    assert all(float(p.meta["seconds"]) > 0 for p in attacked)
    assert [row["batch"] for row in curve] == [0, 1, 2]


def test_the_same_seed_gives_the_same_prompts_and_batches_differ(tiny_sd1):
    def once(seed):
        return Drawn()(WISHES, tiny_sd1, seed=seed, batch=2, sampling={"steps": 1})

    assert without_seconds(once(1)) == without_seconds(once(1))
    assert without_seconds(once(1)) != without_seconds(once(2))
    drawn = [prompt.text.split()[-1] for prompt in once(1)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("word", ["é", "word " * 90])
def test_a_text_that_does_not_survive_its_tokens_is_put_back(tiny_model, word):
    attacked = Scripted(word=word)(WISHES, tiny_model)
    kept = word == "é" and tiny_model.family in ("sd1", "sdxl")  # CLIP spells it, T5 cannot
    assert (attacked.texts == WISHES.texts) is not kept
    failed = "does not survive re-tokenisation"
    assert all((p.meta.get("attack_failed") == failed) is not kept for p in attacked)


def test_every_plain_text_survives(tiny_model):
    assert survives(tiny_model, "A photo of a cat, in the garden.")
    assert survives(tiny_model, "a photo of <*> in the garden")


def test_a_found_text_that_the_minors_filter_would_drop_is_put_back(tiny_sd1):
    weapons = PromptSet.of([{"prompt": "a cat", "category": "nudity"}], "x")
    attacked = Scripted(word="child nude")(weapons, tiny_sd1)
    assert attacked.texts == ("a cat",) and "minors" in attacked.prompts[0].meta["attack_failed"]


def test_bare_and_guarded_models_are_attacked_alike(tiny_sd1):
    bare, guarded = (Drawn()(WISHES, target) for target in (tiny_sd1, Guarded(tiny_sd1)))
    assert without_seconds(bare) == without_seconds(guarded)


def test_a_target_that_can_only_be_asked_gives_nothing_away(tiny_sd1):
    closed = QueryOnly(Guarded(tiny_sd1))
    assert not hasattr(closed, "model")
    assert len(Drawn()(WISHES, closed, sampling={"steps": 1})) == 5
    with pytest.raises(Unsupported, match="only be asked"):
        Inner()(WISHES, closed)
    with pytest.raises(Unsupported, match="only be asked"):
        _ = Search(closed, rng=torch.Generator(), seeds=[0], budget=Budget()).model


def test_an_attack_can_be_searched_on_another_model_and_says_so(tiny_sd1):
    attacked = Inner()(WISHES, QueryOnly(Guarded(tiny_sd1)), transfer_from=tiny_sd1)
    assert {p.meta["transfer_from"] for p in attacked} == {"tiny-sd1"}


def test_learnt_embeddings_cannot_be_sent_to_a_target_that_takes_words(tiny_sd1):
    class Below(Scripted):
        def rewrite(self, prompts, search):
            return [replace(p, text="<*>", soft={"clip_l": torch.ones(1, 32)}) for p in prompts]

    attacked = Below()(WISHES, QueryOnly(Guarded(tiny_sd1)))
    assert all(p.soft is None and p.text != "<*>" for p in attacked)
    assert all(p.soft is not None for p in Below()(WISHES, tiny_sd1))


def test_an_attack_for_other_families_is_refused(tiny_flux):
    class Narrow(Scripted):
        card = replace(CARD, families=("sd1",))

    with pytest.raises(Unsupported, match="supports sd1; this model is flux"):
        Narrow()(WISHES, tiny_flux)


def test_wrong_arguments_are_refused(tiny_sd1):
    with pytest.raises(BadInput, match="nothing to attack.*2 were dropped"):
        Scripted()(PromptSet("x", (), dropped=2), tiny_sd1)
    with pytest.raises(BadInput, match="1 noise seeds for 5"):
        Scripted()(WISHES, tiny_sd1, seeds=[1])
    with pytest.raises(BadInput, match="allows nothing"):
        Budget(queries=0)


def test_an_attack_that_spends_more_than_its_budget_or_loses_prompts_is_stopped(tiny_sd1):
    class Greedy(Scripted):
        def rewrite(self, prompts, search):
            search.query([prompt.text for prompt in prompts] * 2, rows=[0, 1, 2, 3, 4] * 2)

    class Forgetful(Scripted):
        def rewrite(self, prompts, search):
            return prompts[::-1]

    with pytest.raises(WorkFailed, match="more than its 1 pictures"):
        Greedy(budget=Budget(queries=1))(WISHES, tiny_sd1)
    with pytest.raises(WorkFailed, match="in order"):
        Forgetful()(WISHES, tiny_sd1)


def test_a_search_is_over_when_any_budget_is_spent(tiny_sd1):
    def search(**limits):
        return Search(
            Guarded(tiny_sd1), rng=torch.Generator(), seeds=[1, 2], budget=Budget(**limits),
            sampling={"steps": 1},
        )  # fmt: skip

    steps = search(steps=2)
    assert not steps.over
    steps.step(2)
    assert steps.over

    queries = search(queries=1)
    queries.query(["a cat"], rows=[1])
    assert not queries.over and queries.left(0) == 1 and queries.left(1) == 0
    queries.query(["a cat"], rows=[0])
    assert queries.over
    assert search(seconds=1e-9).over and not search(seconds=100).over


def test_a_query_is_the_picture_that_will_be_painted(tiny_sd1):
    search = Search(Guarded(tiny_sd1), rng=torch.Generator(), seeds=[7, 8], budget=Budget())
    asked = search.query(["a cat", "a dog"])
    painted = tiny_sd1(["a cat", "a dog"], seed=[7, 8])
    for a, b in zip(asked, painted, strict=True):
        assert torch.equal(a.image, b.image)
    noise = torch.zeros(tiny_sd1.latent_shape((16, 16)))
    other = search.query([Prompt(id="x", text="a cat", latents=noise)], rows=[0])[0]
    assert not torch.equal(other.image, painted[0].image)
