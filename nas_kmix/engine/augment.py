"""Augmentation of training images: uint8 (N, 3, H, W) in, normalised float32 of the same shape out.

One gather crops a whole batch, or one grid resamples it, without workers. All draws come from the NumPy generator that
the caller seeds with (seed, epoch, step), so a resumed run sees exactly the same images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Augmentation:
    """Random augmentation of training images: crops and flips first, then colours, lighting and Cutout."""

    flip: bool = True
    """Mirror training images at random; off by default for digits, letters and SVHN, as far as --data names them."""
    crop_padding: int = 4
    """Padding in pixels before a random crop, for images up to 64 px; larger ones use RandomResizedCrop."""
    color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Strength of brightness, contrast, saturation and hue jitter, as in torchvision's ColorJitter."""
    lighting: float = 0.0
    """Standard deviation of AlexNet's PCA lighting; 0.1 is usual on ImageNet."""
    cutout: int = 0
    """Side in pixels of Cutout's square (DeVries & Taylor 2017); 0 turns Cutout off."""

    def __post_init__(self):
        for name in ("crop_padding", "lighting", "cutout"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name.replace('_', '-')} must be 0 or more, not {getattr(self, name)}.")
        if not all(0.0 <= value < math.inf for value in self.color_jitter) or self.color_jitter[3] > 0.5:
            raise ValueError(
                f"--color-jitter takes four numbers of at least 0, hue at most 0.5, not {self.color_jitter}."
            )

    @property
    def revision(self) -> dict[str, str]:
        """For keys: jitter was once drawn and rounded image by image."""
        return {"jitter": "batched"} if any(self.color_jitter) else {}


class Prepared(Protocol):
    """What is known of the images' dataset: the stem of its networks, and its normalisation."""

    stem: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


def augment_batch(
    images: Tensor, data: Prepared, config: Augmentation, *, rng: np.random.Generator, cropped: bool = False
) -> Tensor:
    """The training transform for images of `data`, which `photographs` may have `cropped`.

    Where it has not, RandomResizedCrop acts on the centre square of a photograph, not on the whole.
    """
    if not cropped:
        small = data.stem == "cifar"
        images = random_crop(images, config.crop_padding, rng=rng) if small else random_resized_crop(images, rng=rng)
    if config.flip:
        images = random_flip(images, rng=rng)
    if any(config.color_jitter):
        images = color_jitter(images, config.color_jitter, rng=rng)
    images = normalise(images, data.mean, data.std)
    if config.lighting:
        images = lighting(images, config.lighting, data.std, rng=rng)
    return cutout(images, config.cutout, rng=rng) if config.cutout else images


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], out: Tensor | None = None) -> Tensor:
    """Pixels (N, 3, H, W) in [0, 255] to float32 with `(x / 255 - mean) / std`, written into `out` if given."""
    mean_, std_ = (torch.tensor(c, device=images.device).view(1, -1, 1, 1) for c in (mean, std))
    result = images.to(torch.float32, copy=True) if out is None else out.copy_(images)
    return result.mul_(1.0 / (255.0 * std_)).sub_(mean_ / std_)


def sampled(data: Any, sample: int) -> Iterator[Any]:
    """Batches of at most `sample` evenly spaced images of `data`, an `ImageData`.

    Raises ValueError, after them, if too many of them cannot be read, or all.
    """
    indices, count = data.good(), 0
    indices = indices[:: math.ceil(len(indices) / sample)]
    for batch in data.batches(np.array_split(indices, math.ceil(len(indices) / 256))):
        count += len(batch.indices)
        yield batch
    if not data.resident:
        data.bad.check(len(indices))
    if count == 0:
        raise ValueError(f"{data.source.name}: no image can be read; repair the files. The first is {data.bad.first()}")


def measure_constants(data: Any, sample: int = 20_000) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel in [0, 1] over the images of `data`, at most `sample` evenly spaced ones.

    `data` is an `ImageData`. Raises ValueError as `sampled` does.
    """
    total, squares, count = np.zeros(3), np.zeros(3), 0
    for batch in sampled(data, sample):
        pixels = batch.images.cpu().to(torch.float64) / 255.0
        total += pixels.sum(dim=(0, 2, 3)).numpy()
        squares += pixels.square().sum(dim=(0, 2, 3)).numpy()
        count += pixels.numel() // 3
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
    # A constant channel carries no information; dividing by its zero deviation would fill it with NaN.
    return tuple(mean.tolist()), tuple(np.where(std > 1e-6, std, 1.0).tolist())


def random_crop(images: Tensor, padding: int, *, rng: np.random.Generator) -> Tensor:
    """Pad with black by `padding` pixels on each side and crop a window of the original size at a uniform offset."""
    n, _, h, w = images.shape
    offsets = torch.as_tensor(rng.integers(0, 2 * padding + 1, size=(2, n, 1)), device=images.device)
    rows = offsets[0] + torch.arange(h, device=images.device)  # (N, H)
    columns = offsets[1] + torch.arange(w, device=images.device)  # (N, W)
    padded = F.pad(images, (padding,) * 4).permute(0, 2, 3, 1)  # (N, H + 2p, W + 2p, 3)
    index = torch.arange(n, device=images.device)[:, None, None]
    return padded[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def random_flip(images: Tensor, *, rng: np.random.Generator) -> Tensor:
    """Mirror each image left to right with probability one half."""
    flip = torch.as_tensor(rng.random(len(images)) < 0.5, device=images.device)
    return torch.where(flip[:, None, None, None], images.flip(3), images)


def random_resized_crop(
    images: Tensor,
    *,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """Crop a window of `scale` times the area and a log-uniform aspect `ratio`, and resize it to the original size.

    The window is real-valued and sampled bilinearly (it is never larger than the image, so nothing aliases). As in
    torchvision, up to ten windows are drawn until one fits; if none does, the whole image is taken.
    """
    n = len(images)
    area = rng.uniform(*scale, size=(n, 10))
    aspect = np.exp(rng.uniform(np.log(ratio[0]), np.log(ratio[1]), size=(n, 10)))
    sides = np.stack([np.sqrt(area / aspect), np.sqrt(area * aspect)], axis=2)  # (N, 10, 2), shares of H and W
    fits = (sides <= 1.0).all(axis=2)
    side = np.where(fits.any(axis=1)[:, None], sides[np.arange(n), fits.argmax(axis=1)], 1.0)  # (N, 2)
    centre = (1.0 - side) * rng.uniform(-1.0, 1.0, size=(n, 2))  # in grid coordinates, where the image is [-1, 1]
    theta = np.zeros((n, 2, 3), dtype=np.float32)
    theta[:, 0, 0], theta[:, 0, 2] = side[:, 1], centre[:, 1]
    theta[:, 1, 1], theta[:, 1, 2] = side[:, 0], centre[:, 0]
    grid = F.affine_grid(torch.as_tensor(theta, device=images.device), list(images.shape), align_corners=False)
    sampled = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return sampled.round_().to(torch.uint8)


def color_jitter(images: Tensor, strengths: tuple[float, float, float, float], *, rng: np.random.Generator) -> Tensor:
    """torchvision's ColorJitter: brightness, contrast, saturation and hue of each image, in an order of its own.

    uint8 (N, 3, H, W) in, float32 in [0, 255] out, which is rounded nowhere. The first three factors are uniform in
    [max(0, 1 - strength), 1 + strength], the hue moves by at most its strength (in turns, up to 0.5). All factors are
    drawn, even if a strength of zero leaves them unused.
    """
    n = len(images)
    low, high = np.maximum(0.0, 1.0 - np.array(strengths)), 1.0 + np.array(strengths)
    low[3], high[3] = -strengths[3], strengths[3]
    factors = rng.uniform(low, high, size=(n, 4)).astype(np.float32)
    turns = rng.permuted(np.tile(np.arange(4), (n, 1)), axis=1).T  # (4, N): which change is an image's first, second, …
    rows = torch.as_tensor(turns.argsort(axis=1, kind="stable"), device=images.device)  # images of one change together
    factors = torch.as_tensor(factors, device=images.device)
    images = images.to(torch.float32, copy=True)
    for turn, order in zip(turns, rows, strict=True):
        parts = order.split(np.bincount(turn, minlength=4).tolist())
        for i, (change, part) in enumerate(zip(COLOR_CHANGES, parts, strict=True)):
            if strengths[i] > 0.0 and len(part):
                images[part] = change(images[part], factors[part, i].view(-1, 1, 1, 1))
    return images


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * factor).clamp_(0.0, 255.0)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(_grey(images).mean(dim=(2, 3), keepdim=True), images, factor).clamp_(0.0, 255.0)


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(_grey(images), images, factor).clamp_(0.0, 255.0)


def _grey(images: Tensor) -> Tensor:
    """(N, 1, H, W), with the weights of ITU-R BT.601 as torchvision rounds them."""
    red, green, blue = images.split(1, dim=1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def _hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of HSV's colour wheel.

    A colour of value v and chroma c has the channels v - c * min(max(min(k, 4 - k), 0), 1), where k is its hue in
    sixths of a turn plus 5, 3 and 1, modulo 6.
    """
    red, green, blue = images.split(1, dim=1)
    value = images.amax(dim=1, keepdim=True)
    chroma = value - images.amin(dim=1, keepdim=True)
    scale = chroma.clamp(min=1e-6).reciprocal_()  # without chroma any hue will do
    hue = torch.where(
        value == red,
        (green - blue) * scale,
        torch.where(value == green, (blue - red) * scale + 2.0, (red - green) * scale + 4.0),
    )
    offsets = torch.tensor([5.0, 3.0, 1.0], device=images.device).view(1, 3, 1, 1)
    k = (hue + 6.0 * turns + offsets).remainder_(6.0)
    return value - chroma * torch.minimum(k, 4.0 - k).clamp_(0.0, 1.0)


COLOR_CHANGES = (_brightness, _contrast, _saturation, _hue)


# Directions in which the colours of ImageNet's pixels vary, in [0, 1], and how much (Krizhevsky et al., NeurIPS 2012).
COLOR_DIRECTIONS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
COLOR_VARIANCES = (0.2175, 0.0188, 0.0045)


def lighting(images: Tensor, strength: float, std: tuple[float, ...], *, rng: np.random.Generator) -> Tensor:
    """Shift the colour of each image along the directions in which colours vary, by normal draws times `strength`.

    For images (N, 3, H, W) normalised by `std`; AlexNet's "PCA lighting".
    """
    draws = rng.normal(scale=strength, size=(len(images), 3)) * np.array(COLOR_VARIANCES)
    shift = draws @ np.array(COLOR_DIRECTIONS).T / np.array(std)  # (N, 3)
    return images + torch.as_tensor(shift, dtype=images.dtype, device=images.device)[:, :, None, None]


def cutout(images: Tensor, length: int, *, rng: np.random.Generator) -> Tensor:
    """Blank a square of side `length` (pixels) around a uniform pixel of each image, clipped at the border.

    For normalised images: zero is their mean (DeVries & Taylor 2017).
    """
    n, _, h, w = images.shape
    corner = rng.integers(0, (h, w), size=(n, 2)) - length // 2
    rows = np.arange(h) - corner[:, :1]  # (N, H), counted from the square's first row
    columns = np.arange(w) - corner[:, 1:]  # (N, W)
    inside = ((rows >= 0) & (rows < length))[:, :, None] & ((columns >= 0) & (columns < length))[:, None, :]
    # A clone keeps the memory format, which masked_fill out of place does not.
    return images.clone().masked_fill_(torch.as_tensor(inside, device=images.device)[:, None], 0)
