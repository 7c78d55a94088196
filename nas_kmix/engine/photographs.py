"""Training crops of whole photographs: cut from a file before it is decoded, then resized.

A crop at least 2, 4 or 8 times as large as needed is decoded at that fraction of the size, which the JPEG format
allows at a fraction of the time. Its pixels then differ slightly from those of a whole decoding that is resized, as in
`torchvision.transforms.RandomResizedCrop`; evaluation never does this. What happens to the colours is up to `augment`.

Every image has its own draws in every epoch, so that crops depend neither on the number of workers nor on how a
batch is divided among processes.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CROPS = 4  # random stream, beside those of `feed`
SCALE = (0.08, 1.0)  # share of the photograph's area
RATIO = (3 / 4, 4 / 3)  # width over height
REDUCTIONS = (8, 4, 2)  # what JPEG decoders divide sizes by


@dataclass(frozen=True)
class PhotoCrops:
    """torchvision's RandomResizedCrop: 8 to 100 % of a photograph, as squares of `size` pixels a side."""

    size: int
    seed: int

    def draw(self, index: int, epoch: int) -> list[list[float]]:
        """Uniform draws for the area, ratio and place of ten crops, a function of (seed, epoch, index)."""
        return np.random.default_rng([self.seed, CROPS, epoch, index]).random((10, 4)).tolist()

    def cut(self, image: Image.Image, draws: list[list[float]]) -> Image.Image:
        """Decode that crop of an opened file, never smaller than `size` unless the file is."""
        left, top, width, height = choose_crop(*image.size, draws)
        box = (left, top, left + width, top + height)
        for by in REDUCTIONS:
            if min(width, height) >= by * self.size and image.draft(None, (image.width // by, image.height // by)):
                box = tuple(round(edge / by) for edge in box)
                break
        return image.crop(box)

    def resize(self, pixels: np.ndarray) -> Tensor:
        """uint8 (H, W, 3) to uint8 (3, size, size), channels last in memory."""
        from torchvision.transforms.v2 import functional as TF  # late, as in `decoding`

        with warnings.catch_warnings():  # torch warns of arrays that are read-only, as Pillow's are
            warnings.simplefilter("ignore")
            image = torch.from_numpy(pixels).permute(2, 0, 1)
        return TF.resize_image(image, [self.size, self.size], antialias=True)


def choose_crop(width: int, height: int, draws: list[list[float]]) -> tuple[int, int, int, int]:
    """Left, top, width and height in pixels of the first drawn crop that fits into a photograph of that size.

    The area is uniform and the ratio log-uniform. Where none fits, it is the largest crop in the centre whose ratio is
    allowed.
    """
    smallest, widest = (math.log(ratio) for ratio in RATIO)
    for area, ratio, x, y in draws:
        pixels = width * height * (SCALE[0] + area * (SCALE[1] - SCALE[0]))
        root = math.exp((smallest + ratio * (widest - smallest)) / 2)
        w, h = round(math.sqrt(pixels) * root), round(math.sqrt(pixels) / root)
        if 0 < w <= width and 0 < h <= height:
            return int(x * (width - w + 1)), int(y * (height - h + 1)), w, h
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    return (width - w) // 2, (height - h) // 2, w, h
