"""Safe-CLIP keeps what its specification says (arXiv:2311.16254), and SafeR-CLIP's redirection."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from safelight.align.base import TextData
from safelight.align.safe_clip import (
    WEIGHTS,
    Pictures,
    SafeCLIP,
    cosdist,
    nce,
    relative,
    vectors,
)
from safelight.errors import BadInput, Unsupported
from safelight.prompts import PromptSet

SAFE = [f"a {thing} in the {where}" for thing in ("cat", "dog", "bird", "house")
        for where in ("park", "street", "sea")]  # fmt: skip
PAIRS = [{"prompt": f"a {kind} knife in the {where}",
          "safe_prompt": f"a {kind} fish in the {where}"}
         for kind in ("red", "big", "small") for where in ("park", "street", "sea")]  # fmt: skip
UNSAFE = [row["prompt"] for row in PAIRS]
FAST = dict(epochs=8, batch=4, lr=3e-2, patience=0)


@pytest.fixture
def data():
    safe, unsafe = PromptSet.of(SAFE, "safe"), PromptSet.of(PAIRS, "knives")
    return TextData(safe=safe, unsafe=unsafe, validation=0.25)


@pytest.fixture(scope="module")
def clip():
    """A tiny random CLIP whose text tower is that of the fixture `twin`."""
    from transformers import CLIPConfig, CLIPModel

    from safelight.models.tiny import tiny

    text = tiny("sd1").text_encoders["clip_l"].config.to_dict()
    vision = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4, projection_dim=24,
    )  # fmt: skip
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    return CLIPModel(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def twin(clip):
    """A tiny SD 1 with that text tower."""
    from safelight.models.tiny import tiny

    model = tiny("sd1")
    tower = getattr(model.text_encoders["clip_l"], "text_model", model.text_encoders["clip_l"])
    tower.load_state_dict(clip.text_model.state_dict(), strict=False)
    return model


@pytest.fixture
def pictured(data, clip):
    rng = torch.Generator().manual_seed(0)
    pixels = {
        p.id: (torch.randn(3, 8, 8, generator=rng), torch.randn(3, 8, 8, generator=rng))
        for p in data.unsafe
    }
    about = {name: getattr(data, name) for name in ("safe", "unsafe", "validation")}
    return Pictures(**about, clip=clip, pixels=pixels)


def started(method, model, data):
    """The material and a batch of the first epoch."""
    material = method.gather(model, data, seed=0)
    return material, next(method.batches(material, 1, torch.Generator().manual_seed(0)))


def told(model, prompts, encoder="clip_l"):
    with torch.no_grad():
        return vectors(model, {encoder: model.tokenize(encoder, prompts)})[encoder].states[:, 0]


def test_losses_are_those_of_the_paper_on_numbers_worked_by_hand():
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    b = torch.tensor([[3.0, 4.0], [0.0, 1.0]])  # cosines 0.6, 0.8 with the axes; 0, 1
    assert torch.allclose(cosdist(a, b), torch.tensor([0.4, 0.0]))
    rows = [math.log(1 + math.exp(0 - 60)), math.log(1 + math.exp(80 - 100))]
    columns = [math.log(1 + math.exp(80 - 60)), math.log(1 + math.exp(0 - 100))]
    assert nce(a, b).item() == pytest.approx((sum(rows) + sum(columns)) / 4, rel=1e-4)
    assert nce(a, b).item() == pytest.approx(nce(b, a).item())  # both directions
    assert nce(a, b).item() == pytest.approx(nce(5 * a, b).item())  # a fixed scale
    expected = math.log(1 + math.exp(0.6 - 1))
    assert relative(a[:1], b[:1], a[:1]).item() == pytest.approx(expected)


def test_the_total_is_the_papers_weighted_eighth(twin, pictured):
    method = SafeCLIP(**FAST)
    _, batch = started(method, twin, pictured)
    L = {name: term.item() for name, term in method.terms(twin, batch).items()}
    assert L.keys() == {"L_1", "L_2", "L_5", "L_6"}
    w = [0.1, 0.1, 0.1, 0.2, 0.25, 0.25, 0.25, 0.5]
    by_hand = (0.1 * L["L_1"] + 0.1 * L["L_2"] + 0.25 * L["L_5"] + 0.25 * L["L_6"]) / sum(w) / 8
    assert tuple(w) == WEIGHTS
    total = method.loss(twin, batch, torch.Generator()).total.item()
    assert total == pytest.approx(by_hand, rel=1e-4)


def test_unsafe_prompts_come_to_their_counterparts_and_safe_ones_hold(tiny_model, data):
    def moved(method):
        material = method.gather(tiny_model, data, seed=0)
        batch = material.batch(UNSAFE, ("", *SAFE[:9]))
        with tiny_model.patched(method.train(tiny_model, material)):
            return method.terms(tiny_model, batch), material, batch

    method = SafeCLIP(**FAST)
    after, material, batch = moved(method)
    assert after["L_2"] < 0.8 * method.terms(tiny_model, batch)["L_2"]
    weighed = {"_weighed": lambda self, terms: terms["L_2"]}  # the control: redirect only
    free, *_ = moved(type("Free", (SafeCLIP,), weighed)(**FAST))
    assert after["L_1"] < free["L_1"]


def test_only_the_named_layers_of_clip_encoders_change(tiny_model, data):
    before = dict(tiny_model.hashes())
    patch = SafeCLIP(**FAST | {"epochs": 1}).fit(tiny_model, data)
    assert not patch.full
    layers = {name.split(".")[-2] for name in patch.names}
    assert layers == {"k_proj", "v_proj", "out_proj", "fc1", "fc2"}  # and not q_proj
    clips = {name for name in tiny_model.text_encoders if name != "t5"}
    assert {name.partition(".")[0] for name in patch.names} == clips
    assert patch.info["encoders"] == sorted(clips, reverse=True)
    assert tiny_model.hashes() == before
    assert all(down.shape[0] == 16 and alpha == 1 for down, _, alpha in patch.low_rank.values())


def test_at_the_start_nothing_has_moved(tiny_model, data):
    method = SafeCLIP(**FAST)
    material, batch = started(method, tiny_model, data)
    with method.lend(tiny_model, torch.Generator().manual_seed(0)):  # B = 0, so T is T0
        terms = method.terms(tiny_model, batch)
    assert terms["L_1"].item() == pytest.approx(0, abs=1e-6)
    assert terms["L_2"].item() > 1e-4


def test_the_reference_stays_bit_for_bit_while_the_encoder_moves(tiny_sd1, data):
    """The trap of the released script: LoRA edits the very object it calls the original."""
    method = SafeCLIP(**FAST)
    material = method.gather(tiny_sd1, data, seed=0)
    before = {name: p.states.clone() for name, p in material.T0.pieces.items()}
    rng = torch.Generator().manual_seed(0)
    with method.lend(tiny_sd1, rng) as loan:
        adam = torch.optim.Adam(loan.parameters.values(), lr=1e-2)
        for batch in list(method.batches(material, 1, rng))[:2]:
            adam.zero_grad()
            method.loss(tiny_sd1, batch, rng).total.backward()
            adam.step()
        moved = material.T0.now(tiny_sd1, UNSAFE)["clip_l"].states
    assert all(torch.equal(material.T0.pieces[n].states, x) for n, x in before.items())
    assert not torch.allclose(moved, material.T0(UNSAFE)["clip_l"].states, atol=1e-5)


def test_with_safe_prompts_for_unsafe_ones_redirecting_is_preserving(twin, pictured):
    method = SafeCLIP(**FAST)
    material, batch = started(method, twin, pictured)
    swapped = dataclasses.replace(batch, unsafe=batch.goals, safe=batch.goals)
    with method.lend(twin, torch.Generator().manual_seed(0)) as loan:
        loan.nudge(0.3, torch.Generator().manual_seed(0))  # so that no term is 0
        same, other = method.terms(twin, swapped), method.terms(twin, batch)
    assert same["L_1"].item() > 1e-4
    assert same["L_2"].item() == pytest.approx(same["L_1"].item(), rel=1e-4)
    assert same["L_6"].item() == pytest.approx(same["L_5"].item(), rel=1e-4)
    assert abs(other["L_6"].item() - other["L_5"].item()) > 1e-3


def test_preserving_across_is_clips_own_loss_at_the_start(twin, clip, pictured):
    method = SafeCLIP(**FAST)
    _, batch = started(method, twin, pictured)
    by_text = {p.text: p for p in pictured.unsafe}
    pixels = torch.stack([pictured.pixels[by_text[text].id][0] for text in batch.unsafe])
    ids, mask = twin.tokenize("clip_l", batch.goals)
    with torch.no_grad():
        seen = clip(input_ids=ids, pixel_values=pixels)
        cosines = F.normalize(seen.text_embeds) @ F.normalize(seen.image_embeds).T
        own = torch.arange(len(cosines))
        both = F.cross_entropy(100 * cosines, own) + F.cross_entropy(100 * cosines.T, own)
        ours = method.terms(twin, batch)["L_5"]
    assert ours.item() == pytest.approx(both.item() / 2, rel=1e-3)


def test_no_other_term_of_the_paper_reaches_the_text_tower(twin, clip, pictured):
    """L_3, L_4, L_7, L_8 compare the image tower with frozen values; the text tower is in none."""
    method = SafeCLIP(**FAST)
    material, batch = started(method, twin, pictured)
    T0 = material.T0(batch.goals)["clip_l"].states[:, 0]
    with method.lend(twin, torch.Generator().manual_seed(0)):
        assert method.terms(twin, batch)["L_5"].requires_grad
        assert not nce(T0, batch.seen).requires_grad  # L_7 with a frozen image tower
    assert not any(p.requires_grad for p in clip.parameters())


def test_pictures_change_what_is_learnt(twin, pictured, data):
    method = SafeCLIP(**FAST | {"epochs": 2})
    plain, seen = method.fit(twin, data), method.fit(twin, pictured)
    assert seen.info["pictures"] and not plain.info["pictures"]
    first, last = seen.info["pareto"][0], seen.info["pareto"][-1]
    assert last["objective"] < first["objective"]
    assert any(not torch.equal(plain.low_rank[n][1], seen.low_rank[n][1]) for n in plain.low_rank)


def test_a_projected_vector_is_taken_where_there_is_one(tiny_sdxl, tiny_sd1):
    ids, _ = tiny_sdxl.tokenize("clip_g", UNSAFE)
    with torch.no_grad():
        projected = tiny_sdxl.text_encoders["clip_g"](ids).text_embeds
        pooled = tiny_sd1.text_encoders["clip_l"](ids).pooler_output
    assert torch.equal(told(tiny_sdxl, UNSAFE, "clip_g"), projected)
    assert torch.equal(told(tiny_sd1, UNSAFE), pooled)


def test_a_merged_patch_says_what_the_adapted_encoder_said(tiny_model, data):
    method = SafeCLIP(**FAST)
    material = method.gather(tiny_model, data, seed=0)
    patch = method.train(tiny_model, material)
    with tiny_model.patched(patch):
        again = method.check(tiny_model, material)
    assert again["objective"] == pytest.approx(patch.info["pareto"][-1]["objective"], abs=1e-5)


def test_the_nearest_safe_prompt_is_found_by_the_original_encoder(tiny_sd1, data):
    method = SafeCLIP(redirect="nearest")
    material = method.gather(tiny_sd1, data, seed=0)
    safe = [p.text for p in material.split.safe]
    assert set(material.goals) == set(UNSAFE) and set(material.goals.values()) <= set(safe)
    likeness = F.normalize(told(tiny_sd1, UNSAFE)) @ F.normalize(told(tiny_sd1, safe)).T
    assert [material.goals[text] for text in UNSAFE] == [
        safe[i] for i in likeness.argmax(1).tolist()
    ]


def test_a_prompt_flagged_unsafe_is_never_the_goal(tiny_sd1, data):
    near = [{"prompt": f"{text} today", "category": "weapons"} for text in UNSAFE]
    mixed = PromptSet.of([*near, *({"prompt": text} for text in SAFE)], "mixed")
    flagged = dataclasses.replace(data, safe=mixed)
    goals = SafeCLIP(redirect="nearest").gather(tiny_sd1, flagged, seed=0).goals
    assert not any("today" in goal for goal in goals.values())
    unflagged = PromptSet.of([*(row["prompt"] for row in near), *SAFE], "mixed")  # the control
    goals = (
        SafeCLIP(redirect="nearest")
        .gather(tiny_sd1, dataclasses.replace(data, safe=unflagged), seed=0)
        .goals
    )
    assert any("today" in goal for goal in goals.values())


def test_the_relative_loss_is_log_2_at_equal_likeness_and_falls_with_the_margin():
    angles = torch.linspace(0, math.pi / 2, 9)
    a = torch.stack([angles.cos(), angles.sin()], 1)  # from the unsafe axis to the safe one
    away, to = torch.tensor([[1.0, 0.0]]).expand(9, -1), torch.tensor([[0.0, 1.0]]).expand(9, -1)
    values = relative(a, away, to)
    assert values[4].item() == pytest.approx(math.log(2), rel=1e-5)
    assert (values.diff() < 0).all()


def test_redirection_has_no_negatives_in_the_batch(tiny_sd1, data):
    """Each row's loss is its own: leaving the others out does not change it, as it would nce."""
    method = SafeCLIP(**FAST, relative=1.0)
    material, batch = started(method, tiny_sd1, data)
    alone = [method.terms(tiny_sd1, material.batch([text], ("",))) for text in batch.unsafe]
    both = method.terms(tiny_sd1, batch)
    for name in ("L_2", "L_relative"):
        assert torch.stack([one[name] for one in alone]).mean().item() == pytest.approx(
            both[name].item(), rel=1e-4
        )


def test_fixed_pairs_without_the_relative_loss_are_safe_clip(tiny_sd1, data):
    _, batch = started(SafeCLIP(), tiny_sd1, data)
    assert SafeCLIP().terms(tiny_sd1, batch).keys() == {"L_1", "L_2"}
    assert SafeCLIP(relative=1.0).terms(tiny_sd1, batch).keys() == {"L_1", "L_2", "L_relative"}
    assert batch.goals == tuple(
        next(row["safe_prompt"] for row in PAIRS if row["prompt"] == text) for text in batch.unsafe
    )


def test_the_empty_prompt_is_in_every_batch(tiny_sd1, data):
    method = SafeCLIP(**FAST)
    material = method.gather(tiny_sd1, data, seed=0)
    batches = list(method.batches(material, 1, torch.Generator()))
    assert len(batches) == method.steps(material)
    assert all(batch.safe[0] == "" for batch in batches)
    held = {p.text for p in (*material.split.safe_check, *material.split.unsafe_check)}
    assert held and not held & {text for b in batches for text in (*b.safe, *b.unsafe)}


def test_one_encoder_of_several_can_be_trained_alone(tiny_sdxl, data):
    patch = SafeCLIP(**FAST | {"epochs": 1}, encoders=("clip_g",)).fit(tiny_sdxl, data)
    assert {name.partition(".")[0] for name in patch.names} == {"clip_g"}
    assert patch.info["encoders"] == ["clip_g"]


def test_the_same_seed_gives_the_same_patch_and_another_seed_another(tiny_sd1, data):
    method = SafeCLIP(**FAST | {"epochs": 1})
    one, two, other = (method.fit(tiny_sd1, data, seed=seed).low_rank for seed in (3, 3, 4))
    assert all(torch.equal(one[name][1], two[name][1]) for name in one)
    assert any(not torch.equal(one[name][1], other[name][1]) for name in one)


def test_defaults_are_the_published_ones_except_on_small_encoders(tiny_sd1):
    method = SafeCLIP()
    assert (method.rank, method.alpha, method.batch, method.patience) == (16, 1.0, 16, 5)
    assert method.passes(tiny_sd1) < 50
    published = type("Large", (SafeCLIP,), {"small": lambda self, model: False})()
    assert published.rate(tiny_sd1) == 1e-3 and published.passes(tiny_sd1) == 50


def test_prompts_without_a_counterpart_are_refused_for_pairs(tiny_sd1, data):
    lost = PromptSet.of([*PAIRS, {"prompt": "a knife", "id": "bare"}], "knives")
    with pytest.raises(BadInput, match="1 of 10 unsafe prompts .* 'bare'; .* redirect=nearest"):
        SafeCLIP().fit(tiny_sd1, dataclasses.replace(data, unsafe=lost))
    assert SafeCLIP(**FAST, redirect="nearest").fit(
        tiny_sd1, dataclasses.replace(data, unsafe=lost)
    )


def test_an_encoder_without_an_end_mark_vector_is_refused(tiny_flux, data):
    with pytest.raises(Unsupported, match="t5 has none"):
        SafeCLIP(encoders=("t5",)).fit(tiny_flux, data)


def test_layers_that_an_encoder_lacks_are_refused(tiny_sd1, data):
    with pytest.raises(Unsupported, match="no linear layer key .* it has fc1, fc2, k_proj"):
        SafeCLIP(targets=("key",)).fit(tiny_sd1, data)


def test_pictures_of_another_clip_are_refused(tiny_sd1, twin, clip, pictured):
    with pytest.raises(BadInput, match="text tower is none of clip_l"):
        SafeCLIP().fit(tiny_sd1, pictured)
    fewer = dataclasses.replace(pictured, pixels={})
    with pytest.raises(BadInput, match="no pictures for the unsafe prompt"):
        SafeCLIP().fit(twin, fewer)
    with pytest.raises(BadInput, match="pictures come in pairs"):
        SafeCLIP(redirect="nearest").fit(twin, pictured)


def test_no_safe_prompts_are_refused(tiny_sd1, data):
    with pytest.raises(BadInput, match="the safe side has 0 prompt"):
        SafeCLIP().fit(tiny_sd1, dataclasses.replace(data, safe=PromptSet("none", ())))


def test_an_unknown_choice_is_refused_with_a_hint():
    method = SafeCLIP()
    object.__setattr__(method, "redirect", "paar")  # past the tests' own type checks
    with pytest.raises(BadInput, match="redirect: .* Did you mean 'pair'"):
        method.__post_init__()


def test_settings_survive_a_round_trip():
    method = SafeCLIP(redirect="nearest", relative=0.5, targets=("fc1",))
    assert SafeCLIP(**dataclasses.asdict(method)) == method
