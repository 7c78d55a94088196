"""Genotypes retrained on real images: CIFAR-100 and Imagenette, a cell per network and seed.

    python -m studies.transfer                                # all cells that results.jsonl lacks, one after the other
    python -m studies.transfer --only small/first_run/0       # one of them
    python -m studies.transfer --summary                      # the table of the README, from results.jsonl

small: C=8, 8 layers, 10,000 images of CIFAR-100, 15 epochs: PC_DARTS_cifar, the genotypes of the two searches in
studies/first_run, and three random genotypes of about the published one's cost, three seeds each. full: PC_DARTS_cifar
with C=16 on all 50,000 images for 10 epochs. imagenette: the ImageNet network of PC_DARTS_image at 224 px, three seeds.
A finished cell appends its line to results.jsonl and is skipped from then on. After --minutes a cell saves its state
and the program ends with code 75; the same command goes on from there.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro

import train_eval
from darts_space import Genotype, read_genotype
from nas_kmix.pipeline.candidates import Shape, random_controls
from studies.cells import CellConfig, read_results, run_cells

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results.jsonl"
SEEDS = range(3)
RANDOM_GENOTYPES = 3
SHAPE, CHANNELS = Shape("cifar", 8, 100, 32), 8

SMALL = "--preset cpu --train-images 10000 --val-share 0.02 --eval-every 5"
FULL = "--preset cpu --channels 16 --epochs 10 --val-share 0"
IMAGENETTE = (
    "--preset imagenet --channels 12 --layers 8 --epochs 40 --batch-size 32 --lr 0.1 --schedule cosine "
    "--warmup-epochs 1 --eval-every 5 --channels-last --max-resident-gb 4"
)


@dataclass(frozen=True)
class Config(CellConfig):
    """Which cells, on which copies of the data."""

    cifar100: str = "cifar100"
    """CIFAR-100 as --data of train_eval.py takes it."""
    imagenette: str = "data/imagenette"
    """Imagenette as train|val/CLASS/*."""
    out: Path = Path("runs/transfer")
    """Folder with the run folders."""
    results: Path = RESULTS
    """The file of the finished cells."""
    summary: bool = False
    """Print the existing results, and train nothing."""


@dataclass(frozen=True)
class Cell:
    """One training: `name` is kind/network/seed."""

    name: str
    genotype: Genotype
    flags: str
    data: str

    def command(self, config: Config) -> list[str]:
        seed = self.name.rsplit("/", 1)[1]
        place = ["--data", self.data, "--out", str(config.out / self.name.replace("/", "-")), "--seed", seed]
        return [*self.flags.split(), "--genotype", self.genotype.to_text(), *place, *config.place.split()]


def genotypes() -> dict[str, Genotype]:
    """The six that are compared on CIFAR-100."""
    published = read_genotype("PC_DARTS_cifar")
    searched = FOLDER.parent / "first_run"
    random = random_genotypes(RANDOM_GENOTYPES, macs(published))
    return {
        "PC_DARTS_cifar": published,
        "first_run": Genotype.load(searched / "genotype.json"),
        "first_run_50": Genotype.load(searched / "search_50_epochs" / "genotype.json"),
        **{f"random_{number}": genotype for number, genotype in enumerate(random)},
    }


def random_genotypes(count: int, target: float) -> list[Genotype]:
    """Random genotypes of about `target` multiply-adds."""
    return random_controls(count, target, SHAPE, CHANNELS, rng=np.random.default_rng(0))


def macs(genotype: Genotype) -> int:
    """Multiply-adds of its network on CIFAR-100, with C=8 and 8 layers."""
    return SHAPE.macs(genotype, CHANNELS)


def cells(config: Config) -> list[Cell]:
    networks = genotypes()
    small = [
        Cell(f"small/{name}/{seed}", genotype, SMALL, config.cifar100)
        for seed in SEEDS
        for name, genotype in networks.items()
    ]
    imagenet = read_genotype("PC_DARTS_image")
    return [
        *small,
        *(Cell(f"imagenette/PC_DARTS_image/{seed}", imagenet, IMAGENETTE, config.imagenette) for seed in SEEDS),
        Cell("full/PC_DARTS_cifar/0", read_genotype("PC_DARTS_cifar"), FULL, config.cifar100),
    ]


def run_cell(cell: Cell, config: Config) -> dict[str, Any]:
    """Train, and return the command, the result and the curve. Raises StoppedError at its time."""
    argv = cell.command(config)
    result = train_eval.run(train_eval.parse(argv))
    folder = Path(result.pop("folder"))
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = [{k: float(v) for k, v in row.items() if v and k != "stage"} for row in csv.DictReader(file)]
    return {"command": argv, **result, "curve": rows}


def summary(results: list[dict[str, Any]]) -> str:
    """Mean ± standard deviation over the seeds, as a Markdown table."""
    groups = defaultdict(list)
    for result in results:
        groups[result["cell"].rsplit("/", 1)[0]].append(result)
    lines = [
        "| cell | seeds | M multiply-adds | last accuracy | best accuracy | images/s |",
        "|---|---|---|---|---|---|",
    ]
    for name, group in groups.items():
        split = "test" if "test_accuracy" in group[0]["last"] else "val"
        columns = [_spread([100 * result["last"][f"{split}_accuracy"] for result in group], " %")]
        chosen = [result["best"] for result in group if result["best"] is not None]
        columns.append(_spread([100 * best[f"{split}_accuracy"] for best in chosen], " %") if chosen else "–")
        columns.append(_spread([result["images_per_second"] for result in group], ""))
        lines.append(f"| {name} ({split}) | {len(group)} | {group[0]['macs'] / 1e6:.1f} | {' | '.join(columns)} |")
    return "\n".join(lines)


def _spread(values: list[float], unit: str) -> str:
    deviation = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{deviation}{unit}"


def main() -> int:
    config = tyro.cli(Config, description=__doc__)
    if config.summary:
        print(summary(read_results(config.results)))
        return 0
    work = {cell.name: partial(run_cell, cell, config) for cell in cells(config)}
    return run_cells(work, config.results, config)


if __name__ == "__main__":
    sys.exit(main())
