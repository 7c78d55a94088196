"""Draw the images with the highest and the lowest CV of a finished run.

    python search.py --out runs/digits
    python -m studies.first_run.picture --run runs/digits --picture studies/first_run/digits_cv.png

Pictures of CIFAR and ImageNet are for looking at, not for committing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tyro

from nas_kmix.engine.data import DataConfig, ImageData, load_data
from nas_kmix.scores import ScoreTable

IMAGES, COLUMNS = 32, 8


@dataclass(frozen=True)
class Config:
    """Which run to draw."""

    run: Path
    picture: Path


def main(config: Config) -> None:
    settings = json.loads((config.run / "config.json").read_text())["input"]
    data = load_data(DataConfig(**settings))
    table = ScoreTable.load(config.run / "scores.npz")
    order = np.argsort(-table.cv, kind="stable")
    figure = plt.figure(figsize=(12, 4.4), layout="constrained")
    for part, title, rows in zip(
        figure.subfigures(1, 2), ("highest CV", "lowest CV"), (order[:IMAGES], order[::-1][:IMAGES]), strict=True
    ):
        part.suptitle(f"{data.source.name}: {title}")
        _grid(part, data, table, rows)
    config.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(config.picture, dpi=100)
    for title, rows in (("highest", order[:IMAGES]), ("lowest", order[::-1][:IMAGES])):
        mean, cv = table.mean[rows].mean(), table.cv[rows].mean()
        print(f"{title} {IMAGES}: mean CV {cv:.3f}, mean loss {mean:.3f}")


def _grid(figure, data: ImageData, table: ScoreTable, rows: np.ndarray) -> None:
    for axis, row in zip(figure.subplots(IMAGES // COLUMNS, COLUMNS).flat, rows, strict=True):
        index = table.index[row]
        axis.imshow(data.fetch([index]).images[0].permute(1, 2, 0).numpy())
        axis.set_title(f"{data.class_names[table.label[row]]}\n{table.cv[row]:.2f}", fontsize=7)
        axis.axis("off")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
