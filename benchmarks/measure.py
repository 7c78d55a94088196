"""What the benchmarks share: a stopwatch that waits for the device, and generated images."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from nas_kmix.engine.data import ImageData
from nas_kmix.engine.sources import Source


def seconds(work: Callable[[], object], device: torch.device | str) -> float:
    """How long `work` takes, until the device has finished it."""
    device = torch.device(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def generated_images(n: int, size: int, classes: int, device: torch.device, *, rng: np.random.Generator) -> ImageData:
    """A resident set of `n` noisy images of `size` pixels a side with labels at random."""
    pixels = rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    names = tuple(map(str, range(classes)))
    source = Source("generated", "train", rng.integers(0, classes, n), names, arrays=pixels)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(device)
    return ImageData(source, size, (0.5,) * 3, (0.25,) * 3, device, images)
