"""LoRA files made elsewhere become patches; those that low-rank factors cannot hold are refused."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_export import lora_names
from test_patch import low_rank, snapshot, untouched

from safelight.errors import BadInput, NotFound, Unsupported, WorkFailed
from safelight.models.export import export_lora
from safelight.models.lora import load_lora
from safelight.models.tiny import tiny


def change(patch, name):
    down, up, alpha = patch.low_rank[name]
    return alpha / len(down) * up @ down


def test_what_is_exported_comes_back_and_the_model_is_left_alone(tiny_model, tmp_path):
    before = snapshot(tiny_model)
    modules = [id(layer) for part in tiny_model.modules.values() for layer in part.modules()]
    made = low_rank(tiny_model, lora_names(tiny_model), rank=3)
    file = export_lora(tiny_model, [made], tmp_path / "style.safetensors")
    for _ in range(2):  # nothing of the first is left in the way of the second
        patch = load_lora(tiny_model, file)
        assert set(patch.low_rank) == set(made.low_rank)
        for name in made.low_rank:
            torch.testing.assert_close(change(patch, name), change(made, name))
    assert untouched(tiny_model, before)
    assert modules == [id(one) for part in tiny_model.modules.values() for one in part.modules()]
    assert not any(p.requires_grad for p in tiny_model.parameters().values())
    assert patch.base == {} and patch.info["file"] == "style.safetensors"
    with tiny_model.patched(patch):
        pass


def test_files_of_kohya_carry_their_own_scale(tiny_sd1, tmp_path):
    layer = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    down, up = torch.randn(2, 16), torch.randn(16, 2)
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(1.0)}
    file = tmp_path / "kohya.safetensors"
    save_file({f"lora_unet_{layer}.{key}": value for key, value in tensors.items()}, file)
    patch = load_lora(tiny_sd1, file)
    name = "denoiser.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    assert set(patch.low_rank) == {name}
    torch.testing.assert_close(change(patch, name), 0.5 * up @ down)


def peft_folder(path, **settings):
    """A denoiser's adapter as peft itself saves it."""
    config = LoraConfig(
        r=4, target_modules=["to_q", "conv_in"], init_lora_weights=False, **settings
    )
    net = get_peft_model(tiny("sd1").denoiser, config)
    net.save_pretrained(path)
    layer = net.base_model.model.conv_in
    return layer.get_delta_weight("default").detach()


def test_a_folder_of_peft_is_read_with_its_alpha_and_its_convolutions(tiny_sd1, tmp_path):
    wanted = peft_folder(tmp_path / "style", lora_alpha=2, alpha_pattern={"conv_in": 12})
    patch = load_lora(tiny_sd1, tmp_path / "style")
    name = "denoiser.conv_in.weight"
    assert {n.rpartition(".")[0].rpartition(".")[2] for n in patch.low_rank} == {"to_q", "conv_in"}
    torch.testing.assert_close(change(patch, name).view(wanted.shape), wanted)
    assert patch.low_rank[name][2] == 12
    with tiny_sd1.patched(patch):
        moved = tiny_sd1.parameters()[name] - tiny_sd1.untouched(name)
    torch.testing.assert_close(moved, wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "settings, says",
    [
        (dict(use_rslora=True), r"rsLoRA: .* over-scale it by sqrt\(rank\)"),
        (dict(use_dora=True), "DoRA"),
        (dict(lora_bias=True), "biases"),
    ],
)
@pytest.mark.filterwarnings("ignore:.lora_bias=True", "ignore:Adapter 'default'")
def test_adapters_that_are_more_than_two_factors_are_refused(tiny_sd1, tmp_path, settings, says):
    peft_folder(tmp_path / "style", **settings)
    with pytest.raises(Unsupported, match=says):
        load_lora(tiny_sd1, tmp_path / "style")


def test_the_same_in_files_of_diffusers(tiny_sd1, tmp_path):
    names = lora_names(tiny_sd1)
    plain = export_lora(tiny_sd1, [low_rank(tiny_sd1, names)], tmp_path / "plain.safetensors")
    tensors = load_file(plain)
    first = next(key for key in tensors if key.endswith("lora_B.weight"))
    stem = first.removesuffix(".lora_B.weight")
    said = {"lora_adapter_metadata": json.dumps({"unet.use_rslora": True, "unet.r": 2})}
    for name, more, metadata, says in [
        ("rs", {}, said, "rsLoRA"),
        ("dora", {f"{stem}.lora_magnitude_vector": torch.ones(32)}, {}, "DoRA"),
        ("kohya_dora", {f"{stem}.dora_scale": torch.ones(32)}, {}, "DoRA"),
        ("bias", {f"{stem}.lora_B.bias": torch.ones(32)}, {}, "biases"),
    ]:
        file = tmp_path / f"{name}.safetensors"
        save_file(tensors | more, file, metadata={"format": "pt", **metadata})
        with pytest.raises(Unsupported, match=says):
            load_lora(tiny_sd1, file)


def test_files_that_do_not_fit_are_refused_and_leave_no_trace(tiny_sd1, tiny_flux, tmp_path):
    before = snapshot(tiny_sd1)
    names = lora_names(tiny_flux)
    denoiser = [name for name in names if name.startswith("denoiser.")]
    other = export_lora(tiny_flux, [low_rank(tiny_flux, denoiser)], tmp_path / "flux.safetensors")
    with pytest.raises(BadInput, match="has no LoRA for any module of"):
        load_lora(tiny_sd1, other)
    wide = {
        f"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_{side}.weight": value
        for side, value in (("A", torch.ones(2, 7)), ("B", torch.ones(32, 2)))
    }
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(BadInput, match="wide.safetensors does not fit"):
        load_lora(tiny_sd1, tmp_path / "wide.safetensors")
    save_file({"weight": torch.ones(2)}, tmp_path / "no.safetensors")
    with pytest.raises(BadInput, match="no.safetensors does not fit"):
        load_lora(tiny_sd1, tmp_path / "no.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"\x00" * 9)
    with pytest.raises(WorkFailed, match="cannot be read"):
        load_lora(tiny_sd1, tmp_path / "torn.safetensors")
    with pytest.raises(NotFound, match="no LoRA at"):
        load_lora(tiny_sd1, tmp_path / "none.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFound, match="adapter_config.json"):
        load_lora(tiny_sd1, tmp_path / "empty")
    assert untouched(tiny_sd1, before)
    tiny_sd1(["a cat"], steps=1)
