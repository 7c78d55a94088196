"""Your own dataset of (image, label) pairs as a `Source`, so that a proxy applies to it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from nas_kmix.engine.labels import class_indices
from nas_kmix.engine.pixels import rgb_of, to_rgb
from nas_kmix.engine.sources import Source


def source_of(dataset: Any) -> Source:
    """The dataset as a Source, without its transforms.

    Knows torchvision's CIFAR classes and ImageFolder, and Subsets of them; of others, the items are read: PIL images
    or uint8 (H, W, 3), (3, H, W) or (H, W) arrays, with labels as in `labels`.
    """
    if type(dataset) is torch.utils.data.Subset and _is_known(dataset.dataset):
        return source_of(dataset.dataset).part(np.asarray(dataset.indices, dtype=np.int64))
    if hasattr(dataset, "samples"):
        paths, labels = zip(*dataset.samples, strict=True)
        pixels: dict[str, Any] = {"folder": Path(), "paths": tuple(map(str, paths))}
    else:
        if hasattr(dataset, "data") and hasattr(dataset, "targets"):
            images, labels = dataset.data, dataset.targets
        else:
            images, labels = zip(*(_pair(dataset, i) for i in range(len(dataset))), strict=True)
        pixels = {"arrays": _stacked(images, type(dataset).__name__)}
    try:
        labels = class_indices(labels).cpu().numpy()
    except ValueError as error:
        raise ValueError(f"{type(dataset).__name__}: {error}") from error
    names = getattr(dataset, "classes", None) or range(int(labels.max()) + 1)
    return Source(type(dataset).__name__, "train", labels, tuple(map(str, names)), **pixels)


def _pair(dataset: Any, index: int) -> tuple[Any, Any]:
    item = dataset[index]
    if not isinstance(item, tuple | list) or len(item) != 2:
        name, keys = type(dataset).__name__, f" of {', '.join(map(str, item))}" if isinstance(item, dict) else ""
        raise ValueError(
            f"The items of {name} must be pairs of an image and a label, not {type(item).__name__}{keys}; wrap it in a "
            "data set that gives such pairs."
        )
    return item[0], item[1]


def _is_known(dataset: Any) -> bool:
    """Whether its images, below any Subsets, can be read without going through its items."""
    if type(dataset) is torch.utils.data.Subset:
        return _is_known(dataset.dataset)
    return hasattr(dataset, "samples") or (hasattr(dataset, "data") and hasattr(dataset, "targets"))


def _stacked(images: Iterable[Any], name: str) -> np.ndarray:
    """PIL images or uint8 arrays as RGB (N, H, W, 3); of several sizes, (N,) objects (H, W, 3)."""
    rgb = []
    for image in images:
        pixels = rgb_of(image) if isinstance(image, Image.Image) else np.asarray(image)
        channels_first = pixels.ndim == 3 and pixels.shape[0] in (1, 3)
        if channels_first and (isinstance(image, torch.Tensor) or pixels.shape[2] not in (1, 3)):
            pixels = pixels.transpose(1, 2, 0)  # (C, H, W), as tensors are
        if (
            pixels.dtype != np.uint8
            or pixels.ndim not in (2, 3)
            or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3))
        ):
            raise ValueError(
                f"The images of {name} come as {pixels.dtype} {pixels.shape}; give the data set without its transform, "
                f"as PIL images, uint8 (H, W, 3) or uint8 (3, H, W)."
            )
        rgb.append(to_rgb(pixels[None])[0])
    if len({pixels.shape for pixels in rgb}) == 1:
        return np.stack(rgb)
    several = np.empty(len(rgb), dtype=object)
    for index, pixels in enumerate(rgb):
        several[index] = pixels
    return several
