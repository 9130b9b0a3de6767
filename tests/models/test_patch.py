"""A patch goes on, adds up, scales, comes off without a trace, and survives the disk."""

import json
import shutil

import pytest
import torch

from safelight.errors import BadInput, NotFound, SafelightError, Unsupported, WorkFailed
from safelight.models.patch import Patch, worn
from safelight.models.tiny import tiny

SMALL = dict(seed=1, steps=2, size=(16, 16))


def text_names(model):
    return [n for n in model.parameters() if n.split(".")[0] in model.text_encoders]


def moved(model, names, seed=0, size=0.05, **about):
    """A patch that moves some parameters by seeded noise."""
    rng = torch.Generator().manual_seed(seed)
    now = model.parameters()
    full = {n: now[n] + size * torch.randn(now[n].shape, generator=rng) for n in names}
    about = {"method": "noise", "base": model.hashes(), **about}
    return Patch(full=full, family=model.family, **about)


def low_rank(model, names, rank=2, alpha=4.0, seed=0):
    rng = torch.Generator().manual_seed(seed)
    now = model.parameters()
    factors = {
        n: (
            torch.randn(rank, now[n][0].numel(), generator=rng) * 0.1,
            torch.randn(now[n].shape[0], rank, generator=rng) * 0.1,
            alpha,
        )
        for n in names
    }
    return Patch(low_rank=factors, method="lora", family=model.family, base=model.hashes())


def picture(model):
    return model(["a cat"], **SMALL)[0].image


def snapshot(model):
    return {n: (id(p), p.detach().clone()) for n, p in model.parameters().items()}


def untouched(model, before):
    return all(
        id(p) == before[n][0] and torch.equal(p, before[n][1])
        for n, p in model.parameters().items()
    )


# On and off


def test_a_patch_changes_the_picture_and_leaves_no_trace(tiny_model):
    before, weights = picture(tiny_model), snapshot(tiny_model)
    with tiny_model.patched(moved(tiny_model, text_names(tiny_model))):
        during = picture(tiny_model)
    assert not torch.equal(during, before)
    assert untouched(tiny_model, weights)
    assert torch.equal(picture(tiny_model), before)


def test_it_comes_off_after_an_error_too(tiny_sd1):
    weights = snapshot(tiny_sd1)
    with (
        pytest.raises(KeyboardInterrupt),
        tiny_sd1.patched(moved(tiny_sd1, text_names(tiny_sd1))),
        tiny_sd1.unpatched(),
    ):
        raise KeyboardInterrupt
    assert untouched(tiny_sd1, weights)


def test_alone_at_scale_one_it_gives_exactly_its_values(tiny_model):
    names = list(tiny_model.parameters())[::7]
    patch = moved(tiny_model, names, size=50.0)  # far: W0 + (W - W0) would round
    with tiny_model.patched(patch):
        now = tiny_model.parameters()
        assert all(torch.equal(now[n], patch.full[n]) for n in names)


def test_scale_goes_from_nothing_to_all(tiny_sd1):
    name = text_names(tiny_sd1)[-1]
    patch, W0 = moved(tiny_sd1, [name]), tiny_sd1.parameters()[name].clone()
    for scale in (0.0, 0.5, 2.0, -1.0):
        with tiny_sd1.patched(patch, scale=scale):
            expected = W0 + scale * (patch.full[name] - W0)
            torch.testing.assert_close(tiny_sd1.parameters()[name].data, expected)
    with tiny_sd1.patched(patch, scale=0.0):
        assert torch.equal(tiny_sd1.parameters()[name], W0)


def test_two_patches_add_up_in_either_order(tiny_model):
    names = text_names(tiny_model)
    a = moved(tiny_model, names, seed=1)
    b = moved(
        tiny_model,
        names[::2] + ["denoiser." + next(tiny_model.text_projections())[0] + ".weight"],
        seed=2,
    )  # noqa: E501
    W0 = {n: p.detach().clone() for n, p in tiny_model.parameters().items()}
    found = []
    for first, second in ((a, b), (b, a)):
        with tiny_model.patched(first), tiny_model.patched(second, scale=0.5):
            found.append({n: p.detach().clone() for n, p in tiny_model.parameters().items()})
    for n, W in W0.items():
        da, db = (p.full[n] - W if n in p.full else 0 for p in (a, b))
        torch.testing.assert_close(found[0][n], W + da + 0.5 * db, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(found[1][n], W + 0.5 * da + db, atol=1e-6, rtol=1e-5)


def test_a_low_rank_patch_adds_its_scaled_product(tiny_model):
    names = [
        n for n in text_names(tiny_model) if n.endswith(("q_proj.weight", "SelfAttention.q.weight"))
    ]  # noqa: E501
    patch = low_rank(tiny_model, names)
    W0 = {n: tiny_model.parameters()[n].clone() for n in names}
    with tiny_model.patched(patch, scale=0.5):
        for n in names:
            down, up, alpha = patch.low_rank[n]
            expected = W0[n] + 0.5 * alpha / 2 * up @ down
            torch.testing.assert_close(tiny_model.parameters()[n].data, expected)


def test_low_rank_factors_fit_convolutions_too(tiny_sd1):
    patch = low_rank(tiny_sd1, ["denoiser.conv_in.weight"])
    before = picture(tiny_sd1)
    with tiny_sd1.patched(patch):
        assert not torch.equal(picture(tiny_sd1), before)


def test_a_tied_parameter_moves_everywhere(tiny_sd3):
    table = tiny_sd3.text_encoders["t5"].get_input_embeddings()
    with tiny_sd3.patched(moved(tiny_sd3, ["t5.shared.weight"])):
        encoder = tiny_sd3.text_encoders["t5"]
        assert encoder.get_input_embeddings().weight is encoder.encoder.embed_tokens.weight
    assert table is tiny_sd3.text_encoders["t5"].get_input_embeddings()


def test_unpatched_shows_the_untouched_model_inside(tiny_model):
    before = picture(tiny_model)
    patch = moved(tiny_model, text_names(tiny_model))
    with tiny_model.patched(patch), tiny_model.patched(patch):
        during = picture(tiny_model)
        with tiny_model.unpatched():
            assert torch.equal(picture(tiny_model), before)
        assert torch.equal(picture(tiny_model), during)


def test_unpatched_between_forward_and_backward_keeps_the_gradients(tiny_sd1):
    """A reference term may be computed while a graph of the trained weights is alive."""
    name = "clip_l.final_layer_norm.weight"

    def gradient(between):
        W = torch.nn.Parameter(tiny_sd1.parameters()[name].detach().clone() * 2)
        with tiny_sd1.using({name: W}):
            loss = tiny_sd1.encode(["a cat"]).states.square().sum()
            if between:
                with tiny_sd1.unpatched(), torch.no_grad():
                    tiny_sd1.encode(["a cat"])
            loss.backward()
        return W.grad

    torch.testing.assert_close(gradient(True), gradient(False))


def test_half_precision_models_take_patches_made_in_float32():
    model = tiny("sd1")
    patch = moved(model, text_names(model))
    model.cast(device=torch.device("cpu"), dtype=torch.bfloat16)
    with model.patched(patch):
        name = text_names(model)[0]
        assert torch.equal(model.parameters()[name], patch.full[name].bfloat16())


# Refusals


def test_another_models_weights_are_refused_unless_forced(tiny_sd1):
    other = tiny("sd1", seed=1)
    patch = moved(tiny_sd1, text_names(tiny_sd1))
    with pytest.raises(BadInput, match="other weights.*clip_l"), other.patched(patch):
        pass
    before = picture(other)
    with other.patched(patch, force=True):
        assert not torch.equal(picture(other), before)
    assert torch.equal(picture(other), before)


def test_another_family_is_refused_even_if_forced(tiny_sd1, tiny_sdxl):
    patch = moved(tiny_sd1, text_names(tiny_sd1))
    with pytest.raises(Unsupported, match="sd1.*sdxl"), tiny_sdxl.patched(patch, force=True):
        pass


def test_a_model_that_is_already_patched_is_recognised_by_its_untouched_weights(tiny_sd1):
    patch = moved(tiny_sd1, text_names(tiny_sd1))
    with tiny_sd1.patched(patch), tiny_sd1.patched(patch):
        assert tiny_sd1.hashes() != patch.base


@pytest.mark.parametrize(
    "full",
    [
        {"clip_l.nothing.weight": torch.zeros(2)},
        {"clip_l.final_layer_norm.weight": torch.zeros(2)},
    ],
)
def test_parameters_that_do_not_fit_are_named(tiny_sd1, full):
    patch = Patch(full=full, method="x", family="sd1")
    with pytest.raises(BadInput, match=next(iter(full))), tiny_sd1.patched(patch):
        pass


def test_low_rank_factors_that_do_not_fit_are_named(tiny_sd1):
    name = "clip_l.encoder.layers.0.self_attn.q_proj.weight"
    with pytest.raises(BadInput, match="do not fit"):
        Patch(
            low_rank={name: (torch.zeros(2, 32), torch.zeros(32, 3), 1.0)}, method="x", family="sd1"
        )
    patch = Patch(
        low_rank={name: (torch.zeros(2, 30), torch.zeros(32, 2), 1.0)}, method="x", family="sd1"
    )
    with pytest.raises(BadInput, match="q_proj"), tiny_sd1.patched(patch):
        pass


def test_a_patch_with_a_nan_is_refused():
    with pytest.raises(BadInput, match="not numbers"):
        Patch(full={"clip_l.x": torch.tensor([float("nan")])}, method="x", family="sd1")


# On disk


@pytest.fixture
def saved(tiny_sd1, tmp_path):
    names = text_names(tiny_sd1)
    full = moved(tiny_sd1, names[:3])
    patch = Patch(
        full=full.full,
        low_rank=low_rank(tiny_sd1, [n for n in names if "q_proj.weight" in n]).low_rank,
        method="noise",
        settings={"size": 0.05},
        family="sd1",
        base=tiny_sd1.hashes(),
        info={"seed": 3, "cost": {"seconds": 1.5}, "history": [{"step": 1, "L_u": 0.1}]},
    )
    patch.save(tmp_path / "patch")
    return patch, tmp_path / "patch"


def test_a_patch_survives_the_disk(saved, tiny_sd1):
    patch, path = saved
    again = Patch.load(path)
    assert again.about == patch.about
    assert set(again.names) == set(patch.names)
    with tiny_sd1.patched(patch):
        expected = picture(tiny_sd1)
    with tiny_sd1.patched(again):
        assert torch.equal(picture(tiny_sd1), expected)
    assert sorted(p.name for p in path.iterdir()) == ["patch.json", "weights.safetensors"]
    assert json.loads((path / "patch.json").read_text())["format"] == 1


def test_saving_again_replaces_the_old_patch_whole(saved):
    patch, path = saved
    Patch(full={"clip_l.x": torch.ones(1)}, method="other", family="sd1").save(path)
    assert Patch.load(path).method == "other"
    assert [p.name for p in path.parent.iterdir()] == ["patch"]


def test_saving_never_overwrites_anything_else(saved, tmp_path):
    patch, _ = saved
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    (tmp_path / "file").write_text("x")
    for name in ("mine", "file"):
        with pytest.raises(BadInput, match="not a patch"):
            patch.save(tmp_path / name)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"


def test_an_interrupted_save_leaves_the_old_patch_and_nothing_half_written(saved, monkeypatch):
    patch, path = saved
    for error, seen in (
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(28, "No space left on device"), WorkFailed),
    ):  # noqa: E501

        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr("safelight.models.artifact.save_file", fail)
        with pytest.raises(seen):
            Patch(method="other", family="sd1").save(path)
        assert Patch.load(path).method == "noise"
        assert [p.name for p in path.parent.iterdir()] == ["patch"]


def test_settings_that_are_not_plain_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(BadInput, match="plain JSON"):
        Patch(method="x", settings={"model": object()}, family="sd1").save(tmp_path / "p")
    assert not list(tmp_path.iterdir())


def damage_truncate(path):
    weights = path / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def damage_flip(path):
    weights = path / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (shutil.rmtree, NotFound),
        (lambda path: (path / "weights.safetensors").unlink(), NotFound),
        (damage_truncate, WorkFailed),
        (damage_flip, WorkFailed),
        (lambda path: (path / "patch.json").write_text("{"), WorkFailed),
        (lambda path: (path / "patch.json").write_text("[]"), WorkFailed),
        (lambda path: (path / "patch.json").write_bytes(b"\xff\xfe"), WorkFailed),
        (
            lambda path: (path / "patch.json").write_text(
                (path / "patch.json").read_text().replace('"format": 1', '"format": 99')
            ),
            Unsupported,
        ),
    ],
)
def test_a_damaged_patch_is_one_clear_error(saved, damage, error):
    _, path = saved
    damage(path)
    with pytest.raises(error) as seen:
        Patch.load(path)
    assert str(path) in str(seen.value)
    assert isinstance(seen.value, SafelightError)


# Helpers


def test_between_keeps_what_moved(tiny_sd1):
    before = {n: p.detach().clone() for n, p in tiny_sd1.parameters().items()}
    name = text_names(tiny_sd1)[4]
    after = {**before, name: before[name] + 1}
    patch = Patch.between(tiny_sd1, before, after, method="x")
    assert patch.names == (name,)
    assert patch.base == tiny_sd1.hashes()
    with tiny_sd1.patched(patch):
        assert torch.equal(tiny_sd1.parameters()[name], after[name])


def test_several_patches_are_worn_together(tiny_sd1):
    a, b = (moved(tiny_sd1, text_names(tiny_sd1), seed=s) for s in (1, 2))
    with tiny_sd1.patched(a), tiny_sd1.patched(b, 0.5):
        expected = picture(tiny_sd1)
    with worn(tiny_sd1, [a, b], [1.0, 0.5]):
        assert torch.equal(picture(tiny_sd1), expected)
