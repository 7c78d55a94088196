"""Finals alone (part 5): how well do short trainings rank random architectures, and on which images?

    python -m studies.search_quality.pools --only high-cv/1     # one cell; without --only, all that are missing

A cell trains a pool of sixteen random genotypes, the same in all arms, for 20,000 image passes each on a subset that is
drawn for the pool, and judges them on 2,500 training images that lie in no subset. One training gives three criteria:
accuracy, loss, and the mean training loss over the run. The lines of pools.jsonl hold no verdicts. The scores are those
of the scorers that `whole` trains, and are made if they are missing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from darts_space import Genotype, random_genotype
from nas_kmix.engine.compute import DeviceConfig, pick_compute
from nas_kmix.engine.data import DataConfig, load_data
from nas_kmix.engine.evaluation import evaluate
from nas_kmix.pipeline.candidates import Shape
from nas_kmix.pipeline.trial import FinalsConfig, train_rung
from nas_kmix.sampling import Method, select, split_by_class
from nas_kmix.scores import ScoreTable
from studies.cells import run_cells
from studies.search_quality import whole

RESULTS = Path(__file__).parent / "pools.jsonl"
POOLS = range(1, 7)
SIZE = 16
PASSES = 20_000
JUDGES = 2500
GENOTYPES, SUBSET = 51, 52  # random streams


@dataclass(frozen=True)
class Arm:
    """On which images, and with which networks."""

    method: Method = "random"
    images: int = 2500
    channels: int = 8
    size: int = 32


ARMS = {
    "high-cv": Arm("interval"),
    "random": Arm(),
    "random-10000": Arm(images=10_000),
    "16px": Arm(channels=16, size=16),
    "16px-10000": Arm(images=10_000, channels=16, size=16),
}


@dataclass(frozen=True)
class Config(whole.Config):
    """Which cells, on which copy of the data; `out` has the scorers."""

    results: Path = RESULTS
    minutes: float = 1e5  # a cell saves no state, so none is stopped


def genotypes(pool: int) -> list[Genotype]:
    """The random genotypes of a pool."""
    rng = np.random.default_rng([pool, GENOTYPES])
    return [random_genotype(rng) for _ in range(SIZE)]


def train_pool(arm: Arm, pool: int, config: Config) -> dict[str, Any]:
    """Train and judge the sixteen; returns a list for each criterion."""
    compute = pick_compute(DeviceConfig(config.device, threads=1, channels_last=True))
    data = load_data(DataConfig(data=config.cifar100, image_size=arm.size), device=compute.device)
    free, judges = split_by_class(np.arange(len(data)), data.labels, JUDGES / len(data), seed=0)
    scores = np.zeros(len(data))
    if arm.method != "random":
        scores = ScoreTable.load(whole.scores_of(pool, config)).measure("cv")
    rng = np.random.default_rng([pool, SUBSET])
    share = arm.images / len(free)
    chosen = free[select(scores[free], data.labels[free], share, method=arm.method, interval=4, rng=rng)]
    settings = FinalsConfig(epochs=round(PASSES / len(chosen)), channels=arm.channels, batch_size=32, seed=pool)
    shape = Shape.of(data, settings.layers)
    found: dict[str, Any] = {"images": len(chosen), "accuracy": [], "loss": [], "train_loss": []}
    for genotype in genotypes(pool):
        network = shape.network(genotype, settings.channels, torch.Generator().manual_seed(pool))
        network = compute.layout(network.to(compute.device))
        train_loss = train_rung(network, data, chosen, settings, rung=0, compute=compute)
        judged = evaluate(network, data, compute=compute, indices=judges)
        for name, value in (("accuracy", judged["accuracy"]), ("loss", judged["loss"]), ("train_loss", train_loss)):
            found[name].append(round(value, 4))
    return found


def cells(config: Config) -> dict[str, Callable[[], dict[str, Any]]]:
    """The work of each cell, by its name."""
    return {f"{name}/{pool}": partial(train_pool, arm, pool, config) for name, arm in ARMS.items() for pool in POOLS}


def main() -> int:
    config = tyro.cli(Config, description=__doc__)
    return run_cells(cells(config), config.results, config)


if __name__ == "__main__":
    sys.exit(main())
