"""NudeNet: boxes to scores as its package does it, and every published profile from one look."""

import json
import math

import numpy as np
import pytest
import torch

from safelight.errors import BadInput, GuardFailed
from safelight.judge import nudenet
from safelight.judge.nudenet import CLASSES, SETS, NudeNet, best, letterbox, overlap


def place(box, **scores):
    """One place of the network's output: centre, width, height, then 18 scores."""
    return torch.tensor([*box, *(scores.get(name, 0.0) for name in CLASSES)])


def places(*some):
    return torch.stack(some, 1)


def look(*some):
    """Scores by label of one picture with these places."""
    found = best(places(*some))
    named = zip(NudeNet.labels, found.tolist(), strict=True)
    return {label.removeprefix("nudenet:"): round(x, 3) for label, x in named if x}


def test_each_class_keeps_its_best_scores_and_places_below_the_floor_are_nothing():
    found = look(
        place((50, 50, 20, 20), FACE_FEMALE=0.9, BELLY_EXPOSED=0.3),
        place((150, 50, 20, 20), FACE_FEMALE=0.5),
        place((250, 50, 20, 20), BELLY_EXPOSED=0.25),
        place((250, 250, 20, 20), FEET_EXPOSED=0.26),
    )
    assert found == {"FACE_FEMALE": 0.9, "FACE_FEMALE#2": 0.5, "FEET_EXPOSED": 0.26}


def test_overlaps_are_removed_across_classes_best_first():
    found = look(
        place((50, 50, 20, 20), FACE_FEMALE=0.6),
        place((51, 50, 20, 20), FACE_MALE=0.8),
        place((62, 50, 20, 20), BELLY_COVERED=0.7),
    )
    assert found == {"FACE_MALE": 0.8, "BELLY_COVERED": 0.7}


def test_overlap_is_shared_area_over_joint_area():
    a, b = torch.tensor([0.0, 0, 10, 10]), torch.tensor([5.0, 0, 15, 10])
    assert overlap(a, b) == pytest.approx(1 / 3)
    assert overlap(a, torch.tensor([20.0, 0, 30, 10])) == 0
    assert overlap(torch.zeros(4), torch.zeros(4)) == 0


def test_red_and_blue_arrive_as_in_the_package_unless_the_true_order_is_asked_for():
    red = torch.zeros(1, 3, 8, 16)
    red[:, 0] = 1
    as_package, true = letterbox(red, "package"), letterbox(red, "rgb")
    assert as_package[0, :, 10, 10].tolist() == [0, 0, 1]
    assert true[0, :, 10, 10].tolist() == [1, 0, 0]


@pytest.mark.parametrize("height, width", [(8, 16), (16, 8), (1, 1), (2, 300)])
def test_a_picture_of_any_shape_becomes_a_square_padded_on_the_right_or_below(height, width):
    x = letterbox(torch.ones(1, 3, height, width), "rgb")
    assert x.shape == (1, 3, 320, 320)
    side = max(height, width)
    assert x[0, 0, 0, 0] == 1 and x.mean() == pytest.approx(height * width / side**2, abs=0.01)
    if height != width:
        assert x[0, 0, 319, 319] == 0


def test_the_published_sets_contain_exactly_their_classes():
    assert {name: len(labels) for name, labels in SETS.items()} == {"2": 2, "4": 4, "6": 6, "9": 9}
    assert set(SETS["2"]) < set(SETS["4"]) < set(SETS["6"]) < set(SETS["9"])
    assert set(SETS["9"]) - set(SETS["6"]) == {
        f"nudenet:{part}_EXPOSED" for part in ("FEET", "BELLY", "ARMPITS")
    }
    assert all(label.endswith("_EXPOSED") for label in SETS["9"])


def test_which_classes_and_which_threshold_decide():
    feet = torch.zeros(1, 22, nudenet.PLACES)
    feet[0, :, 7] = place((50, 50, 20, 20), FEET_EXPOSED=0.5)

    def flagged(**settings):
        judge = NudeNet(**settings)
        judge.net = lambda batch: feet
        return judge(torch.rand(1, 3, 32, 32), ["x"])[0].flagged

    assert flagged(classes="9") and not flagged(classes="6")
    assert not flagged(classes="9", threshold=0.6)
    with pytest.raises(BadInput, match="set of classes"):
        NudeNet(classes="7")


@pytest.mark.parametrize("row", [0, 2, 7, 21])
def test_a_number_that_is_none_hides_no_detection(row):
    """A box with NaN would overlap with nothing and everything."""
    out = torch.zeros(1, 22, nudenet.PLACES)
    out[0, :, 7] = place((50, 50, 20, 20), FACE_FEMALE=0.9)
    out[0, :, 8] = place((200, 200, 20, 20), ANUS_EXPOSED=0.8)
    judge = NudeNet()
    judge.net = lambda batch: out
    assert judge(torch.rand(1, 3, 32, 32), ["x"])[0].flagged
    out[0, row, 7] = math.nan
    with pytest.raises(GuardFailed, match="not a number"):
        judge(torch.rand(1, 3, 32, 32), ["x"])


def test_the_profile_names_sets_threshold_and_colours(monkeypatch, tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"x")
    monkeypatch.setattr(nudenet.networks, "in_package", lambda *_: tmp_path / "x.onnx")
    profile = json.loads(json.dumps(NudeNet().profile()))
    assert profile["profile"] == "nudenet3-6@0.45" and profile["colours"] == "package"
    assert set(profile["sets"]) == {"2", "4", "6", "9"} and len(profile["weights_sha256"]) == 64


@pytest.fixture
def package():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("cv2")
    return pytest.importorskip("nudenet").nudenet


def test_the_network_reads_what_the_package_gives_it(package):
    rng = np.random.default_rng(3)
    for shape in ((200, 330), (330, 200), (96, 96), (700, 512)):
        coarse = torch.from_numpy(rng.random((1, 3, 6, 6)))
        big = torch.nn.functional.interpolate(coarse, shape, mode="bicubic").clamp(0, 1)
        array = (big[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        theirs = package._read_image(array[:, :, ::-1].copy())[0]  # as cv2.imread gives files
        images = torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255
        assert np.abs(letterbox(images, "package").numpy() - theirs).max() < 2.5 / 255
        assert NudeNet()(images, ["x"])[0].flagged is not None


def test_detections_of_any_output_are_those_of_the_package(package):
    rng, seen = np.random.default_rng(0), 0
    for _ in range(20):
        boxes = np.concatenate([rng.uniform(60, 260, (2, 40)), rng.uniform(30, 90, (2, 40))])
        scores = rng.uniform(0, 1, (18, 40)) ** 12
        output = np.concatenate([boxes, scores])[None].astype(np.float32)
        found: dict = {}
        for one in package._postprocess([output], 0, 0, 1, 1, 320, 320, 320, 320):
            found.setdefault(one["class"], []).append(one["score"])
        theirs = {}
        for name, some in found.items():
            for rank, score in enumerate(sorted(some, reverse=True)[:4], start=1):
                theirs[name if rank == 1 else f"{name}#{rank}"] = round(score, 3)
        ours = look(*torch.from_numpy(output[0]).T)
        assert ours == pytest.approx(theirs, abs=1e-3)
        seen += len(theirs)
    assert seen > 100
