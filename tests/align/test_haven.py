"""Haven sends unsafe prompts to their counterparts, also when pushed, and holds safe ones."""

import pytest
import torch

from safelight.align.base import TextData
from safelight.align.haven import Batch, Haven
from safelight.errors import BadInput
from safelight.prompts import PromptSet
from safelight.training.embedding import distance, read
from safelight.training.worst import pushed, worst_case

SAFE = [f"{n} {thing} {where}" for n in ("a", "two") for thing in ("cat", "house", "boat")
        for where in ("by the sea", "on a hill", "in the rain")]  # fmt: skip
WHERE = ("in a hand", "on the wall", "over there", "at night")
FAST = dict(lr=3e-3, epochs=10, batch=16, anneal=False, variants=0)


@pytest.fixture
def data():
    rows = [
        {"prompt": f"a {kind} sword {where}", "safe_prompt": f"a {kind} flower {where}"}
        for kind in ("red", "long", "old")
        for where in WHERE
    ]
    safe, unsafe = PromptSet.of(SAFE, "safe"), PromptSet.of(rows, "swords")
    return TextData(safe=safe, unsafe=unsafe, validation=0.25)


def batch_of(method, model, data):
    material = method.gather(model, data, seed=0)
    return next(method.batches(material, 1, torch.Generator().manual_seed(0)))


def test_the_losses_are_those_of_the_docstring(tiny_sdxl, data):
    method = Haven(**FAST, worst=0.0)
    batch = batch_of(method, tiny_sdxl, data)
    tau, scale = batch.material.tau, batch.material.scale
    loss = method.loss(tiny_sdxl, batch, torch.Generator())
    own, goal = tau(batch.unsafe), tau(batch.goals)
    d = [
        (own[name].states - goal[name].states).flatten(1).norm(dim=1) / scale[name] for name in own
    ]
    assert loss.terms["L_d"] == pytest.approx(torch.stack(d).mean().item(), rel=1e-5)
    assert loss.terms["L_h"] == pytest.approx(0, abs=1e-6)
    assert loss.terms["L_s"] == pytest.approx(0, abs=1e-6)
    assert loss.total.item() == pytest.approx(loss.terms["L_d"], rel=1e-5)
    assert "" in batch.safe and all("flower" in text for text in batch.goals)


def test_tables_stay_as_they_are(tiny_sd1, data):
    patch = Haven(**FAST | {"epochs": 1}).fit(tiny_sd1, data)
    assert patch.names and not any("embedding" in name for name in patch.names)


def test_a_collapse_costs_spread(tiny_sd1, data):
    method = Haven(**FAST)
    batch = batch_of(method, tiny_sd1, data)
    now = {name: piece for name, piece in batch.material.tau([*batch.safe]).items()}
    same = method._shrunk(now, batch)
    crowded = {
        name: type(piece)(piece.states.mean(0, keepdim=True).expand_as(piece.states), piece.mask)
        for name, piece in now.items()
    }
    assert same == 0 and method._shrunk(crowded, batch) > 0.01


def nearest_after_pushes(model, data, patch):
    """How near pushed prompts come to their old reading, compared to their destination."""
    method = Haven(**FAST)
    material = method.gather(model, data, seed=0)
    batch = next(material.held_out())
    tokens, old = material.tau.tokens_of(batch.unsafe), material.tau(batch.unsafe)
    with model.patched(patch):
        tokens, delta = worst_case(
            model,
            tokens,
            lambda now: material.apart(now, old),
            radius=0.5,
            steps=5,
            rng=torch.Generator().manual_seed(7),
            words=material.words,
        )
        with torch.no_grad(), pushed(model, delta):
            now = read(model, tokens)
    goal = material.tau(batch.goals)
    return (material.apart(now, goal) / material.apart(now, old)).mean().item()


def test_training_under_attack_holds_under_attack_and_training_without_does_not(tiny_sd1, data):
    pushes_only = {"slots": 0, "planted": 0.0, "nearby": 0.0, "scattered": 0.0}
    settings = FAST | pushes_only | {"radius": 0.5, "inner": 2, "epochs": 40, "hold": 0.5}
    with_it = Haven(**settings, worst=2.0).fit(tiny_sd1, data)
    without = Haven(**settings, worst=0.0).fit(tiny_sd1, data)
    assert nearest_after_pushes(tiny_sd1, data, with_it) < nearest_after_pushes(
        tiny_sd1, data, without
    )


def test_unsafe_prompts_arrive_and_safe_ones_stay(tiny_flux, data):
    patch = Haven(**FAST | {"epochs": 20}).fit(tiny_flux, data)
    first, last = patch.info["pareto"][0], patch.info["pareto"][-1]
    assert last["L_d"] < 0.95 * first["L_d"] and last["L_h"] < 0.5 * last["L_d"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"radius": -1.0}, "radius"), ({"batch": 2}, "batch"), ({"inner": 0}, "inner")],
)
def test_settings_that_cannot_be_are_refused(settings, words):
    with pytest.raises(BadInput, match=words):
        Haven(**settings)


def test_a_batch_knows_where_its_prompts_go(tiny_sd1, data):
    material = Haven(**FAST).gather(tiny_sd1, data, seed=0)
    batch = Batch(("",), ("a red sword at night",), material)
    assert batch.goals == ["a red flower at night"]
    apart = distance(
        material.tau(["a red sword at night"])["clip_l"],
        material.tau(batch.goals)["clip_l"],
        "euclidean",
        "flatten",
    )
    assert apart.item() > 0


def test_it_learns_in_bfloat16_too_and_what_is_learnt_is_float32(tiny_sd1, data):
    patch = Haven(**FAST | {"epochs": 20}, autocast=True).fit(tiny_sd1, data)
    first, last = patch.info["pareto"][0], patch.info["pareto"][-1]
    assert last["L_d"] < 0.95 * first["L_d"]
    assert {value.dtype for value in patch.full.values()} == {torch.float32}
    exact = Haven(**FAST | {"epochs": 20}).fit(tiny_sd1, data)
    assert exact.info["history"][0] != patch.info["history"][0]


def test_half_of_a_batch_is_attacked(tiny_sd1, data):
    batch = batch_of(Haven(**FAST), tiny_sd1, data)
    plain, attacked = batch.halves()
    assert plain.safe == attacked.safe == batch.safe
    assert (*plain.unsafe, *attacked.unsafe) == batch.unsafe and attacked.unsafe


def test_worst_words_are_remembered_by_category_for_one_training_only(tiny_sd1, data):
    method = Haven(**FAST | {"epochs": 1})
    material = method.gather(tiny_sd1, data, seed=0)
    method.train(tiny_sd1, material)
    assert set(material.chosen) == {""} and all(
        ids.shape == (method.slots,) for words in material.chosen[""] for ids in words.values()
    )
    again = method.train(tiny_sd1, material)
    fresh = method.fit(tiny_sd1, data)
    assert all(torch.equal(again.full[name], fresh.full[name]) for name in fresh.full)
