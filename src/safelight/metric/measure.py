"""Figures that need a published network and its package, from the stored pictures of a run.

    LPIPS      mean distance of the protected picture to the base picture of the same noise; on
               benign prompts also PP = 1 - LPIPS, "prior preservation". AlexNet, version 0.1.
               Zhang et al., arXiv:1801.03924; package `lpips`.
    clean-fid  Frechet distance on Inception features with correct resizing; to the base pictures
               (how much changed) or to a folder of real ones (quality). The mode changes FID by
               several points, and FID is biased in n: compare equal n and mode only.
               Parmar et al., arXiv:2104.11222; package `clean-fid`.

They are computed afterwards, so that painting needs neither. VQAScore, which needs a network but no
package, has a file of its own.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelight.errors import BadInput, MissingExtra, NotFound
from safelight.flow import Record, Value
from safelight.metric import stats
from safelight.metric.base import BASE, PROTECTED, mean, pairs
from safelight.metric.stored import Stored, row, sets_of, stored_pairs, there
from safelight.metric.vqa_score import vqa_score

if TYPE_CHECKING:
    from torch import Tensor

MODES = ("clean", "legacy_pytorch", "legacy_tensorflow")
SMALLEST = 64  # pixels of a side below which AlexNet has nothing left to look at
BATCH = 16


def lpips(run: Stored, *, net: str = "alex", device: str = "cpu") -> list[dict[str, Any]]:
    """LPIPS to the base pictures, and prior preservation, for every prompt set.

    Args:
        run: With pictures of both arms.
        net: "alex" (the usual one), "vgg" or "squeeze".
        device: Where the network runs.

    Raises:
        MissingExtra: `lpips` is not installed.
        BadInput: Pictures are smaller than 64 pixels or of different sizes.
        NotFound: The run has no pictures of both arms.
    """
    import torch

    if net not in ("alex", "vgg", "squeeze"):
        raise BadInput(f"LPIPS has the networks alex, vgg and squeeze, not {net!r}.")
    package = _package("lpips", "lpips")
    loss = package.LPIPS(net=net, version="0.1", verbose=False).to(device).eval()
    name = f"lpips[{net}-0.1, lpips {_version('lpips')}]"
    rows = []
    for prompts, both in stored_pairs(run).items():
        found: list[tuple[str, float | None]] = []
        with torch.no_grad():
            for start in range(0, len(both), BATCH):
                part = both[start : start + BATCH]
                a, b = (_batch(run, side).to(device) for side in zip(*part, strict=True))
                distances = loss(a * 2 - 1, b * 2 - 1).flatten().tolist()
                keys = [base.prompt_id for base, _ in part]
                if len(distances) != len(keys):
                    raise BadInput(f"lpips gave {len(distances)} distances for {len(keys)} pairs.")
                found += [
                    (key, x if x == x else None) for key, x in zip(keys, distances, strict=True)
                ]
        value = mean(found)
        rows.append(row("lpips", name, prompts, value))
        if not any(base.category for base, _ in both):
            kept = Value(1 - value.value, 1 - value.high, 1 - value.low, value.n, value.skipped)
            rows.append(row("prior_preservation", name, prompts, kept))
    return rows


def clean_fid(
    run: Stored, *, real: Path | None = None, mode: str = "clean", device: str = "cpu"
) -> list[dict[str, Any]]:
    """Frechet distance of Inception features, for every prompt set.

    Args:
        run: With pictures of both arms; of one arm is enough with `real`.
        real: A folder of real pictures; the distance to them, for each arm, is given too.
        mode: "clean", "legacy_pytorch" or "legacy_tensorflow".
        device: Where the network runs.

    Raises:
        MissingExtra: `clean-fid` is not installed.
        BadInput: No such mode.
        NotFound: No pictures.
    """
    if mode not in MODES:
        raise BadInput(f"clean-fid has the modes {', '.join(MODES)}, not {mode!r}.")
    package = _package("cleanfid.fid", "fid")
    name = f"[inception_v3, {mode}, clean-fid {_version('clean-fid')}]"
    network = package.build_feature_extractor(mode, device, use_dataparallel=False)

    def features(folder: Path) -> Any:
        """Of the package; the distance is ours, as its own needs a function scipy has dropped."""
        return package.get_folder_features(
            str(folder), network, num_workers=0, device=device, mode=mode, verbose=False
        )

    rows = []
    truth = features(real) if real else None
    with tempfile.TemporaryDirectory() as room:
        for prompts, arms in _folders(run, Path(room)).items():
            seen = {arm: features(folder) for arm, folder in arms.items()}
            if len(seen) == 2:
                value = _frechet(seen[BASE], seen[PROTECTED])
                rows.append(row("fid_base", f"fid{name}", prompts, value))
            if truth is not None:
                rows += [
                    row("fid_real", f"fid{name}", prompts, _frechet(truth, own), arm)
                    for arm, own in seen.items()
                ]
    if not rows:
        raise NotFound("the run has no stored pictures of both arms; name real ones with real=.")
    return rows


MEASURES: Mapping[str, Callable[..., list[dict[str, Any]]]] = {
    "clean_fid": clean_fid,
    "lpips": lpips,
    "vqa_score": vqa_score,
}


def _package(name: str, extra: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"{error.name} is not installed: pip install 'safelight[{extra}]' "
            "(it brings torchvision, which must fit your torch)."
        ) from None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"


def _batch(run: Stored, records: Sequence[Record]) -> Tensor:
    """Pictures in [0, 1]."""
    import numpy as np
    import torch
    from PIL import Image

    arrays = []
    for record in records:
        assert record.image is not None
        with Image.open(run.folder / record.image) as image:
            arrays.append(np.array(image.convert("RGB")))
    sizes = {array.shape for array in arrays}
    if len(sizes) > 1 or min(arrays[0].shape[:2]) < SMALLEST:
        raise BadInput(
            f"LPIPS needs pictures of one size of at least {SMALLEST} pixels; these have "
            f"{', '.join(f'{w} x {h}' for h, w, _ in sorted(sizes))}."
        )
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def _folders(run: Stored, room: Path) -> dict[str, dict[str, Path]]:
    """A folder of pictures per prompt set and arm; a picture that two prompts share stays two.

    With both arms there, only pairs are taken, so that their n is equal.
    """
    found: dict[str, dict[str, Path]] = {}
    for number, (name, records) in enumerate(sets_of(run).items()):
        some = [record for record in records if there(run, record)]
        both = pairs(some)
        arms = found.setdefault(name, {})
        for i, record in enumerate([r for pair in both for r in pair] if both else some):
            arms[record.arm] = folder = room / f"{number}-{record.arm}"
            folder.mkdir(exist_ok=True)
            assert record.image is not None
            _link(run.folder / record.image, folder / f"{i:06}.png")
    return found


def _link(old: Path, new: Path) -> None:
    try:
        os.link(old, new)
    except OSError:  # another file system
        shutil.copyfile(old, new)


def _frechet(a: Any, b: Any) -> Value:
    """Between two samples of features; n is that of the smaller one."""
    value = stats.frechet_of_samples(a, b)
    return Value(max(value, 0.0) if value == value else nan, nan, nan, min(len(a), len(b)))
