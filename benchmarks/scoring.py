"""How much of a scoring run is the network: images scored per second against bare forward passes of the same batches.

    python -m benchmarks.scoring --backbone small --json scoring.json    # without FILE, JSON goes to the output

Both run in turn in one process, on generated images, mixed as by default (K=3, M=10) and once unmixed; the figure is
the median over the pairs of (bare forward time / scoring time). 1.00 would mean that mixing and losses cost nothing.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python benchmarks/scoring.py`

from benchmarks.measure import command_line, generated_images, in_turn, report
from nas_kmix.backbones import build_backbone
from nas_kmix.engine.compute import DeviceConfig, pick_device
from nas_kmix.scoring import ScoringConfig, score_dataset


@dataclass(frozen=True)
class Config:
    """What to time."""

    backbone: str = "small"
    images: int = 512
    """Anchors per repeat, from a pool of ten times as many images."""
    draws: int = 10
    batch_size: int = 512
    image_size: int = 32
    classes: int = 100
    pairs: int = 9
    device: str = "cpu"
    threads: int = 0
    json: Path | None = None
    """Write the figures to this file as JSON; `-` is the standard output."""


def main(config: Config) -> dict[str, float]:
    device = pick_device(DeviceConfig(device=config.device, threads=config.threads))
    rng = np.random.default_rng(0)
    size, pool = config.image_size, 10 * config.images
    data = generated_images(pool, size, config.classes, device, rng=rng)
    model = build_backbone(config.backbone, num_classes=config.classes, stem=data.stem).to(device).eval()
    scoring = ScoringConfig(draws=config.draws, batch_size=config.batch_size)
    anchors = np.arange(config.images)  # one after the other, as in a run
    mixes = config.images * config.draws
    sizes = [
        min(config.batch_size, n - start) for n in (mixes, config.images) for start in range(0, n, config.batch_size)
    ]
    # As many batches as scoring has, since the same one over and over would come from the cache.
    batches = [torch.randn(n, 3, size, size, device=device) for n in sizes]

    def bare() -> None:
        with torch.inference_mode():
            for batch in batches:
                model(batch)

    def scored() -> None:
        score_dataset(model, data, scoring, indices=anchors)

    rows = in_turn((bare, scored), config.pairs, device)
    figures = {
        "scoring_ratio": statistics.median(plain / full for plain, full in rows),
        "overhead_us_per_mix": statistics.median(1e6 * (full - plain) / mixes for plain, full in rows),
        "forward_us_per_mix": statistics.median(1e6 * plain / mixes for plain, _ in rows),
        "images_per_s": statistics.median(config.images / full for _, full in rows),
    }
    report(figures, config.json, device)
    return figures


if __name__ == "__main__":
    main(tyro.cli(Config, args=command_line(), description=__doc__))
