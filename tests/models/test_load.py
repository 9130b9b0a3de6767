"""`load` takes names, folders and pipelines; whatever is wrong with one is one clear error."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from safelight import names
from safelight.errors import BadInput, NotFound, SafelightError, Unsupported, WorkFailed
from safelight.models.export import export, pipeline_of
from safelight.models.load import load
from safelight.models.tiny import tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An untouched export of every family."""
    root = tmp_path_factory.mktemp("models")
    return {
        family: export(tiny(family), [], root / family) for family in ("sd1", "sdxl", "sd3", "flux")
    }  # noqa: E501


@pytest.fixture
def folder(folders, tmp_path):
    """A copy of the sd1 folder to break."""
    return shutil.copytree(folders["sd1"], tmp_path / "model")


def picture(model):
    return model(["a cat"], seed=1, steps=2, size=(16, 16))[0].image


@pytest.mark.parametrize("name", sorted(n for n in names.table("models") if n.startswith("tiny")))
def test_built_in_tiny_models_load_by_name(name):
    model = load(name, device="cpu")
    assert model.name == name and name.endswith(model.family)


def test_the_shipped_model_loads_by_name():
    model = load("emoji-world", device="cpu")
    assert (model.name, model.family, model.dtype) == ("emoji-world", "sd1", torch.float32)
    assert model.tokens["clip_l"] == 32
    assert model(["a cat"], steps=2)[0].image.shape == (3, *model.default_size)


def test_a_folder_is_the_model_it_was_written_from(folders, tiny_model):
    model = load(str(folders[tiny_model.family]), device="cpu")
    assert model.hashes() == tiny_model.hashes()
    assert model.sampling == tiny_model.sampling
    # The same weights elsewhere in memory: some CPUs add up unaligned rows in another order.
    torch.testing.assert_close(picture(model), picture(tiny_model), atol=1e-5, rtol=0)


def test_a_live_pipeline_is_shared_not_copied(tiny_model):
    pipe = pipeline_of(tiny_model)
    model = load(pipe)
    assert model.family == tiny_model.family
    assert model.denoiser is tiny_model.denoiser
    assert model.hashes() == tiny_model.hashes()


def test_precision_and_device_are_chosen_and_said(folders, caplog):
    with caplog.at_level(logging.INFO, logger="safelight"):
        model = load(folders["sd1"], device="cpu")
    assert model.dtype == torch.float32
    assert "float32 on cpu" in caplog.text
    half = load(folders["sd1"], device="cpu", dtype="bf16")
    assert half.dtype == torch.bfloat16
    assert half.hashes() == model.hashes()


def test_float16_on_disk_is_float32_on_a_cpu_and_hashes_alike(folder):
    for part in ("unet", "vae", "text_encoder"):
        for file in (folder / part).glob("*.safetensors"):
            weights = {k: v.half() for k, v in load_file(file).items()}
            save_file(weights, file, metadata={"format": "pt"})
    model, again = load(folder, device="cpu"), load(folder, device="cpu", dtype="float16")
    assert (model.dtype, again.dtype) == (torch.float32, torch.float16)
    assert model.hashes() == again.hashes()


def test_a_tiny_autoencoder_will_do(folder):
    from diffusers import AutoencoderTiny

    shutil.rmtree(folder / "vae")
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    vae.save_pretrained(folder / "vae")
    index = json.loads((folder / "model_index.json").read_text())
    index["vae"] = ["diffusers", "AutoencoderTiny"]
    (folder / "model_index.json").write_text(json.dumps(index))
    model = load(folder, device="cpu")
    assert model.vae_factor == 2
    image = picture(model)
    assert image.shape == (3, 16, 16)
    assert model.encode_images(image[None]).shape == (1, 4, 8, 8)


def test_a_short_tokenizer_sets_the_length(folder):
    file = folder / "tokenizer" / "tokenizer_config.json"
    about = json.loads(file.read_text())
    file.write_text(json.dumps({**about, "model_max_length": 32}))
    model = load(folder, device="cpu")
    assert model.encode(["a cat"]).states.shape[1] == 32


def test_a_tokenizer_that_forgot_its_length_takes_the_encoders(folder):
    file = folder / "tokenizer" / "tokenizer_config.json"
    about = json.loads(file.read_text())
    del about["model_max_length"]
    file.write_text(json.dumps(about))
    assert load(folder, device="cpu").encode(["a cat"]).states.shape[1] == 77


def test_v_prediction_is_read_from_the_scheduler(folder):
    file = folder / "scheduler" / "scheduler_config.json"
    about = json.loads(file.read_text())
    file.write_text(json.dumps({**about, "prediction_type": "v_prediction"}))
    model = load(folder, device="cpu")
    z, eps = torch.randn(2, 1, 4, 8, 8)
    t = torch.tensor(500.0)
    velocity = model.scheduler.get_velocity(z, eps, t.long()[None])
    torch.testing.assert_close(model.noised(z, eps, t)[1], velocity)


def test_sd3_may_come_without_t5(folders, tmp_path):
    folder = shutil.copytree(folders["sd3"], tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder_3"] = index["tokenizer_3"] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(folder / "text_encoder_3")
    model = load(folder, device="cpu")
    seen = model.encode(["a cat"])
    assert seen.encoders == ("clip_l", "clip_g")
    assert seen.states.shape[1] == 77 + 256 and not seen.states[:, 77:].any()
    assert picture(model).isfinite().all()


# Wrong in every way


def weights_of(folder, part="text_encoder"):
    return next((folder / part).glob("*.safetensors"))


def truncate(folder):
    file = weights_of(folder)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(folder):
    weights_of(folder, "unet").write_bytes(b"")


def lose_weights(folder):
    weights_of(folder, "vae").unlink()


def lose_a_tensor(folder):
    file = weights_of(folder)
    weights = load_file(file)
    weights.pop(sorted(weights)[0])
    save_file(weights, file, metadata={"format": "pt"})


def lose_a_tensor_of_the_denoiser(folder):
    file = weights_of(folder, "unet")
    weights = load_file(file)
    weights.pop("conv_in.weight")
    save_file(weights, file, metadata={"format": "pt"})


def misshape_a_tensor(folder):
    file = weights_of(folder)
    weights = load_file(file)
    key = sorted(weights)[0]
    weights[key] = weights[key][:1].clone()
    save_file(weights, file, metadata={"format": "pt"})


def pickle_weights(folder):
    weights_of(folder, "unet").rename(folder / "unet" / "diffusion_pytorch_model.bin")


def lose_a_part(folder):
    shutil.rmtree(folder / "unet")


def lose_the_tokenizer(folder):
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()


def lose_the_merges(folder):
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / "merges.txt").unlink()


def swap_the_tokenizer(folder):
    file = folder / "tokenizer" / "tokenizer.json"
    about = json.loads(file.read_text())
    about["model"]["vocab"] |= {f"more{i}": 5000 + i for i in range(5)}
    file.write_text(json.dumps(about))


def lose_a_config(folder):
    (folder / "unet" / "config.json").unlink()


def break_a_config(folder):
    (folder / "unet" / "config.json").write_text('{"in_channels": ')


def break_the_tokenizer(folder):
    (folder / "tokenizer" / "tokenizer.json").write_text("{not json")


def break_the_index(folder):
    (folder / "model_index.json").write_text("")


def lose_the_index(folder):
    (folder / "model_index.json").unlink()


def edit_index(**changes):
    def edit(folder):
        file = folder / "model_index.json"
        index = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({k: v for k, v in index.items() if v is not ...}))

    return edit


def break_the_sampling(folder):
    (folder / "safelight.json").write_text('{"sampling": {"steps": 3}}')


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (truncate, WorkFailed),
        (empty, WorkFailed),
        (lose_weights, NotFound),
        (lose_a_tensor, WorkFailed),
        (lose_a_tensor_of_the_denoiser, WorkFailed),
        (misshape_a_tensor, WorkFailed),
        (pickle_weights, Unsupported),
        (lose_a_part, NotFound),
        (lose_the_tokenizer, NotFound),
        (lose_the_merges, NotFound),
        (swap_the_tokenizer, WorkFailed),
        (lose_a_config, WorkFailed),
        (break_a_config, WorkFailed),
        (break_the_tokenizer, WorkFailed),
        (break_the_index, WorkFailed),
        (lose_the_index, NotFound),
        (edit_index(unet=...), Unsupported),
        (edit_index(unet=["my_code", "Net"]), Unsupported),
        (edit_index(unet=["diffusers", "NotAModel"]), Unsupported),
        (edit_index(transformer=["diffusers", "PixArtTransformer2DModel"], unet=...), Unsupported),
        (edit_index(text_encoder=[None, None]), Unsupported),
        (edit_index(tokenizer=[None, None]), NotFound),
        (break_the_sampling, BadInput),
    ],
)
def test_a_broken_folder_is_one_clear_error(folder, damage, error):
    damage(folder)
    with pytest.raises(error) as seen:
        load(folder, device="cpu")
    assert isinstance(seen.value, SafelightError)
    assert len(str(seen.value)) < 500


def test_an_inpainting_model_is_refused(folder):
    from diffusers import UNet2DConditionModel

    config = json.loads((folder / "unet" / "config.json").read_text())
    net = UNet2DConditionModel.from_config({**config, "in_channels": 9})
    net.save_pretrained(folder / "unet")
    with pytest.raises(Unsupported, match="9 channels"):
        load(folder, device="cpu")


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("emoji-wrld", NotFound, "Did you mean 'emoji-world'"),
        ("nothing", NotFound, "Known: emoji-world"),
        ("./nothing", NotFound, "no model folder"),
        ("/nothing/at/all", NotFound, "no model folder"),
        ("nobody/nothing", WorkFailed, "offline"),
        ("no body/noth!ng", NotFound, "neither"),
        (3, BadInput, "int"),
        (None, BadInput, "NoneType"),
    ],
)
def test_names_that_lead_nowhere_are_one_clear_error(name, error, says):
    with pytest.raises(error, match=says):
        load(name)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (dict(device="gpu"), BadInput),
        (dict(device="cuda:99"), Unsupported),
        (dict(dtype="float8"), NotFound),
        (dict(dtype=torch.int8), Unsupported),
    ],
)
def test_devices_and_precisions_that_are_not_there(settings, error):
    with pytest.raises(error):
        load("tiny-sd1", **settings)


def test_a_pipeline_of_another_kind_is_refused(tiny_sd1):
    pipe = pipeline_of(tiny_sd1)
    pipe.register_modules(unet=tiny_sd1.vae)
    with pytest.raises(Unsupported, match="AutoencoderKL"):
        load(pipe)
