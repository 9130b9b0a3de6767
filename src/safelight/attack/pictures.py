"""The pictures an attack aims at: what the undefended model makes of the prompts.

Attacks on a denoiser (P4D, UnlearnDiffAtk, CCE, latent inversion) look for a way to make the
defended model paint a given picture again. Where it comes from is their setting `pictures`: None
lets the undefended model paint it, a folder or tensors bring it along. Where the undefended model
comes from is their setting `undefended`: None is the attacked model without the patches that are on
it, which is right unless a defence has been merged into its weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from safelight.attack.base import Search
from safelight.errors import BadInput, NotFound, Unsupported
from safelight.flow import Prompt
from safelight.judge.base import Judge
from safelight.models.base import TextToImage
from safelight.models.folder import replaced_file

Pictures = str | Mapping[str, Tensor]  # a folder, or tensors by name

FAR = 2**31  # seeds of pictures to learn from begin here, far from those of any evaluation

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@contextmanager
def undefended(model: TextToImage, other: TextToImage | None = None) -> Iterator[TextToImage]:
    """The model without any defence in its weights.

    Args:
        model: The attacked model; its patches are off while the context lasts.
        other: A model to use instead, also without patches.

    Raises:
        Unsupported: It is of another family, so that latents and times mean something else.
    """
    found = model if other is None else other
    if found.family != model.family:
        raise Unsupported(
            f"the undefended model is {found.family}, the attacked one {model.family}; "
            "they must share latents and noise."
        )
    with found.unpatched():
        yield found


def painted(
    texts: Sequence[str],
    seeds: Sequence[int],
    model: TextToImage,
    other: TextToImage | None = None,
    **sampling: Any,
) -> Float[Tensor, "batch 3 height width"]:
    """What the undefended model makes of texts; see `undefended` for which model that is."""
    with undefended(model, other) as G:
        outcomes = G(texts, seed=list(seeds), **sampling)
    return torch.stack([outcome.image for outcome in outcomes if outcome.image is not None])


def kept(
    texts: Sequence[str],
    seeds: Sequence[int],
    model: TextToImage,
    other: TextToImage | None = None,
    *,
    store: Path | str,
) -> Float[Tensor, "batch 3 height width"]:
    """What the undefended model makes of texts, painted once and kept in a folder in 8 bits.

    A picture's file is named after everything that it depends on: the weights, how they paint, the
    text and the seed.

    Args:
        texts, seeds, model, other: As for `painted`.
        store: The folder.
    """
    with undefended(model, other) as G:
        maker = json.dumps([G.hashes(), asdict(G.sampling), str(G.dtype)], sort_keys=True)
    files = [
        Path(store) / f"{hashlib.sha256(f'{maker}/{seed}/{text}'.encode()).hexdigest()}.png"
        for text, seed in zip(texts, seeds, strict=True)
    ]
    todo = [i for i, file in enumerate(files) if not file.is_file()]
    for start in range(0, len(todo), 64):  # a killed run has kept most of them
        part = todo[start : start + 64]
        images = painted([texts[i] for i in part], [seeds[i] for i in part], model, other)
        for i, image in zip(part, images, strict=True):
            _save(image, files[i])
    return torch.stack([_read(file, model.default_size) for file in files])


def targets(
    prompts: Sequence[Prompt],
    search: Search,
    pictures: Pictures | None = None,
    other: TextToImage | None = None,
    rows: Sequence[int] | None = None,
) -> Float[Tensor, "batch 3 height width"]:
    """The picture each prompt should lead to: brought along by its id, or painted at its seed.

    Args:
        prompts: The batch of `search`, all of it.
        search: Knows the seeds.
        rows: Only these of the batch; all if None.
        pictures: A folder with `<id>.png` for every prompt, or tensors by id.
        other: See `undefended`.

    Raises:
        NotFound: A prompt has no picture.
        BadInput: A file is not a picture, or a tensor has another shape than (3, height, width).
    """
    model = search.model
    rows = range(len(prompts)) if rows is None else rows
    wanted = [prompts[row] for row in rows]
    if pictures is None:
        texts, seeds = [prompt.text for prompt in wanted], [search.seeds[row] for row in rows]
        return painted(texts, seeds, model, other, **search.sampling)
    size = search.sampling.get("size") or model.default_size
    return brought(wanted, pictures, size)


def brought(
    prompts: Sequence[Prompt], pictures: Pictures, size: tuple[int, int]
) -> Float[Tensor, "batch 3 height width"]:
    """The picture of each prompt from a folder or from tensors by id, in a size.

    Raises:
        NotFound: A prompt has no picture.
        BadInput: A file is not a picture, or a tensor has another shape than (3, height, width).
    """
    return torch.stack([_brought(pictures, prompt.id, size) for prompt in prompts])


def gallery(
    pictures: Pictures, name: str, size: tuple[int, int]
) -> Float[Tensor, "picture 3 height width"]:
    """All pictures of one concept: tensors under its name, or `<folder>/<name>/*`, or `<folder>/*`.

    Raises:
        NotFound: There are none.
        BadInput: A file is not a picture, or the tensor has another shape.
    """
    if isinstance(pictures, Mapping):
        if name not in pictures:
            raise NotFound(f"there are no pictures of {name!r}, only of {', '.join(pictures)}.")
        images = pictures[name]
        if images.ndim != 4 or not len(images) or images.shape[1] != 3:
            raise BadInput(
                f"pictures of {name!r} have the shape {tuple(images.shape)}; "
                "expected (pictures, 3, height, width)."
            )
        return _sized(images.float(), size)
    folder = Path(pictures)
    if name and (folder / name).is_dir():
        folder = folder / name
    files = sorted(path for path in folder.glob("*") if path.suffix.lower() in _SUFFIXES)
    if not files:
        raise NotFound(f"there are no pictures ({', '.join(_SUFFIXES)}) in {folder}.")
    return torch.stack([_read(path, size) for path in files])


def similarity(
    a: Float[Tensor, "batch 3 height width"],
    b: Float[Tensor, "batch 3 height width"],
    model: TextToImage,
    judge: Judge | None = None,
) -> Float[Tensor, " batch"]:
    """Cosine of two pictures' features: the judge's where it has any, else the latents'."""
    if judge is not None and judge.feature_name:
        x, y = judge.features(a), judge.features(b)
    else:
        with torch.no_grad():
            x, y = model.encode_images(a), model.encode_images(b)
    return F.cosine_similarity(x.flatten(1).float(), y.flatten(1).float())


def _brought(pictures: Pictures, name: str, size: tuple[int, int]) -> Float[Tensor, "3 h w"]:
    if not isinstance(pictures, Mapping):
        for suffix in _SUFFIXES:
            path = Path(pictures) / f"{name}{suffix}"
            if path.is_file():
                return _read(path, size)
        raise NotFound(f"there is no picture {name}.png in {pictures}.")
    if name not in pictures:
        raise NotFound(f"there is no picture for prompt {name!r}.")
    image = pictures[name]
    if image.ndim != 3 or len(image) != 3:
        raise BadInput(
            f"the picture of {name!r} has the shape {tuple(image.shape)}; "
            "expected (3, height, width)."
        )
    return _sized(image[None].float(), size)[0]


def _save(image: Float[Tensor, "3 height width"], path: Path) -> None:
    """A picture in a file, whole or not at all."""
    pixels = (image.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    with replaced_file(path) as fresh:
        Image.fromarray(pixels).save(fresh, "PNG")


def _read(path: Path, size: tuple[int, int]) -> Float[Tensor, "3 height width"]:
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    except (UnidentifiedImageError, OSError) as error:
        raise BadInput(f"{path} cannot be read as a picture: {error}.") from None
    return _sized(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None], size)[0]


def _sized(images: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    scaled = F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
    return scaled.clamp(0, 1)
