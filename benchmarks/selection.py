"""Seconds and peak memory of every measure that ranks images, and of every way to select by it.

    python -m benchmarks.selection --images 50000 --json selection.json

Each runs in a process of its own, on random losses (10 draws), features (64) and a random last layer (100 classes), as
they are once the network has seen the images. Memory is what the process needs beyond those inputs. `losses` stands for
CV, mean, standard deviation and residual together, `mc_dropout` for BALD and variation ratio.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from benchmarks.measure import command_line, report
from nas_kmix.baselines import DROPOUT, PASSES, el2n, entropy, mc_dropout, pick_order
from nas_kmix.engine.ledger import peak_rss_bytes
from nas_kmix.sampling import Method, select
from nas_kmix.scores import ScoreTable

CLASSES, FEATURES, DRAWS, RATIO = 100, 64, 10, 0.1
IMAGES_AT_ONCE = 512
METHODS: tuple[Method, ...] = ("interval", "top", "coverage", "histogram", "random")


@dataclass(frozen=True)
class Config:
    images: int = 50_000
    only: tuple[str, ...] = ()
    """Names of single tasks, e.g. k_centre; all by default."""
    inside: str | None = None
    """Run this task in this process, and print its seconds and bytes."""
    json: Path | None = None
    """Also write the figures to this file, as JSON."""


def tasks(n: int) -> dict[str, Callable[[], object]]:
    """Everything that is measured, by name, for `n` images."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, n)
    table = ScoreTable(np.arange(n), labels, rng.gamma(4.0, size=(n, DRAWS)).astype(np.float32))
    features = torch.as_tensor(rng.gamma(1.0, size=(n, FEATURES)).astype(np.float32))
    head = torch.nn.Linear(FEATURES, CLASSES)
    masks = torch.as_tensor(rng.random((PASSES, FEATURES)) >= DROPOUT) / (1.0 - DROPOUT)
    targets = torch.as_tensor(labels)

    def by_parts(measure: Callable[[torch.Tensor, torch.Tensor], object]) -> Callable[[], object]:
        parts = list(zip(features.split(IMAGES_AT_ONCE), targets.split(IMAGES_AT_ONCE), strict=True))
        return lambda: [measure(*part) for part in parts]

    def methods() -> dict[str, Callable[[], object]]:
        scores = table.mean
        return {
            f"select_{method}": lambda method=method: select(
                scores, labels, RATIO, method=method, rng=np.random.default_rng(0)
            )
            for method in METHODS
        }

    return {
        "losses": lambda: [table.measure(name) for name in ("cv", "mean", "std", "residual")],
        "entropy": by_parts(lambda part, _: entropy(head(part).softmax(dim=1))),
        "el2n": by_parts(lambda part, label: el2n(head(part).softmax(dim=1), label)),
        "mc_dropout": by_parts(lambda part, _: mc_dropout(part, head, masks)),
        "k_centre": lambda: pick_order(features),
        **methods(),
    }


@torch.inference_mode()
def inside(name: str, images: int) -> None:
    """Run one task, and print its seconds of CPU time and the bytes by which the peak grew."""
    torch.set_num_threads(1)
    work = tasks(images)[name]
    before, start = peak_rss_bytes(), time.process_time()
    work()
    print(json.dumps([time.process_time() - start, peak_rss_bytes() - before]))


def main(config: Config) -> None:
    if config.inside is not None:
        inside(config.inside, config.images)
        return
    figures = {}
    for name in config.only or tasks(1_000):
        command = [sys.executable, "-m", "benchmarks.selection", "--inside", name, "--images", str(config.images)]
        ended = subprocess.run(command, check=True, capture_output=True, text=True)
        figures[f"{name}_s"], grown = json.loads(ended.stdout)
        figures[f"{name}_mb"] = grown / 1e6
    report(figures, config.json, "cpu")


if __name__ == "__main__":
    main(tyro.cli(Config, args=command_line(), description=__doc__))
