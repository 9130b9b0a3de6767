"""Where the pictures come from that attacks aim at."""

import pytest
import torch
from denoising import BY_ID, FAST, PROMPTS, dented, pictures, search
from PIL import Image

from safelight.attack.control import controlled
from safelight.attack.pictures import gallery, painted, similarity, targets
from safelight.attack.replay import Replay
from safelight.errors import BadInput, NotFound, Unsupported
from safelight.judge.fake import FakeJudge


def save(image, path):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray((image.permute(1, 2, 0) * 255).byte().numpy()).save(path)


def test_without_a_setting_the_undefended_model_paints_each_prompt_at_its_own_seed(tiny_model):
    alone = [
        tiny_model([prompt.text], seed=seed, **FAST)[0].image
        for prompt, seed in zip(PROMPTS, (3, 4), strict=True)
    ]
    with tiny_model.patched(dented(tiny_model)):
        seen = targets(list(PROMPTS), search(tiny_model))
        defended = tiny_model(PROMPTS.texts, seed=[3, 4], **FAST)
    torch.testing.assert_close(seen, torch.stack(alone), atol=1e-4, rtol=0)
    assert (seen[0] - defended[0].image).abs().max() > 1e-3


def test_another_undefended_model_paints_without_its_patches(tiny_sd1, tiny_sdxl):
    with tiny_sd1.patched(dented(tiny_sd1)):
        there = painted(["a cat"], [1], tiny_sd1, tiny_sd1, **FAST)
    torch.testing.assert_close(there, painted(["a cat"], [1], tiny_sd1, **FAST))
    with pytest.raises(Unsupported, match="sdxl"):
        painted(["a cat"], [1], tiny_sd1, tiny_sdxl)


def test_pictures_can_be_brought_along_by_id(tiny_sd1, tmp_path):
    for name, image in BY_ID.items():
        save(image, tmp_path / f"{name}.png")
    for source in (BY_ID, str(tmp_path)):
        seen = targets(list(PROMPTS), search(tiny_sd1), source)
        torch.testing.assert_close(seen, pictures(), atol=1 / 254, rtol=0)
    (tmp_path / "two.png").unlink()
    with pytest.raises(NotFound, match=r"no picture two\.png"):
        targets(list(PROMPTS), search(tiny_sd1), str(tmp_path))
    (tmp_path / "two.png").write_text("no picture")
    with pytest.raises(BadInput, match="cannot be read"):
        targets(list(PROMPTS), search(tiny_sd1), str(tmp_path))


def test_brought_pictures_are_brought_to_size(tiny_sd1):
    large = {name: torch.rand(3, 40, 20) for name in BY_ID}
    seen = targets(list(PROMPTS), search(tiny_sd1), large)
    assert seen.shape == (2, 3, 16, 16) and seen.min() >= 0 and seen.max() <= 1
    with pytest.raises(BadInput, match="shape"):
        targets(list(PROMPTS), search(tiny_sd1), {name: torch.rand(16, 16) for name in BY_ID})


def test_a_gallery_is_a_folder_with_or_without_categories(tmp_path):
    for i, image in enumerate(pictures(3)):
        save(image, tmp_path / "all" / f"{i}.png")
        save(image, tmp_path / f"{i}.jpg")
    (tmp_path / "notes.txt").write_text("no picture")
    assert gallery(str(tmp_path), "all", (16, 16)).shape == (3, 3, 16, 16)
    assert gallery(str(tmp_path), "cats", (8, 8)).shape == (3, 3, 8, 8)
    assert gallery({"cats": pictures(3)}, "cats", (16, 16)).shape == (3, 3, 16, 16)
    with pytest.raises(NotFound, match="no pictures"):
        gallery(str(tmp_path / "none"), "cats", (8, 8))
    with pytest.raises(NotFound, match="'dogs'"):
        gallery({"cats": pictures(3)}, "dogs", (8, 8))


def test_a_picture_is_most_like_itself(tiny_sd1):
    a, b = pictures(2, 1), pictures(2, 2)
    for judge in (None, FakeJudge()):
        same, other = similarity(a, a, tiny_sd1, judge), similarity(a, b, tiny_sd1, judge)
        torch.testing.assert_close(same, torch.ones(2))
        assert (other < 1 - 1e-4).all()


def test_only_attacks_that_aim_at_pictures_have_an_injection_control(tiny_sd1):
    with pytest.raises(BadInput, match="no such control"):
        controlled(Replay(), PROMPTS, tiny_sd1, tiny_sd1)
