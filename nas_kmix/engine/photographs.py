"""Training crops of whole photographs: torchvision's v2 transforms, run by the processes that decode the files.

Every image has its own seed in every epoch, so that crops depend neither on the number of workers nor on how a
batch is divided among processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nas_kmix.engine.augment import Augmentation

CROPS = 4  # random stream, beside those of `feed`


@dataclass(frozen=True)
class PhotoTransform:
    """RandomResizedCrop of 8 to 100 % of the photograph, then flip and ColorJitter as the augmentation says."""

    size: int
    augmentation: Augmentation
    seed: int

    def __call__(self, image: Tensor, index: int, epoch: int) -> Tensor:
        """uint8 (3, H, W) of any size to uint8 (3, size, size), a function of (seed, epoch, index)."""
        from torchvision.transforms import v2  # late, as in `decoding`

        steps: list[torch.nn.Module] = [v2.RandomResizedCrop(self.size, antialias=True)]
        if self.augmentation.flip:
            steps.append(v2.RandomHorizontalFlip())
        if any(self.augmentation.color_jitter):
            steps.append(v2.ColorJitter(*self.augmentation.color_jitter))
        seed = np.random.default_rng([self.seed, CROPS, epoch, index]).integers(2**63)
        with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's global generator
            torch.default_generator.manual_seed(int(seed))
            return v2.Compose(steps)(image)
