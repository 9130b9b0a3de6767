"""LPIPS and clean-fid are asked for the right pictures, in the right form and setting."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from made import record
from PIL import Image

from safelight.errors import BadInput, MissingExtra, NotFound
from safelight.metric import measure


@dataclass
class Folder:
    """A run with pictures on disk."""

    folder: Path
    records: list


@pytest.fixture
def run(tmp_path):
    """Two prompt sets of four prompts; the protected pictures are lighter by 0.2."""
    (tmp_path / "images").mkdir()
    records = []
    for prompts, category in (("unsafe", "weapons"), ("safe", "")):
        for i in range(4):
            for arm, shade in (("base", 100), ("protected", 151)):
                name = f"images/{prompts}-{i}-{arm}.png"
                Image.new("RGB", (64, 64), (shade,) * 3).save(tmp_path / name)
                records.append(record(arm, f"{prompts}{i}", "", category=category, image=name))
                records[-1] = type(records[-1])(**{**records[-1].__dict__, "prompts": prompts})
    records.append(record("protected", "refused", "refused", category="weapons"))
    return Folder(tmp_path, records)


@pytest.fixture
def lpips(monkeypatch):
    """A package like lpips whose distance is the mean difference, and what it was asked."""
    module, asked = ModuleType("lpips"), []

    class LPIPS(torch.nn.Module):
        def __init__(self, **settings):
            super().__init__()
            asked.append(settings)

        def forward(self, a, b):
            assert a.shape[1:] == (3, 64, 64) and a.min() >= -1 and a.max() <= 1
            return (a - b).abs().mean((1, 2, 3), keepdim=True)

    module.LPIPS = LPIPS
    monkeypatch.setitem(sys.modules, "lpips", module)
    return SimpleNamespace(asked=asked, module=module)


def test_lpips_is_the_mean_distance_of_pairs_on_pictures_between_minus_one_and_one(run, lpips):
    rows = measure.lpips(run)
    assert lpips.asked == [{"net": "alex", "version": "0.1", "verbose": False}]
    by_name = {(row["metric"], row["prompts"]): row for row in rows}
    distance = by_name["lpips", "unsafe"]
    assert distance["value"] == pytest.approx(2 * 51 / 255) and distance["n"] == 4
    assert "alex" in distance["network"]
    kept = by_name["prior_preservation", "safe"]
    assert kept["value"] == pytest.approx(1 - 2 * 51 / 255)
    assert ("prior_preservation", "unsafe") not in by_name


def test_a_distance_that_is_not_a_number_is_skipped_and_counted(run, lpips):
    lpips.module.LPIPS.forward = lambda self, a, b: torch.tensor([0.5, math.nan, 0.5, 0.5])
    row = measure.lpips(run)[0]
    assert (row["value"], row["n"], row["skipped"]) == (0.5, 3, 1)
    lpips.module.LPIPS.forward = lambda self, a, b: torch.tensor([0.5])
    with pytest.raises(BadInput, match="1 distances for 4 pairs"):
        measure.lpips(run)


def test_pictures_that_are_too_small_or_of_two_sizes_are_refused(run, lpips):
    Image.new("RGB", (32, 32)).save(run.folder / run.records[0].image)
    with pytest.raises(BadInput, match="at least 64"):
        measure.lpips(run)


def test_without_their_packages_both_say_what_to_install(run, monkeypatch):
    for name in ("lpips", "cleanfid", "cleanfid.fid"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match=r"safelight\[lpips\]"):
        measure.lpips(run)
    with pytest.raises(MissingExtra, match=r"safelight\[fid\]"):
        measure.clean_fid(run)


@pytest.fixture
def cleanfid(monkeypatch):
    """A package like clean-fid whose features are a picture's shade and its number."""
    asked = []

    def build(mode, device, use_dataparallel):
        asked.append((mode, device))
        return "network"

    def features(folder, network, *, num_workers, device, mode, verbose):
        assert network == "network" and num_workers == 0 and not verbose
        files = sorted(Path(folder).iterdir())
        asked.append(len(files))
        shades = [np.asarray(Image.open(file)).mean() for file in files]
        return np.stack([shades, np.arange(len(files))], 1)

    package, module = ModuleType("cleanfid"), ModuleType("cleanfid.fid")
    module.build_feature_extractor, module.get_folder_features = build, features
    package.fid = module
    monkeypatch.setitem(sys.modules, "cleanfid", package)
    monkeypatch.setitem(sys.modules, "cleanfid.fid", module)
    return asked


def test_fid_compares_equal_numbers_of_pictures_of_the_two_arms(run, cleanfid):
    rows = measure.clean_fid(run)
    assert [(r["metric"], r["prompts"], r["n"]) for r in rows] == [
        ("fid_base", "safe", 4),
        ("fid_base", "unsafe", 4),
    ]
    assert all(r["value"] == pytest.approx(51**2) for r in rows)
    assert all("clean" in r["network"] and "inception" in r["network"] for r in rows)
    assert cleanfid == [("clean", "cpu"), 4, 4, 4, 4]
    missing = Folder(run.folder, [r for r in run.records if r.prompt_id != "safe0"][:-2])
    (run.folder / run.records[0].image).unlink()
    assert [r["n"] for r in measure.clean_fid(missing)] == [2, 3]


def test_fid_to_real_pictures_is_another_row(run, cleanfid, tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    for i in range(4):
        Image.new("RGB", (64, 64), (200,) * 3).save(real / f"{i}.png")
    rows = measure.clean_fid(run, real=real, mode="legacy_pytorch")
    found = {(r["metric"], r["arm"]): r["value"] for r in rows if r["prompts"] == "safe"}
    assert found == {
        ("fid_base", "protected"): pytest.approx(51**2),
        ("fid_real", "base"): pytest.approx(100**2),
        ("fid_real", "protected"): pytest.approx(49**2),
    }
    assert cleanfid[0] == ("legacy_pytorch", "cpu")
    with pytest.raises(BadInput, match="legacy_tensorflow"):
        measure.clean_fid(run, mode="best")


def test_a_run_without_stored_pictures_says_so(run, lpips, cleanfid):
    empty = Folder(run.folder / "nowhere", run.records)
    for figure in (measure.lpips, measure.clean_fid):
        with pytest.raises(NotFound, match="no stored pictures"):
            figure(empty)
