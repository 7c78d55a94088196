"""Your own dataset of (image, label) pairs as a `Source`, so that a proxy applies to it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from nas_kmix.engine.sources import Source, to_rgb


def source_of(dataset: Any) -> Source:
    """The dataset as a Source, without its transforms.

    Reads torchvision's CIFAR classes and ImageFolder, and Subsets of them, directly; others item by item, as PIL images
    or uint8 (H, W, 3) or (H, W) arrays with integer labels.
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
            images, labels = zip(*(dataset[i] for i in range(len(dataset))), strict=True)
        pixels = {"arrays": _stacked(images, type(dataset).__name__)}
    labels = np.asarray(labels, dtype=np.int64)
    names = getattr(dataset, "classes", None) or range(int(labels.max()) + 1)
    return Source(type(dataset).__name__, "train", labels, tuple(map(str, names)), **pixels)


def _is_known(dataset: Any) -> bool:
    """Whether its images, below any Subsets, can be read without going through its items."""
    if type(dataset) is torch.utils.data.Subset:
        return _is_known(dataset.dataset)
    return hasattr(dataset, "samples") or (hasattr(dataset, "data") and hasattr(dataset, "targets"))


def _stacked(images: Iterable[Any], name: str) -> np.ndarray:
    """PIL images or uint8 arrays as RGB (N, H, W, 3); of several sizes, (N,) objects (H, W, 3)."""
    rgb = []
    for image in images:
        pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
        if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
            raise ValueError(
                f"The images of {name} come as {pixels.dtype} {pixels.shape}; give the dataset without its transform, "
                f"as PIL images or uint8 (H, W, 3)."
            )
        rgb.append(to_rgb(pixels[None])[0])
    if len({pixels.shape for pixels in rgb}) == 1:
        return np.stack(rgb)
    several = np.empty(len(rgb), dtype=object)
    for index, pixels in enumerate(rgb):
        several[index] = pixels
    return several
