"""The SD checker decides as diffusers does, on any picture, without touching it."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from safelight.errors import BadInput, NotFound, Unsupported, WorkFailed
from safelight.judge.clip import pixel_values
from safelight.judge.sd_checker import SDChecker, margins


@pytest.fixture
def judge(checker_folder):
    return SDChecker(model=str(checker_folder))


def many(n=48):
    """Noise whose pixels have about the deviation that normalised ones have."""
    rng = torch.Generator().manual_seed(1)
    return (0.45 + 0.27 * torch.randn(n, 3, 16, 16, generator=rng)).clamp(0, 1)


def test_flags_are_those_of_diffusers(judge):
    images = many()
    x = pixel_values(images, 16)
    _, theirs = judge.net(x, [torch.ones(1)] * len(images))
    ours = [v.flagged for v in judge(images, ["x"] * len(images))]
    assert ours == theirs
    assert 0 < sum(theirs) < len(images), "the test's bars separate nothing"


def test_flags_of_the_onnx_rule_are_those_of_the_onnx_form(checker_folder):
    judge, images = SDChecker(model=str(checker_folder), rule="onnx"), many()
    _, theirs = judge.net.forward_onnx(pixel_values(images, 16), images.clone())
    assert [v.flagged for v in judge(images, ["x"] * len(images))] == theirs.tolist()


def test_random_margins_agree_with_the_published_loop_word_for_word():
    rng = torch.Generator().manual_seed(0)
    s, c = torch.rand(300, 3, generator=rng) * 0.03, torch.rand(300, 17, generator=rng) * 0.03
    S, C = torch.full((3,), 0.025), torch.full((17,), 0.028)
    ours = margins(s, c, S=S, C=C, rule="torch")
    for row in range(300):
        a, special, concepts = 0.0, [], []
        for j in range(3):
            special.append(round(float(s[row, j]) - 0.025 + a, 3))
            a = 0.01 if special[-1] > 0 else a
        for k in range(17):
            concepts.append(round(float(c[row, k]) - 0.028 + a, 3))
        assert ours[row].tolist() == pytest.approx(concepts + special, abs=1e-3 + 1e-6)
        assert (ours[row, :17].max() > 0) == (max(concepts) > 0)


def test_a_seen_special_concept_raises_those_that_follow_and_none_before():
    S, C = torch.zeros(3), torch.zeros(17)
    c = torch.full((1, 17), -0.005)
    last_only = torch.tensor([[-0.005, -0.005, 0.01]])
    first_only = torch.tensor([[0.01, -0.005, -0.02]])
    assert (margins(last_only, c, S=S, C=C, rule="torch")[0, :17] > 0).all()
    raised = margins(first_only, c, S=S, C=C, rule="torch")[0, 17:]
    assert raised.tolist() == pytest.approx([0.01, 0.005, -0.01])
    unraised = margins(first_only, c, S=S, C=C, rule="onnx")[0, 17:]
    assert unraised.tolist() == pytest.approx([0.01, -0.005, -0.02])


def test_the_least_margin_above_the_bar_flags_and_the_bar_itself_does_not(judge):
    s, S, C = torch.full((1, 3), -1.0), torch.zeros(3), torch.zeros(17)

    def flagged(margin, rule):
        c = torch.full((1, 17), margin)
        scores = margins(s, c, S=S, C=C, rule=rule)
        return round(float(scores[0, 0]), 4) >= judge.threshold

    assert flagged(0.0006, "torch") and not flagged(0.0004, "torch")
    assert flagged(0.00001, "onnx") and not flagged(0.0, "onnx")


def test_pictures_are_not_changed(judge):
    images = many(4)
    before = images.clone()
    judge(images, ["x"] * 4)
    assert torch.equal(images, before)


def test_weights_under_their_older_names_are_found(checker_folder, tmp_path):
    old = {}
    for name, value in load_file(checker_folder / "model.safetensors").items():
        inside = name.startswith("vision_model.") and "vision_model.vision_model" not in name
        old[f"vision_model.{name}" if inside else name] = value.clone()
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((checker_folder / "config.json").read_text())
    new, again = SDChecker(model=str(checker_folder)), SDChecker(model=str(tmp_path))
    assert new.weights_sha256 == again.weights_sha256


def test_missing_weights_are_an_error_and_never_random(checker_folder, tmp_path):
    (tmp_path / "config.json").write_text((checker_folder / "config.json").read_text())
    judge = SDChecker(model=str(tmp_path))
    with pytest.raises(NotFound, match="no safetensors"):
        judge.profile()
    some = load_file(checker_folder / "model.safetensors")
    del some["concept_embeds"]
    save_file(some, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WorkFailed, match="lacks 1 weights.*concept_embeds"):
        judge.profile()
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(Unsupported, match="pickled"):
        judge.profile()


def test_an_unknown_rule_or_folder_is_refused():
    with pytest.raises(BadInput, match="rule"):
        SDChecker(rule="fast")
    with pytest.raises(NotFound, match="no model folder"):
        SDChecker(model="./nowhere").profile()
    with pytest.raises(WorkFailed, match="could not be fetched"):
        SDChecker(model="nobody/nothing-of-this-name").profile()  # the tests are offline


def test_features_are_unit_vectors_of_the_named_network(judge):
    images = many(3)
    assert judge.features(images).norm(dim=1).tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    assert judge.feature_name.endswith("/image_embeds")
