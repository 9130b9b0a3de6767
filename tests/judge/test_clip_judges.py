"""Q16 and zero-shot CLIP: the published rule, your own words, and CLIPScore on the way."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from safelight.errors import BadInput, NotFound
from safelight.judge.clip import Clip, pixel_values
from safelight.judge.clip_zero_shot import ClipZeroShot
from safelight.judge.pixels import as_pil
from safelight.judge.policy import DEFAULT, policy
from safelight.judge.q16 import Q16

TEXTS = {"weapons": ("a knife", "a bomb"), "death": "a skull"}


@pytest.fixture(scope="module")
def clip(clip_folder):
    return Clip(clip_folder)


@pytest.mark.parametrize("height, width", [(24, 20), (20, 24), (16, 16), (1, 1), (3, 90), (90, 3)])
def test_pictures_are_prepared_as_transformers_prepares_them(height, width):
    module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    size = {"shortest_edge": 16}
    theirs = module.CLIPImageProcessorPil(size=size, crop_size={"height": 16, "width": 16})(
        as_pil(images), return_tensors="pt"
    )["pixel_values"]
    torch.testing.assert_close(pixel_values(images, 16), theirs, atol=1e-5, rtol=0)


def test_vectors_are_those_of_transformers_and_have_unit_length(clip, pictures):
    tokens = clip.tokenizer(["a cat", "a red car on a sea"], padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = clip.net(**tokens, pixel_values=pixel_values(pictures, 16))
        ours = clip.images(pictures), clip.texts(["a cat", "a red car on a sea"])
    torch.testing.assert_close(ours[0], theirs.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours[1], theirs.text_embeds, atol=1e-5, rtol=0)


def test_a_text_that_is_too_long_is_cut_and_not_an_error(clip):
    with torch.no_grad():
        assert clip.texts(["cat " * 200]).shape == (1, clip.width)


def test_q16_is_a_softmax_of_two_cosines_and_swapping_the_vectors_swaps_it(
    clip, q16_file, tmp_path, pictures
):
    judge = Q16(prompts=q16_file, model=clip)
    v = torch.from_numpy(np.load(q16_file))
    with torch.no_grad():
        cosines = torch.nn.functional.cosine_similarity(
            clip.images(pictures)[:, None], v[None], dim=-1
        )
    expected = (100 * cosines).softmax(1)[:, 1].tolist()
    verdicts = judge(pictures, ["x"] * 3)
    assert [v.score for v in verdicts] == pytest.approx(expected, abs=1e-4)
    assert [v.flagged for v in verdicts] == cosines.argmax(1).bool().tolist()

    save_file({"prompts": v.flip(0).contiguous()}, tmp_path / "swapped.safetensors")
    swapped = Q16(prompts=str(tmp_path / "swapped.safetensors"), model=clip)(pictures, ["x"] * 3)
    assert [a.flagged for a in verdicts] != [b.flagged for b in swapped]
    assert [a.score for a in verdicts] == pytest.approx([1 - b.score for b in swapped], abs=2e-4)


def test_q16_without_its_vectors_or_with_others_says_what_it_needs(clip, tmp_path, pictures):
    with pytest.raises(NotFound, match="prompts=FILE.npy"):
        Q16(model=clip)(pictures, ["x"] * 3)
    np.save(tmp_path / "b16.npy", np.ones((2, 5)))
    with pytest.raises(BadInput, match="another variant"):
        Q16(prompts=str(tmp_path / "b16.npy"), model=clip)(pictures, ["x"] * 3)
    np.save(tmp_path / "nan.npy", np.full((2, clip.width), np.nan))
    with pytest.raises(BadInput, match="not a number"):
        Q16(prompts=str(tmp_path / "nan.npy"), model=clip)(pictures, ["x"] * 3)
    (tmp_path / "prompts.p").write_bytes(b"\x80\x04.")
    with pytest.raises(BadInput, match="no pickles"):
        Q16(prompts=str(tmp_path / "prompts.p"), model=clip)(pictures, ["x"] * 3)
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    with pytest.raises(BadInput, match="no single array"):
        Q16(prompts=str(tmp_path / "objects.npy"), model=clip)(pictures, ["x"] * 3)


def test_zero_shot_scores_are_one_softmax_over_all_texts(clip, pictures):
    judge = ClipZeroShot(categories=TEXTS, neutral=("a park",), template="{}", model=clip)
    with torch.no_grad():
        logits = (
            clip.net.logit_scale.exp()
            * clip.images(pictures)
            @ clip.texts(["a knife", "a bomb", "a skull", "a park"]).T
        )
        p = logits.softmax(1)
    verdicts = judge(pictures, ["a cat"] * 3)
    for verdict, row in zip(verdicts, p.tolist(), strict=True):
        assert verdict.scores["category:weapons"] == pytest.approx(row[0] + row[1], abs=1e-4)
        assert verdict.scores["category:death"] == pytest.approx(row[2], abs=1e-4)
    assert judge.groups == {"weapons": ("category:weapons",), "death": ("category:death",)}


def test_the_clip_score_is_the_cosine_with_the_pictures_own_prompt(clip, pictures):
    prompts = ["a cat", "a red car", "a dog in a park"]
    with torch.no_grad():
        cosines = (clip.images(pictures) * clip.texts(prompts)).sum(1).clamp_min(0).tolist()
    verdicts = ClipZeroShot(categories=TEXTS, model=clip)(pictures, prompts)
    assert [v.scores["clip_score"] for v in verdicts] == pytest.approx(cosines, abs=1e-4)
    assert any(cosines), "the test's pictures fit nothing"


def test_a_score_near_the_threshold_is_could_not_tell_if_asked_for(clip, pictures):
    sure = ClipZeroShot(categories=TEXTS, model=clip)(pictures, ["x"] * 3)
    doubtful = ClipZeroShot(categories=TEXTS, model=clip, doubt=1.0)(pictures, ["x"] * 3)
    assert None not in [v.flagged for v in sure]
    assert [v.flagged for v in doubtful] == [None] * 3 and "too near" in doubtful[0].why


def test_the_order_and_the_company_of_pictures_do_not_matter(clip, q16_file, pictures):
    for judge in (Q16(prompts=q16_file, model=clip), ClipZeroShot(categories=TEXTS, model=clip)):
        together = judge(pictures, ["x"] * 3)
        alone = [judge(image[None], ["x"])[0] for image in pictures]
        assert [v.score for v in together] == pytest.approx([v.score for v in alone], abs=1e-3)


def test_the_profile_names_model_texts_and_weights(clip, q16_file):
    said = ClipZeroShot(categories=TEXTS, model=clip).profile()
    assert said["categories"] == {"weapons": ["a knife", "a bomb"], "death": ["a skull"]}
    assert said["model"] == clip.source and len(said["weights_sha256"]) == 64
    q16 = Q16(prompts=q16_file, model=clip).profile()
    assert q16["weights_sha256"] != said["weights_sha256"]


def test_a_policy_comes_from_a_mapping_or_a_file_and_is_checked(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('weapons = ["a knife", "a bomb"]\ndeath = "a skull"\n')
    assert policy(str(file)) == policy(TEXTS)
    assert policy("") == DEFAULT
    with pytest.raises(NotFound, match="no policy file"):
        policy("nowhere.toml")
    for wrong in ({}, {"a": 3}, {"a": []}, {"a": [""]}, {"": "x"}, {"a": [3]}):
        with pytest.raises(BadInput, match="polic"):
            policy(wrong)
    file.write_text("weapons = [")
    with pytest.raises(BadInput, match="TOML"):
        policy(str(file))


def test_eight_bit_pictures_are_the_same_as_their_files(tmp_path, pictures):
    as_pil(pictures)[0].save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as again:
        array = np.asarray(again)
    live, stored = pictures[:1], torch.from_numpy(array.copy()).permute(2, 0, 1)[None].float() / 255
    torch.testing.assert_close(pixel_values(live, 16), pixel_values(stored, 16), atol=0, rtol=0)
