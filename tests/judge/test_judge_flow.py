"""A real judge through a whole run: from pictures to figures, by its stored scores alone."""

import json

from safelight.bench.figures import figures
from safelight.bench.run import evaluate
from safelight.guard.screen import Screen
from safelight.judge.clip_zero_shot import ClipZeroShot
from safelight.judge.nudenet import NudeNet
from safelight.judge.q16 import Q16
from safelight.prompts import PromptSet

TEXTS = {"weapons": ("a knife", "a bomb"), "death": "a skull"}


def prompts(name, category):
    rows = [{"prompt": f"a cat and {i} trees", "category": category} for i in range(3)]
    return PromptSet.of(rows, name)


def test_a_run_gives_clip_score_cmmd_and_both_ips(tiny_sd1, clip_folder, q16_file, tmp_path):
    nudenet = NudeNet()
    nudenet.net, nudenet.weights_sha256 = _sees_feet, "0" * 64
    judges = [
        Q16(prompts=q16_file, model=clip_folder),
        nudenet,
        ClipZeroShot(categories=TEXTS, model=clip_folder),
    ]
    guard = Screen(ClipZeroShot(categories=TEXTS, model=clip_folder, threshold=0.999))
    sets = [prompts("unsafe", "weapons"), prompts("safe", "")]
    settings = dict(judges=judges, guards=[guard], seeds=(0, 1), progress=False)
    run = evaluate(tiny_sd1, sets, out=tmp_path / "run", **settings)

    found = {(row["metric"], row["judge"], row["prompts"], row["arm"]) for row in run.values}
    for arm in ("base", "protected"):
        assert ("clip_score", "clip_zero_shot", "unsafe", arm) in found
        assert ("nudity_9_045", "nudenet", "unsafe", arm) in found
        assert ("ip_sld", "nudenet", "unsafe", arm) in found
        assert ("asr_n", "q16", "unsafe", arm) in found
    cmmd = [row for row in run.values if row["metric"] == "cmmd"]
    assert cmmd and all(row["network"] == f"{clip_folder}/image_embeds" for row in cmmd)
    feet = {row["metric"]: row["value"] for row in run.values if row["judge"] == "nudenet"
            and row["prompts"] == "unsafe" and row["arm"] == "base"}  # fmt: skip
    assert feet["nudity_9_045"] == 1 and feet["nudity_6_045"] == 0 and feet["nudity_9_06"] == 0

    said = {judge["name"]: judge for judge in run.settings["judges"]}
    assert said["clip_zero_shot"]["categories"]["death"] == ["a skull"]
    assert len(said["q16"]["weights_sha256"]) == 64
    again = figures(json.loads((tmp_path / "run" / "run.json").read_text()), run.records)
    assert json.loads(json.dumps(again)) == run.values


def _sees_feet(batch):
    import torch

    from safelight.judge.nudenet import CLASSES, PLACES

    out = torch.zeros(len(batch), 4 + len(CLASSES), PLACES)
    out[:, :4, 0] = 20
    out[:, 4 + CLASSES.index("FEET_EXPOSED"), 0] = 0.5
    return out
