"""The Emoji World judges name what their networks see; here with untrained networks."""

import json

import pytest
import torch
from safetensors.torch import save_file

from safelight import names
from safelight.errors import GuardFailed, NotFound, WorkFailed
from safelight.guard.base import Guarded
from safelight.guard.screen import Screen
from safelight.judge import emoji_net
from safelight.judge.emoji import EmojiJudge, EmojiJudgeB

META = {
    "labels": ["cat", "pistol", "skull"],
    "groups": {"weapons": ["pistol"], "death": ["skull"]},
    "backgrounds": ["beach", "night"],
    "styles": ["flat", "soft"],
    "threshold": 0.5,
    "clean": {"background": 0.5, "object": 0.5},
}


@pytest.fixture(params=["emoji", "emoji-b"])
def judge(request, tmp_path, monkeypatch):
    """Each judge with random weights in a folder of its own."""
    folder = tmp_path / "world" / "judges"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    for name, which in (("emoji", "a"), ("emoji-b", "b")):
        net = emoji_net.EmojiNet(which, META)
        save_file(net.state_dict(), folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text(json.dumps(META))
    monkeypatch.setattr(emoji_net, "files", lambda _: tmp_path)
    monkeypatch.setattr("safelight.judge.emoji.files", lambda _: tmp_path)
    return names.find("judge", request.param)()


def test_scores_carry_their_kind_and_are_probabilities(judge):
    verdict = judge(torch.rand(2, 3, 64, 64), ["x", "y"])[0]
    assert set(verdict.scores) == {
        *("object:cat", "object:pistol", "object:skull"),
        *("background:beach", "background:night", "style:flat", "style:soft"),
    }
    assert all(0 <= score <= 1 for score in verdict.scores.values())
    for kind in ("background", "style"):
        total = sum(x for label, x in verdict.scores.items() if label.startswith(kind))
        assert total == pytest.approx(1, abs=2e-4)


def test_only_unsafe_objects_flag(judge):
    with torch.no_grad():
        judge.net.objects.weight.zero_()
        judge.net.objects.bias.copy_(torch.tensor([9.0, -9.0, -9.0]))
    assert judge(torch.rand(1, 3, 64, 64), ["x"])[0].flagged is False
    with torch.no_grad():
        judge.net.objects.bias.copy_(torch.tensor([-9.0, -9.0, 9.0]))
    assert judge(torch.rand(1, 3, 64, 64), ["x"])[0].flagged is True


def test_features_and_distances_come_from_the_named_network(judge):
    images = torch.rand(2, 3, 64, 64)
    assert judge.feature_name == f"{judge.name}/penultimate"
    assert judge.features(images).shape[0] == 2
    assert judge.perceptual(images, images).tolist() == [0, 0]
    assert (judge.perceptual(images, images.flip(0)) > 0).all()


def test_the_profile_is_json_with_the_hash_of_the_weights(judge):
    profile = json.loads(json.dumps(judge.profile()))
    assert profile["name"] == judge.name and len(profile["weights_sha256"]) == 64
    assert profile["groups"] == {"weapons": ["object:pistol"], "death": ["object:skull"]}
    assert profile["clean"] == META["clean"] and profile["threshold"] == 0.5


def test_the_two_judges_are_different(judge):
    assert EmojiJudge().name == "emoji" and EmojiJudgeB().name == "emoji-b"
    assert EmojiJudge().weights_sha256 != EmojiJudgeB().weights_sha256


def test_missing_and_truncated_weights_are_one_clear_message(judge, tmp_path):
    path = tmp_path / "world" / "judges" / f"{judge.name}.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(WorkFailed, match="damaged.*Reinstall"):
        judge.profile()
    path.unlink()
    with pytest.raises(NotFound, match="[Rr]einstall"):
        judge.profile()


class Broken:
    """A judge's network with something done to what it says about objects."""

    def __init__(self, net, act):
        self.net, self.meta, self.act = net, net.meta, act

    def to(self, device):
        return self

    def __call__(self, images):
        out = self.net(images)
        return {**out, "objects": self.act(out["objects"])}


def out_of_memory(objects):
    raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize(
    "act",
    [
        out_of_memory,
        lambda x: x * float("nan"),
        lambda x: x[:1],
        lambda x: x[:, :-1],
        lambda x: None,
    ],
    ids=["out of memory", "not a number", "one for all", "narrower", "nothing"],
)
def test_a_broken_network_is_a_failed_judge_and_a_screen_lets_nothing_through(judge, act, tiny_sd1):
    judge.net = Broken(judge.net, act)
    with pytest.raises(GuardFailed):
        judge(torch.rand(3, 3, 64, 64), ["x"] * 3)
    with pytest.raises(GuardFailed):
        Guarded(tiny_sd1, [Screen(judge)])(["a cat", "a dog"], seed=1, steps=1, size=(16, 16))
