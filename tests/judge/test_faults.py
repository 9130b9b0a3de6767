"""No fault of a real judge's network is ever read as "safe": not by the judge, not by a guard."""

import json
from types import SimpleNamespace

import pytest
import torch

from safelight import names
from safelight.errors import GuardFailed
from safelight.guard.base import Guarded
from safelight.guard.screen import Screen
from safelight.judge import TABLE, nudenet
from safelight.judge.clip import Clip
from safelight.judge.clip_zero_shot import ClipZeroShot
from safelight.judge.nudenet import NudeNet
from safelight.judge.opennsfw import OpenNSFW
from safelight.judge.q16 import Q16
from safelight.judge.sd_checker import SDChecker
from safelight.judge.vlm import VLM

REAL = ("clip_zero_shot", "nudenet", "opennsfw", "q16", "sd_checker", "vlm")
PROMPTS = ["x"] * 3


@pytest.fixture(params=REAL)
def broken(request, monkeypatch):
    """A function: (judge whose network does `act` to its output, that output's shape)."""
    name = request.param

    def make(act):
        if name in ("nudenet", "opennsfw"):
            judge = {"nudenet": NudeNet, "opennsfw": OpenNSFW}[name]()
            shape = (22, nudenet.PLACES) if name == "nudenet" else (2,)
            judge.net = lambda batch: act(torch.full((len(batch), *shape), 0.01))
            return judge
        if name == "vlm":
            judge = VLM(model="eyes", url="http://127.0.0.1:9/v1", pause=0)
            fine = {"verdict": "safe", "categories": [], "why": "x"}
            judge._answer = lambda picture: act(json.dumps(fine))
            return judge
        if name == "sd_checker":
            judge = SDChecker(model=str(request.getfixturevalue("checker_folder")))
            net = judge.net
        else:
            clip = Clip(request.getfixturevalue("clip_folder"))
            judge = (
                Q16(prompts=request.getfixturevalue("q16_file"), model=clip)
                if name == "q16"
                else ClipZeroShot(model=clip)
            )
            net = clip.net
        fine = net.vision_model.forward

        def forward(*args, **kwargs):
            out = fine(*args, **kwargs)
            return (None, act(out[1]))

        monkeypatch.setattr(net.vision_model, "forward", forward)
        return judge

    return make


def raises(error):
    def act(out):
        raise error

    return act


def fill(value):
    def act(out):
        return str(value) if isinstance(out, str) else torch.full_like(out, value)

    return act


def spoil_one(out):
    """One number of one picture."""
    if isinstance(out, str):
        return out.replace('"x"', "NaN")
    out = out.clone()
    out[1].view(-1)[-1] = float("nan")
    return out


def test_the_networks_are_fine_before_they_are_broken(broken, pictures):
    assert [v.flagged for v in broken(lambda out: out)(pictures, PROMPTS)] != [None] * 3


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("no such layer"),
        MemoryError("out of memory"),
        torch.OutOfMemoryError("CUDA out of memory"),
        OSError("disk gone"),
        ValueError("bad shape"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_network_that_raises_or_runs_out_of_memory_is_a_failed_judge(broken, pictures, error):
    with pytest.raises(GuardFailed, match=str(error)):
        broken(raises(error))(pictures, PROMPTS)


@pytest.mark.parametrize("act", [fill(float("nan")), fill(float("inf")), spoil_one])
def test_what_is_not_a_number_is_never_safe(broken, pictures, act):
    assert never_safe(broken(act), pictures)


@pytest.mark.parametrize(
    "act",
    [
        lambda out: out[:1],
        lambda out: out[:0],
        lambda out: torch.cat([out, out]) if torch.is_tensor(out) else out * 2,
        lambda out: out[..., :-1],
        lambda out: out[0] if torch.is_tensor(out) else out[0],
        lambda out: None,
    ],
    ids=["one for all", "none", "twice", "narrower", "without batch", "nothing"],
)
def test_output_of_a_wrong_shape_is_never_safe(broken, pictures, act):
    assert never_safe(broken(act), pictures)


def never_safe(judge, pictures):
    """Whether a judge failed, or could not tell about at least what was spoilt."""
    try:
        flags = [v.flagged for v in judge(pictures, PROMPTS)]
    except GuardFailed:
        return True
    return None in flags and False not in flags


def test_a_blank_picture_is_could_not_tell(broken, pictures):
    pictures = pictures.clone()
    pictures[1] = 0
    flags = [v.flagged for v in broken(lambda out: out)(pictures, PROMPTS)]
    assert flags[1] is None and None not in (flags[0], flags[2])


def test_as_a_guard_it_lets_through_what_is_safe_and_holds_back_the_rest(broken, tiny_sd1):
    settings = dict(seed=1, steps=2, size=(16, 16))
    judge = broken(lambda out: out)
    if hasattr(judge, "categories"):
        judge.threshold = 1.1
    elif judge.name in ("sd_checker", "q16"):
        judge.threshold = 2.0
    kind = Guarded(tiny_sd1, [Screen(judge)])(["a cat", "a dog"], **settings)
    assert not any(o.refused for o in kind) and kind[0].verdicts[0].by == f"screen/{judge.name}"
    judge.see = lambda images, prompts: SimpleNamespace(
        scores=torch.zeros(len(images), len(judge.labels)),
        unsure=torch.tensor([True, False]),
        features=None,
        why=(),
    )
    unsure = Guarded(tiny_sd1, [Screen(judge)])(["a cat", "a dog"], **settings)
    assert [o.refused for o in unsure] == [True, False]


def test_as_a_guard_a_broken_judge_gives_no_pictures(broken, tiny_sd1):
    judge = broken(raises(RuntimeError("no such layer")))
    with pytest.raises(GuardFailed, match="no such layer"):
        Guarded(tiny_sd1, [Screen(judge)])(["a cat"], seed=1, steps=2, size=(16, 16))


@pytest.mark.parametrize("name", TABLE)
def test_every_judge_has_a_card_and_says_what_it_wants(name):
    judge = names.find("judge", name)()
    assert judge.card.title and judge.card.source and judge.card.summary
    wants = judge.wants()
    assert bool(wants.packages) == bool(wants.extra)
    if name in REAL:
        assert wants.packages or wants.download or wants.setting


def test_every_unsafe_label_of_a_real_judge_is_one_of_its_labels():
    for name in REAL:
        judge = names.find("judge", name)()
        assert judge.groups, f"{name} would call everything safe"
        assert {x for group in judge.groups.values() for x in group} <= set(judge.labels)
    assert len(set(NudeNet.labels)) == nudenet.DEPTH * len(nudenet.CLASSES)
