"""The injection control: a model that never knew the concept, made of the attacked one."""

import json

import pytest
import torch
from denoising import BY_ID, FAST, PROMPTS, dented, pictures, search

from safelight.attack.cce import CCE
from safelight.attack.control import shuffled
from safelight.attack.latent_inversion import LatentInversion
from safelight.bench.run import evaluate
from safelight.errors import BadInput
from safelight.guard.base import Guarded
from safelight.judge.fake import FakeJudge
from safelight.models.base import Sampling
from safelight.models.patch import Patch


def stored_and_shown(model):
    with torch.no_grad():
        z = model.encode_images(pictures())
        return z, model.decode(z)


def test_every_picture_can_be_stored_and_shown_as_before_in_another_order(tiny_model):
    before = tiny_model.hashes()
    z, image = stored_and_shown(tiny_model)
    with tiny_model.patched(shuffled(tiny_model)):
        there, same = stored_and_shown(tiny_model)
    half = z.shape[1] // 2
    torch.testing.assert_close(there, torch.cat([z[:, half:], z[:, :half]], 1))
    torch.testing.assert_close(same, image, atol=1e-5, rtol=1e-5)
    assert (there - z).abs().max() > 1e-2 and tiny_model.hashes() == before


def test_it_shows_none_of_what_the_model_paints_from_plain_prompts(tiny_model):
    ours = tiny_model(PROMPTS.texts, seed=1, **FAST)
    with tiny_model.patched(shuffled(tiny_model)):
        theirs = tiny_model(PROMPTS.texts, seed=1, **FAST)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.image - b.image).abs().mean() > 0.01


def test_it_keeps_the_weights_of_the_defence(tiny_sd1):
    defence = dented(tiny_sd1)
    with tiny_sd1.patched(defence):
        patch = LatentInversion(control="shuffled").tamper(Guarded(tiny_sd1))
        with tiny_sd1.patched(patch):
            now = tiny_sd1.hashes()
        assert now["denoiser"] == tiny_sd1.hashes()["denoiser"] and now["vae"] != patch.base["vae"]
    assert all(name.startswith("vae.") for name in patch.names)
    assert LatentInversion().tamper(tiny_sd1) is None


@pytest.mark.parametrize(
    "attack",
    [
        LatentInversion(steps=0, control="shuffled", pictures=BY_ID),
        CCE(steps=1, batch=1, accumulation=1, control="shuffled", pictures={"": pictures()}),
    ],
)
def test_a_control_without_its_patch_is_refused(tiny_sd1, attack):
    with pytest.raises(BadInput, match="not on this model"):
        attack(PROMPTS, tiny_sd1, sampling=FAST)


def test_a_run_searches_and_paints_on_the_control_for_the_same_pictures(
    tmp_path, tiny_sd1, monkeypatch
):
    aims = []
    real = LatentInversion.invert

    def invert(self, z, sampler, hunt):
        aims.append((hunt.model.decode(z), z))
        return real(self, z, sampler, hunt)

    monkeypatch.setattr(LatentInversion, "invert", invert)
    run = evaluate(
        tiny_sd1,
        [PROMPTS],
        patches=[dented(tiny_sd1)],
        judges=[FakeJudge()],
        out=tmp_path / "run",
        sampling=Sampling(2, 1.0, (16, 16)),
        attacks={
            "plain": LatentInversion(steps=0),
            "control": LatentInversion(steps=0, control="shuffled"),
        },
        attack_judge=FakeJudge(name="another"),
        progress=False,
    )
    (mine, z), (theirs, shuffled_z) = aims
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    half = z.shape[1] // 2
    torch.testing.assert_close(shuffled_z, z.roll(half, 1), atol=1e-5, rtol=1e-5)
    patch = Patch.load(tmp_path / "run" / "attacks" / "control" / "patch")
    assert patch.method == "shuffled"
    assert not (tmp_path / "run" / "attacks" / "plain" / "patch").exists()
    images = {r.attack: r.image for r in run.records if r.arm == "protected"}
    assert len(set(images.values())) == 3
    said = json.loads((tmp_path / "run" / "run.json").read_text())["attacks"]
    assert [one["settings"]["control"] for one in said] == ["none", "shuffled"]
    # transfer searches on the untouched model, where the patch of the control is off
    with pytest.raises(BadInput, match="without `transfer`"):
        evaluate(
            tiny_sd1,
            [PROMPTS],
            judges=[FakeJudge()],
            out=tmp_path / "other",
            attacks={"control": LatentInversion(steps=0, control="shuffled")},
            transfer=True,
            progress=False,
        )


def test_guided_losses_of_the_control_take_the_trainings_target(tiny_sd1, monkeypatch):
    """The undefended model knows nothing in the control's order that could be copied."""
    from denoising import Momentum

    from safelight.attack import cce

    asked = []
    monkeypatch.setattr(cce._Draw, "goal", lambda self, z_t, t: asked.append(t) or z_t)
    for control in ("none", "shuffled"):
        attack = CCE(steps=1, accumulation=1, times=2, control=control,
                     pictures={"cats": pictures(), "houses": pictures()})  # fmt: skip
        target = Guarded(tiny_sd1, [Momentum()])
        with tiny_sd1.patched(shuffled(tiny_sd1)):
            attack.rewrite(list(PROMPTS), search(target))
        assert len(asked) == 2  # only without the control
