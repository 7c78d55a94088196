"""How the method scales with the data: time to select from N scores, memory to score a folder of N images.

    python -m benchmarks.scale --json scale.json
    python -m benchmarks.scale --rows 10000 1000000 --files 1000 10000

Selection (interval, 5 %, 100 classes) is timed against NumPy's stable argsort of the same N scores in the same process:
while the ratio does not grow, selection is O(N log N) too. Memory is the peak of a process of its own per N, which
writes N small files, streams and scores them all: `growth_bytes_per_file` is the slope between the smallest and the
largest N, to be held against the 3,072 bytes of one resident image.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python benchmarks/scale.py`

from benchmarks.measure import write_json
from nas_kmix.backbones import build_backbone
from nas_kmix.engine.data import DataConfig, load_data
from nas_kmix.engine.ledger import peak_rss_bytes
from nas_kmix.sampling import select
from nas_kmix.scoring import ScoringConfig, score_dataset

CLASSES = 100
SIDE = 32  # pixels


@dataclass(frozen=True)
class Config:
    """Which sizes to measure."""

    rows: tuple[int, ...] = (10_000, 100_000, 1_000_000, 10_000_000)
    """Sizes N of the score tables."""
    files: tuple[int, ...] = (1_000, 10_000, 100_000)
    """Sizes N of the image folders."""
    repeats: int = 5
    """Selections and sorts, in turn, of which the median is taken."""
    peak_of: int | None = None
    """Score one folder of so many images in this process, and print its peak memory in bytes."""
    json: Path | None = None
    """Also write the figures to this file, as JSON."""


def selection_over_sort(n: int, repeats: int) -> float:
    """Median of (time of `select`) / (time of a stable argsort of its scores)."""
    rng = np.random.default_rng(0)
    scores, labels = rng.random(n), rng.integers(0, CLASSES, n)
    ratios = []
    for _ in range(repeats):
        start = time.perf_counter()
        np.argsort(scores, kind="stable")
        middle = time.perf_counter()
        select(scores, labels, 0.05)
        ratios.append((time.perf_counter() - middle) / (middle - start))
    return statistics.median(ratios)


def write_images(folder: Path, n: int) -> None:
    """`n` noisy bitmaps in the layout train/CLASS/*.bmp."""
    rng = np.random.default_rng(0)
    for label in range(CLASSES):
        (folder / "train" / f"{label:02}").mkdir(parents=True)
    for i in range(n):
        pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "train" / f"{i % CLASSES:02}" / f"{i}.bmp")


def score_folder(n: int) -> int:
    """Peak memory of this process after it has streamed and scored `n` files."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), n)
        data = load_data(DataConfig(data=folder, max_resident_gb=0.0))
        model = build_backbone("tiny", num_classes=CLASSES, stem=data.stem)
        score_dataset(model, data, ScoringConfig(draws=2, pool_size=512))
    return peak_rss_bytes()


def main(config: Config) -> None:
    if config.peak_of is not None:
        print(score_folder(config.peak_of))
        return
    figures: dict[str, dict[int, float] | float] = {"select_over_sort": {}, "peak_bytes": {}}
    print("| N scores | select over sort |\n|---|---|")
    for n in config.rows:
        figures["select_over_sort"][n] = selection_over_sort(n, config.repeats)
        print(f"| {n:,} | {figures['select_over_sort'][n]:.2f} |", flush=True)
    print("\n| N files | peak memory, MiB |\n|---|---|")
    for n in config.files:
        command = [sys.executable, __file__, "--peak-of", str(n)]
        figures["peak_bytes"][n] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"| {n:,} | {figures['peak_bytes'][n] / 2**20:.0f} |", flush=True)
    if len(config.files) > 1:
        first, last = min(config.files), max(config.files)
        growth = (figures["peak_bytes"][last] - figures["peak_bytes"][first]) / (last - first)
        figures["growth_bytes_per_file"] = growth
        print(f"\n{growth:.0f} bytes per file")
    if config.json is not None:
        write_json(figures, config.json)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
