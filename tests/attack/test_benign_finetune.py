"""Benign fine-tuning: a patch on top of the defended weights, and a model left as it was."""

import json

import pytest
import torch
from denoising import PROMPTS, dented

from safelight.attack.benign_finetune import BenignFinetune
from safelight.attack.pictures import FAR
from safelight.errors import BadInput, Unsupported
from safelight.guard.base import Guarded
from safelight.models.patch import Patch, worn
from safelight.models.tiny import tiny
from safelight.prompts import PromptSet

BENIGN = PromptSet.of(
    [{"prompt": t, "id": t[2:]} for t in ("a cat", "a dog", "a boat", "a house")], "benign"
)
IMAGES = dict(
    zip(("cat", "dog", "boat", "house"),
        torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)), strict=True)
)  # fmt: skip
SHORT = dict(data=BENIGN, pictures=IMAGES, epochs=2, batch=2, lr=1e-3)
PROFILES = ("lora", "cross", "full")


def error(model):
    """The training loss over all pictures at fixed noise and times."""
    z = model.encode_images(torch.stack(list(IMAGES.values())))
    rng = torch.Generator().manual_seed(3)
    told, total = model.encode(BENIGN.texts), 0.0
    with torch.no_grad():
        for _ in range(4):
            t = model.random_times(len(z), rng)
            z_t, goal = model.noised(z, torch.randn(z.shape, generator=rng), t)
            total += (model.predict(z_t, t, told) - goal).square().mean().item()
    return total


@pytest.mark.parametrize("profile", PROFILES)
def test_it_trains_what_its_profile_says_and_leaves_the_model_alone(tiny_model, profile):
    before = tiny_model.hashes()
    patch = BenignFinetune(**SHORT | {"profile": profile, "epochs": 1}).tamper(tiny_model)
    assert tiny_model.hashes() == before and patch.base == before
    assert patch.family == tiny_model.family and patch.method == "benign_finetune"
    assert bool(patch.low_rank) == (profile == "lora") and bool(patch.full) != (profile == "lora")
    names = set(patch.names)
    assert all(name.startswith("denoiser.") for name in names)
    parts = {name.rsplit(".", 2)[1] if ".to_out.0" not in name else "to_out" for name in names}
    if profile == "full":
        assert len(names) == sum(n.startswith("denoiser.") for n in tiny_model.parameters())
    elif tiny_model.family in ("sd1", "sdxl"):
        assert parts == {"to_q", "to_k", "to_v", "to_out"} - (
            {"to_q"} if profile == "cross" else set()
        )
        assert any(".attn1." in name for name in names) == (profile == "lora")
    elif profile == "cross":
        assert {"add_k_proj", "add_v_proj"} <= parts and not {"to_q", "to_k"} & parts
    with tiny_model.patched(patch):
        assert tiny_model.hashes()["denoiser"] != before["denoiser"]


@pytest.mark.parametrize("profile", ["lora", "full"])
def test_text_encoders_are_trained_when_asked(tiny_model, profile):
    before = tiny_model.hashes()
    attack = BenignFinetune(**SHORT | {"profile": profile, "epochs": 1}, text_encoders=True)
    patch = attack.tamper(tiny_model)
    assert tiny_model.hashes() == before
    parts = {name.partition(".")[0] for name in patch.names}
    assert parts == {"denoiser", *tiny_model.text_encoders}
    if profile == "lora":
        ends = {name.split(".")[-2] for name in patch.names if not name.startswith("denoiser.")}
        assert ends <= {"q_proj", "k_proj", "v_proj", "out_proj", "q", "k", "v", "o"}
    with tiny_model.patched(patch):
        after = tiny_model.hashes()
    # the loss reaches them; what nothing reads of an encoder stays as it is
    assert all(after[name] != before[name] for name in parts)


def test_layers_that_read_the_text_are_not_in_the_encoder():
    with pytest.raises(BadInput, match="lora or full"):
        BenignFinetune(**SHORT, profile="cross", text_encoders=True)


@pytest.mark.parametrize("profile", PROFILES)
def test_the_pictures_are_learnt(tiny_sd1, profile):
    patch = BenignFinetune(**SHORT | {"profile": profile, "lr": 3e-3, "epochs": 3}).tamper(tiny_sd1)
    start = error(tiny_sd1)
    with tiny_sd1.patched(patch):
        assert error(tiny_sd1) < start


@pytest.mark.parametrize("profile", PROFILES)
def test_it_starts_from_the_defended_weights_and_adds_up_with_the_defence(tiny_sd1, profile):
    """Put on over the defence it gives the weights that the training ended with."""
    defence = dented(tiny_sd1)
    attack = BenignFinetune(**SHORT | {"profile": profile, "epochs": 1})
    with tiny_sd1.patched(defence):
        start = tiny_sd1.hashes()
        patch = attack.tamper(Guarded(tiny_sd1))
        before = error(tiny_sd1)
        with tiny_sd1.patched(patch):
            after, now = error(tiny_sd1), tiny_sd1.parameters()
        assert tiny_sd1.hashes() == start
    assert patch.info["starts_from"] == start != patch.base
    assert after != before
    W0, change = tiny_sd1.parameters(), dict(defence.full)
    for name, value in patch.full.items():
        moved = (now[name] - change.get(name, W0[name])).abs().max()
        assert moved < 4 * 1e-3 * 2  # a few AdamW steps from the defended value
        torch.testing.assert_close(now[name], change.get(name, W0[name]) + value - W0[name])
    with worn(tiny_sd1, [defence, patch]):
        assert error(tiny_sd1) == pytest.approx(after, rel=1e-5)


def test_modular_fine_tuning_never_sees_the_defence(tiny_sd1):
    attack = BenignFinetune(**SHORT | {"epochs": 1}, modular=True)
    bare = attack.tamper(tiny_sd1)
    with tiny_sd1.patched(dented(tiny_sd1)):
        beside = attack.tamper(tiny_sd1)
        on_top = BenignFinetune(**SHORT | {"epochs": 1}).tamper(tiny_sd1)
    assert beside.info["starts_from"] == bare.info["starts_from"] == tiny_sd1.hashes()
    for name, (down, up, _) in bare.low_rank.items():
        assert torch.equal(down, beside.low_rank[name][0])
        assert torch.equal(up, beside.low_rank[name][1])
    assert any(
        not torch.equal(up, on_top.low_rank[n][1]) for n, (_, up, _) in bare.low_rank.items()
    )
    with pytest.raises(BadInput, match="LoRA beside"):
        BenignFinetune(**SHORT | {"profile": "full"}, modular=True)


def test_pictures_are_painted_by_the_undefended_model_at_seeds_of_their_own(tiny_sd1, monkeypatch):
    seen = []
    real = type(tiny_sd1).__call__

    def paint(self, prompts, *, seed, **settings):
        changed = any(p is not self.untouched(name) for name, p in self.parameters().items())
        seen.append((tuple(prompts), tuple(seed), changed))
        return real(self, prompts, seed=seed, **settings)

    monkeypatch.setattr(type(tiny_sd1), "__call__", paint)
    with tiny_sd1.patched(dented(tiny_sd1)):
        BenignFinetune(**SHORT | {"pictures": None, "epochs": 1, "limit": 2}).tamper(tiny_sd1)
    assert seen == [(BENIGN.texts[:2], (FAR, FAR + 1), False)]


def test_the_patch_is_the_same_for_a_seed_and_can_be_saved(tiny_sd1, tmp_path):
    attack = BenignFinetune(**SHORT | {"epochs": 1})
    first, same, other = (attack.tamper(tiny_sd1, seed=s) for s in (0, 0, 1))
    name = next(iter(first.low_rank))
    assert torch.equal(first.low_rank[name][1], same.low_rank[name][1])
    assert not torch.equal(first.low_rank[name][1], other.low_rank[name][1])
    first.save(tmp_path / "patch")
    there = Patch.load(tmp_path / "patch")
    assert there.info["data"] == {"benign": BENIGN.sha256} and json.dumps(there.settings)
    with tiny_sd1.patched(there):
        pass


def test_the_prompts_are_sent_as_they_are(tiny_sd1):
    attacked = BenignFinetune(**SHORT)(PROMPTS, tiny_sd1)
    assert attacked.texts == PROMPTS.texts
    assert {p.meta["queries"] for p in attacked} == {"0"}


def test_harmful_data_is_refused(tiny_sd1):
    with pytest.raises(BadInput, match="harmless pictures only"):
        BenignFinetune(data=PROMPTS).tamper(tiny_sd1)


def test_a_target_that_can_only_be_asked_is_refused(tiny_sd1):
    from safelight.attack.base import QueryOnly

    with pytest.raises(Unsupported, match="needs the weights"):
        BenignFinetune(**SHORT).tamper(QueryOnly(tiny_sd1))


def test_painted_pictures_are_kept_and_shared_by_all_profiles(tiny_sd1, monkeypatch, tmp_path):
    seen = []
    real = type(tiny_sd1).__call__

    def paint(self, prompts, *, seed, **settings):
        seen.append(tuple(prompts))
        return real(self, prompts, seed=seed, **settings)

    monkeypatch.setattr(type(tiny_sd1), "__call__", paint)
    short = SHORT | {"pictures": None, "epochs": 1, "store": str(tmp_path)}
    first = BenignFinetune(**short).tamper(tiny_sd1)
    assert seen == [BENIGN.texts] and len(list(tmp_path.glob("*.png"))) == 4
    with tiny_sd1.patched(dented(tiny_sd1)):  # another row of a bench, the same undefended model
        BenignFinetune(**short | {"profile": "full"}).tamper(tiny_sd1)
    again = BenignFinetune(**short).tamper(tiny_sd1)
    assert len(seen) == 1 and "store" not in first.settings
    name = next(iter(first.low_rank))
    assert torch.equal(first.low_rank[name][1], again.low_rank[name][1])
    next(tmp_path.glob("*.png")).unlink()
    BenignFinetune(**short).tamper(tiny_sd1)
    assert len(seen) == 2 and len(seen[1]) == 1, "only what is missing"
    with tiny_sd1.patched(dented(tiny_sd1)), tiny_sd1.unpatched():
        BenignFinetune(**short | {"undefended": tiny("sd1", seed=3)}).tamper(tiny_sd1)
    assert len(seen) == 3, "pictures of another model are others"


def test_it_paints_no_more_than_a_sensible_number_unless_asked():
    assert BenignFinetune().limit == 500
    assert len(BenignFinetune()._benign()) == 500 < len(BenignFinetune(limit=None)._benign())


def test_the_patch_says_how_far_it_unlearns_the_defence(tiny_sd1):
    defence = dented(tiny_sd1)
    assert BenignFinetune(**SHORT | {"epochs": 1}).tamper(tiny_sd1).info["cosine"] == {}
    W0 = {name: p.clone() for name, p in tiny_sd1.parameters().items()}
    for profile in ("lora", "full"):
        with tiny_sd1.patched(defence):
            before = {name: p.clone() for name, p in tiny_sd1.parameters().items()}
            patch = BenignFinetune(**SHORT | {"epochs": 1, "profile": profile}).tamper(tiny_sd1)
            with tiny_sd1.patched(patch):
                after = {name: p.clone() for name, p in tiny_sd1.parameters().items()}
        found = patch.info["cosine"]
        assert set(found) == set(patch.names) & set(defence.names) and len(found) > 3
        for name, value in found.items():
            a, b = ((x[name] - y[name]).flatten() for x, y in ((after, before), (before, W0)))
            expected = float(a @ b / (a.norm() * b.norm()))
            assert value == pytest.approx(expected, abs=1e-3)
        assert json.dumps(found)


def test_modular_fine_tuning_beside_a_merged_defence_is_refused(tiny_sd1):
    with pytest.raises(BadInput, match="merged"):
        BenignFinetune(**SHORT, modular=True, undefended=tiny_sd1)
