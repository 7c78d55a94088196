"""Throughput of the training loader as a share of bare JPEG decoding in the same run.

    python -m benchmarks.loader --data data/imagenette --workers 2

The reference decodes the same files with Pillow to RGB arrays, one after the other in one process, and does nothing
else. The loader decodes, crops, resizes, flips and (with --jitter) jitters in `workers` processes, and collates; its
figure is per worker. The two take turns, and the ratio is the median over the rounds.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from benchmarks.measure import command_line, report
from nas_kmix.engine.augment import Augmentation
from nas_kmix.engine.data import DataConfig, load_data
from nas_kmix.engine.photographs import PhotoTransform


@dataclass(frozen=True)
class Config:
    data: Path = Path("data/imagenette")
    """Folder with train/CLASS/*."""
    workers: int = 1
    """Loader processes; 0 decodes in the main process."""
    images: int = 256
    """Images per round."""
    rounds: int = 5
    jitter: bool = False
    """Jitter colours as the preset `imagenet` does."""
    json: Path | None = None
    """Also write the figures to this file, as JSON."""


def main(config: Config) -> dict[str, float]:
    torch.set_num_threads(1)
    data = load_data(DataConfig(data=str(config.data), image_size=224, max_resident_gb=0.0), workers=config.workers)
    rng = np.random.default_rng(0)
    jitter = (0.4, 0.4, 0.4, 0.2) if config.jitter else (0.0,) * 4
    transform = PhotoTransform(224, Augmentation(color_jitter=jitter), seed=0)
    bare, loaded = [], []
    for round_ in range(config.rounds + 1):
        indices = rng.permutation(len(data))[: config.images]
        start = time.perf_counter()
        for index in indices:
            data.source.read(index)
        middle = time.perf_counter()
        plan = np.array_split(indices, max(1, len(indices) // 32))
        n = sum(len(b.indices) for b in data.batches(plan, transform=transform, epoch=round_, persistent=True))
        end = time.perf_counter()
        if round_ > 0:  # the first starts the workers and fills the file cache
            bare.append(len(indices) / (middle - start))
            loaded.append(n / (end - middle) / max(1, config.workers))
    ratios = [a / b for a, b in zip(loaded, bare, strict=True)]
    figures = {
        "bare_decoding_images_per_second": statistics.median(bare),
        "loader_images_per_second_and_worker": statistics.median(loaded),
        "ratio": statistics.median(ratios),
        "lowest_ratio": min(ratios),
        "highest_ratio": max(ratios),
    }
    report(figures, config.json, "cpu")
    return figures


if __name__ == "__main__":
    main(tyro.cli(Config, args=command_line(), description=__doc__))
