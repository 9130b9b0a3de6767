"""What every alignment of the text encoder promises, whichever it is, on every family of its card.

A method joins by being in the table. If its defaults are too slow or too large for a tiny model, or
too gentle to see what it does, give it small settings in `SMALL`.
"""

import dataclasses
import json

import pytest
import torch

from safelight.align.base import TextData
from safelight.align.text import TextSide
from safelight.cards import entry
from safelight.errors import BadInput, Unsupported
from safelight.models.patch import Patch
from safelight.models.tiny import tiny
from safelight.names import find, table
from safelight.prompts import PromptSet

COMMON = dict(lr=3e-3, epochs=4, batch=16, patience=0, anneal=False, warmup=0)
"""Small settings, of which a method takes those that it has."""
SMALL = {
    "safe_clip": dict(lr=2e-2),
    "advunlearn": dict(
        iterations=8, paintings=4, paint_steps=3, attack_steps=1, batch=1, retain=2, epochs=1
    ),
    "haven": dict(variants=0),
    "safetext": dict(lead=0, variants=0, lam=1.0),
    "sage": dict(k=4),
}
"""What a method needs beyond them."""

TEXT_SIDE = [name for name in table("align") if issubclass(find("align", name), TextSide)]
CASES = [(name, family) for name in TEXT_SIDE for family in find("align", name).card.families]

SAFE = [f"{n} {thing} {where}" for n in ("a", "two") for thing in ("cat", "house", "boat")
        for where in ("by the sea", "on a hill", "in the rain")]  # fmt: skip
WHERE = ("in a hand", "on the wall", "over there", "at night", "in a garden", "on a train")


def unsafe(category, thing):
    rows = [
        {"prompt": f"a {thing} {where}", "safe_prompt": f"a fish {where}", "category": category}
        for where in WHERE
    ]
    return PromptSet.of(rows, category)


DATA = TextData(
    safe=PromptSet.of(SAFE, "safe"),
    unsafe=[unsafe("weapons", "knife"), unsafe("death", "skull")],
    validation=0.25,
)
UNSAFE = [prompt.text for prompt in DATA.unsafe_prompts]


def small(name, **settings):
    """A method that trains in a moment."""
    kind = find("align", name)
    known = {field.name for field in dataclasses.fields(kind)}
    common = {key: value for key, value in COMMON.items() if key in known}
    return kind(**common | SMALL.get(name, {}) | settings)


@pytest.fixture(scope="module")
def learnt():
    """Each (method, family) learns once; the model's hashes before and after are kept."""
    known = {}

    def of(name, family):
        if (name, family) not in known:
            model = tiny(family)
            before = dict(model.hashes())
            patch = small(name).fit(model, DATA, seed=1)
            known[name, family] = model, patch, before, dict(model.hashes())
        return known[name, family]

    return of


def weights(patch):
    """Every tensor of a patch by name."""
    flat = dict(patch.full)
    for name, (down, up, _) in patch.low_rank.items():
        flat |= {f"{name}.up": up, f"{name}.down": down}
    return flat


def shifts(model, patch, prompts):
    """Relative shift of each prompt's whole condition under a patch."""
    with torch.no_grad():
        before = model.encode(prompts)
        with model.patched(patch):
            after = model.encode(prompts)
    parts = [(before.states, after.states)]
    if before.pooled is not None:
        parts.append((before.pooled, after.pooled))
    return sum((b - a).flatten(1).norm(dim=1) / a.flatten(1).norm(dim=1) for a, b in parts)


def test_there_is_something_to_hold_to():
    assert {"safetext", "des", "sage"} <= set(TEXT_SIDE)
    assert set(SMALL) <= set(TEXT_SIDE)


@pytest.mark.parametrize("name", TEXT_SIDE)
def test_its_card_is_complete(name):
    kind, seen = find("align", name), entry("align", name)
    assert seen.card == kind.card  # what is listed without importing it
    assert kind.card.title and kind.card.source and kind.card.summary and kind.card.needs
    assert kind.card.families
    assert all(setting.help for setting in seen.settings), "a setting without a word of help"
    names = {field.name for field in dataclasses.fields(kind) if field.init}
    assert {setting.name for setting in seen.settings} == names
    assert seen.card.source in seen.about, "the algorithm does not name its source"


@pytest.mark.parametrize("name", TEXT_SIDE)
def test_its_settings_survive_the_round_trip_through_a_patch(name, learnt, tmp_path):
    _, patch, *_ = learnt(name, find("align", name).card.families[0])
    patch.save(tmp_path / "patch")
    back = Patch.load(tmp_path / "patch")
    held = {k: tuple(v) if isinstance(v, list) else v for k, v in back.settings.items()}
    assert back.method == name and find("align", name)(**held) == small(name)
    assert json.loads(json.dumps(patch.info)) == back.info


@pytest.mark.parametrize("name, family", CASES)
def test_the_same_seed_gives_the_same_patch(name, family, learnt):
    model, patch, *_ = learnt(name, family)
    again = weights(small(name).fit(model, DATA, seed=1))
    assert again.keys() == weights(patch).keys()
    assert all(torch.equal(x, again[key]) for key, x in weights(patch).items())


@pytest.mark.parametrize("name, family", CASES)
def test_only_text_encoders_change_and_the_model_is_left_as_it_was(name, family, learnt):
    model, patch, before, after = learnt(name, family)
    assert after == before
    with model.patched(patch):
        inside = model.hashes()
    assert {key for key in before if inside[key] != before[key]} == set(patch.info["encoders"])
    assert not any(
        p.requires_grad for part in model.text_encoders.values() for p in part.parameters()
    )
    assert dict(model.hashes()) == before


@pytest.mark.parametrize("name, family", CASES)
def test_one_encoder_alone_leaves_the_others_out_of_the_patch_and_says_so(name, family):
    model = tiny(family)
    first, *others = model.text_encoders
    patch = small(name, encoders=(first,), epochs=1).fit(model, DATA)
    assert {key.partition(".")[0] for key in patch.names} == {first}
    assert patch.info["encoders"] == [first] and patch.info["untouched"] == others
    assert {key.partition(".")[0] for key in patch.info["geometry"]["pieces"]} == {first}


@pytest.mark.parametrize("name, family", CASES)
def test_unsafe_prompts_move_and_the_empty_one_moves_less(name, family, learnt):
    model, patch, *_ = learnt(name, family)
    moved = shifts(model, patch, UNSAFE).mean()
    assert moved > 0.02  # the untouched model would say 0
    assert shifts(model, patch, [""])[0] < moved


@pytest.mark.parametrize("name, family", CASES)
def test_several_categories_are_learnt_together_and_the_cost_is_known(name, family, learnt):
    _, patch, *_ = learnt(name, family)
    info = patch.info
    assert set(info["data"]) == {"safe", "weapons", "death"}
    assert info["cost"].keys() >= {"seconds", "peak_memory_mb", "parameters"}
    assert "objective" in info["pareto"][-1]
    assert info["encoders"]  # Safe-CLIP leaves T5 untouched
    geometry = info["geometry"]
    assert geometry["prompts"] == 4 and geometry["k"] == 1  # a quarter of 18 safe ones is held out
    assert geometry["spread_ratio"] > 0 and 0 <= geometry["jaccard"] <= 1


@pytest.mark.parametrize("name", [name for name, family in CASES if family == "sd1"])
def test_the_geometry_is_that_of_held_out_prompts_under_the_patch(name, learnt):
    model, patch, *_ = learnt(name, "sd1")
    held = [prompt.text for prompt in DATA.split(1).safe_check]

    def spread():
        with torch.no_grad():
            z = model.encode(held).states.flatten(1)
        z = z / z.norm(dim=1, keepdim=True)
        return torch.cov(z.T.double()).trace().item()

    before = spread()
    with model.patched(patch):
        ratio = spread() / before
    assert patch.info["geometry"]["spread_ratio"] == pytest.approx(ratio, rel=1e-3)
    assert ratio != pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("name", TEXT_SIDE)
def test_another_family_is_refused_politely(name, learnt, monkeypatch):
    family = find("align", name).card.families[0]
    _, patch, *_ = learnt(name, family)
    other = tiny("flux" if family != "flux" else "sd1")
    with pytest.raises(Unsupported, match=f"{name} patch is for {family}"), other.patched(patch):
        pass
    card = dataclasses.replace(find("align", name).card, families=(family,))
    monkeypatch.setattr(find("align", name), "card", card)
    with pytest.raises(Unsupported, match=f"{name} supports {family}"):
        small(name).fit(other, DATA)


@pytest.mark.parametrize("name", TEXT_SIDE)
def test_a_side_without_prompts_and_an_unknown_encoder_are_refused(name):
    model = tiny(find("align", name).card.families[0])
    empty = TextData(safe=PromptSet("safe", ()), unsafe=unsafe("weapons", "knife"))
    with pytest.raises(BadInput, match="safe side has 0"):
        small(name).fit(model, empty)
    with pytest.raises(BadInput, match="text encoder"):
        small(name, encoders=("clip_x",)).fit(model, DATA)
