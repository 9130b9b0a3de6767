"""An export needs no Safelight: diffusers opens it and paints the same picture."""

import json

import diffusers
import pytest
import torch
from safetensors import safe_open
from test_patch import low_rank, moved, text_names

from safelight.errors import BadInput, WorkFailed
from safelight.models.export import export, export_lora, prefixed
from safelight.models.load import load
from safelight.models.patch import export as export_from_patch
from safelight.models.tiny import tiny


def keys(folder):
    found = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            found |= set(tensors.keys())
    return found


def test_diffusers_opens_it_and_paints_the_patched_picture(
    tiny_model, tmp_path, painted, painted_upstream
):
    names = text_names(tiny_model)
    first = moved(tiny_model, names)
    second = low_rank(tiny_model, [n for n in names if n.endswith(("q_proj.weight", ".q.weight"))])
    export(tiny_model, [first, second], tmp_path / "out", scales=[1.0, 0.5])

    with tiny_model.patched(first), tiny_model.patched(second, 0.5):
        ours = painted(tiny_model, 3.0)
    pipe = getattr(diffusers, tiny_model.pipeline).from_pretrained(tmp_path / "out")
    theirs = painted_upstream(tiny_model, 3.0, pipe=pipe)
    assert (ours - theirs).abs().max() <= 1e-5
    assert (ours - painted(tiny_model, 3.0)).abs().max() > 1e-3  # the patch did something

    again = load(tmp_path / "out", device="cpu")
    torch.testing.assert_close(painted(again, 3.0), ours, atol=1e-5, rtol=0)


def test_the_model_is_untouched_by_its_export(tiny_sd1, tmp_path):
    before = tiny_sd1.hashes()
    export(tiny_sd1, [moved(tiny_sd1, text_names(tiny_sd1))], tmp_path / "out")
    assert tiny_sd1.hashes() == before


def test_clip_weights_carry_the_prefix_that_both_generations_read(tiny_model, tmp_path):
    export(tiny_model, [], tmp_path / "out")
    for name in tiny_model.text_encoders:
        if name.startswith("clip"):
            found = keys(tmp_path / "out" / tiny_model.parts[name])
            assert "text_model.embeddings.token_embedding.weight" in found
            assert all(key.startswith(("text_model.", "text_projection.")) for key in found)


def test_flat_names_are_read_as_well(tiny_sd1, tmp_path):
    """What transformers 5 itself writes."""
    from safelight.models.export import pipeline_of

    pipeline_of(tiny_sd1).save_pretrained(tmp_path / "flat")
    assert load(tmp_path / "flat", device="cpu").hashes() == tiny_sd1.hashes()


def test_prefixing_twice_changes_nothing():
    weights = {"a.weight": torch.ones(1), "text_projection.weight": torch.zeros(1)}
    once = prefixed(weights)
    assert set(once) == {"text_model.a.weight", "text_projection.weight"}
    assert prefixed(once) == once


def test_tokenizers_have_the_files_of_both_generations(tiny_model, tmp_path):
    """transformers 4 builds CLIP's from vocab.json and merges.txt, and wants special tokens named
    as it did; measured with 4.57.6 and 5.23.0: the same pictures to 1e-6 in all four families."""
    export(tiny_model, [], tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    for name in tiny_model.text_encoders:
        part = tiny_model.parts[name].replace("text_encoder", "tokenizer")
        files = {file.name for file in (tmp_path / "out" / part).iterdir()}
        about = json.loads((tmp_path / "out" / part / "tokenizer_config.json").read_text())
        assert not isinstance(about.get("extra_special_tokens"), list)
        assert about["model_max_length"] == tiny_model.tokens[name]
        if name == "t5":
            assert index[part][1] == "T5TokenizerFast"
        else:
            assert {"vocab.json", "merges.txt", "tokenizer.json"} <= files


def test_it_says_what_is_in_it(tiny_sd1, tmp_path):
    patch = moved(tiny_sd1, text_names(tiny_sd1))
    export_from_patch(tiny_sd1, [patch], tmp_path / "out")
    about = json.loads((tmp_path / "out" / "safelight.json").read_text())
    assert about["patches"] == [patch.about]
    assert about["sampling"]["size"] == [16, 16]


def test_an_export_may_be_written_again_but_nothing_else_is_overwritten(tiny_sd1, tmp_path):
    export(tiny_sd1, [], tmp_path / "out")
    export(tiny_sd1, [moved(tiny_sd1, text_names(tiny_sd1))], tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model_index.json").write_text("{}")
    with pytest.raises(BadInput, match="not an earlier export"):
        export(tiny_sd1, [], tmp_path / "mine")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out"]


def test_a_failed_export_leaves_nothing(tiny_sd1, tmp_path, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safelight.models.export.save_file", full_disk)
    with pytest.raises(WorkFailed, match="No space left"):
        export(tiny_sd1, [], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_patch_for_another_model_is_refused_before_anything_is_written(tiny_sd1, tmp_path):
    patch = moved(tiny_sd1, text_names(tiny_sd1))
    with pytest.raises(BadInput, match="other weights"):
        export(tiny("sd1", seed=1), [patch], tmp_path / "out")
    with pytest.raises(BadInput, match="2 scales for 1"):
        export(tiny_sd1, [patch], tmp_path / "out", scales=[1.0, 2.0])
    assert not list(tmp_path.iterdir())


def lora_names(model):
    """Attention weights whose LoRA diffusers loads: of the denoiser and the CLIP encoders."""
    ends = ("attn1.to_q.weight", "attn.to_q.weight", "q_proj.weight")
    return [n for n in model.parameters() if n.endswith(ends) and not n.startswith("t5")]


def test_diffusers_loads_low_rank_patches_as_a_lora_file(
    tiny_model, tmp_path, painted, painted_upstream
):
    names = lora_names(tiny_model)
    first, second = low_rank(tiny_model, names), low_rank(tiny_model, names[:2], rank=1, seed=1)
    file = export_lora(tiny_model, [first, second], tmp_path / "l.safetensors", scales=[1.0, 0.5])
    with tiny_model.patched(first), tiny_model.patched(second, 0.5):
        ours = painted(tiny_model, 3.0)

    export(tiny_model, [], tmp_path / "plain")
    pipe = getattr(diffusers, tiny_model.pipeline).from_pretrained(tmp_path / "plain")
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    theirs = painted_upstream(tiny_model, 3.0, pipe=pipe)
    assert (ours - theirs).abs().max() <= 1e-4
    assert (ours - painted(tiny_model, 3.0)).abs().max() > 1e-3
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_lora_file_takes_low_rank_patches_only(tmp_path):
    model = tiny("sd1")
    file = tmp_path / "l.safetensors"
    with pytest.raises(BadInput, match="scope=lora"):
        export_lora(model, [moved(model, text_names(model))], file)
    with pytest.raises(BadInput, match="empty"):
        export_lora(model, [], file)
    with pytest.raises(BadInput, match="safetensors"):
        export_lora(model, [low_rank(model, lora_names(model))], tmp_path / "l.bin")
    assert list(tmp_path.iterdir()) == []
