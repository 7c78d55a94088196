"""Draw what a network is trained on: a grid of mixed images with their soft labels, one row per mixer.

    python -m nas_kmix.analysis.mixes --data digits --picture mixes.png
    python -m nas_kmix.analysis.mixes --data data/cifar100.npz --k 3 --images 8 --picture mixes.png

The grid is that of the paper's Fig. 1 and SM Fig. 2. All rows mix the same images. In the first row a cross marks each
image's most salient pixel, around which Saliency-DCutMix cuts its patches.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from nas_kmix.engine import cli, files
from nas_kmix.engine.cli import Flat, parse_flags
from nas_kmix.engine.data import DataConfig, ImageData, load_data
from nas_kmix.mixing import DCutMix, DMixup, Mixer, SaliencyDCutMix
from nas_kmix.rivals import CutMix, Cutout, Mixup
from nas_kmix.saliency import fine_grained, peaks

LEAST_SHARE = 0.005  # of a class, to be written under its image
INCHES = 1.25  # side of an image


@dataclass(frozen=True)
class Config:
    """Which images to mix, and how."""

    picture: Path = Path("mixes.png")
    """The PNG file to write."""
    input: Annotated[DataConfig, Flat] = field(default_factory=DataConfig)
    images: int = 8
    """Number of images that are mixed with one another, a column each."""
    k: int = 3
    """K, the number of images in a mix of DMixup, DCutMix and Saliency-DCutMix."""
    alpha: float = 1.0
    """Concentration of the Beta or Dirichlet distribution of the mixing weights."""
    seed: int = 0
    """Seed of the choice of images and of every mix."""


@dataclass(frozen=True)
class Row:
    """A row of the grid: images, float32 (N, H, W, 3) in [0, 1], and a caption for each."""

    title: str
    images: np.ndarray
    captions: list[str]


def mixers(config: Config, num_classes: int, size: int) -> dict[str, Mixer]:
    """The mixers, by the title of their row."""
    two = {"alpha": config.alpha, "num_classes": num_classes}
    several = {"k": config.k, **two}
    return {
        "Cutout": Cutout(size=size // 2, num_classes=num_classes),
        "Mixup": Mixup(**two),
        "CutMix": CutMix(**two),
        f"DMixup\nK = {config.k}": DMixup(**several),
        f"DCutMix\nK = {config.k}": DCutMix(**several),
        f"Saliency-\nDCutMix\nK = {config.k}": SaliencyDCutMix(**several),
    }


def rows(config: Config, data: ImageData) -> tuple[list[Row], np.ndarray]:
    """The rows of the unmixed images and of every mixer, and the unmixed images' most salient pixels, int64 (N, 2)."""
    rng = np.random.default_rng(config.seed)
    if config.images > len(data.good()):
        raise ValueError(f"--images {config.images} is more than the {len(data.good())} images available.")
    batch = data.fetch(rng.choice(data.good(), size=config.images, replace=False))
    images = data.normalise(batch.images)
    names = data.class_names
    table = [Row("unmixed", _shown(images, data), [names[label] for label in batch.labels.tolist()])]
    for title, mixer in mixers(config, data.num_classes, data.image_size).items():
        mixed, soft = mixer(images, batch.labels, rng=np.random.default_rng([config.seed, 1]))
        table.append(Row(title, _shown(mixed, data), [caption(row, names) for row in soft]))
    return table, peaks(fine_grained(images)).numpy()


def caption(soft_label: Tensor, names: Sequence[str]) -> str:
    """A line for each class with its share, the largest first."""
    shares, classes = soft_label.sort(descending=True, stable=True)
    pairs = zip(shares.tolist(), classes.tolist(), strict=True)
    return "\n".join(f"{names[label]}: {share:.2f}" for share, label in pairs if share >= LEAST_SHARE)


def _shown(images: Tensor, data: ImageData) -> np.ndarray:
    """Undo the normalisation."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
    return (images.cpu() * std + mean).clamp(0.0, 1.0).permute(0, 2, 3, 1).numpy()


def draw(table: Sequence[Row], marks: np.ndarray) -> Figure:
    """Draw the grid, with crosses at the pixels `marks` (N, 2) of the first row's images."""
    columns = len(table[0].images)
    lines = [max(text.count("\n") + 1 for text in row.captions) for row in table]
    heights = [INCHES + 0.13 * count for count in lines]
    figure = Figure(figsize=(INCHES * (columns + 0.8), sum(heights) + 0.2), layout="constrained")
    grid = figure.subplots(len(table), columns, squeeze=False, height_ratios=heights)
    for axes, row in zip(grid, table, strict=True):
        axes[0].set_ylabel(row.title, rotation=0, ha="right", va="center", fontsize=9)
        for axis, image, text in zip(axes, row.images, row.captions, strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set_anchor("N")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_xlabel(text, fontsize=7, parse_math=False)  # a class may have a dollar in its name
    for axis, (y, x) in zip(grid[0], marks, strict=True):
        axis.plot(x, y, "+", color="red", markersize=9, markeredgewidth=1.5)
    return figure


def run(config: Config) -> None:
    """Write the picture. Raises ValueError and OSError."""
    if config.images < 2:
        raise ValueError(f"--images {config.images}: a mix needs two images or more.")
    if config.picture.suffix != ".png":
        raise ValueError(f"--picture {config.picture} must end in .png.")
    data = load_data(config.input)
    buffer = io.BytesIO()
    draw(*rows(config, data)).savefig(buffer, format="png", dpi=110)
    config.picture.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(config.picture, buffer.getvalue())


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: those of `cli.exit_code`."""
    return cli.exit_code(lambda: run(parse_flags(Config, argv, __doc__)))


if __name__ == "__main__":
    sys.exit(main())
