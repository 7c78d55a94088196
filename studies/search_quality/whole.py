"""Whole runs of search.py as cells: the presets as they ship (part 4), and proxies of several kinds (part 3).

    python -m studies.search_quality.whole --only preset/cpu/101     # one of them; without --only, all that are missing
    python -m studies.search_quality.whole --only rates              # alone on the machine: image passes per second

A cell is a run folder, and appends its line to runs.jsonl: the flags, the genotype, the tables of every record and
the cost. After --minutes a cell saves its state and the program ends with code 75; the same command goes on from there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro

from darts_space import ARCHITECTURE_NAMES
from nas_kmix.engine import files
from nas_kmix.pipeline.history import REMOVAL_NAMES
from studies.cells import CellConfig, run_cells, search_once
from studies.search_quality.training import packed

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "runs.jsonl"

PRESETS = {
    "cpu": (range(101, 106), "--preset cpu --no-finals"),
    "quick": (range(5), "--preset quick --no-finals"),
    "gpu": (range(101, 103), "--preset gpu"),  # on the proxies of cpu's first two seeds
}
PROXIES = {
    "high-cv-.05": "--ratio 0.05",
    "random-.05": "--ratio 0.05 --method random",
    "low-cv-.05": "--ratio 0.05 --method bottom",
    "high-cv-.1": "--ratio 0.1",
    "random-.1": "--ratio 0.1 --method random",
    "all": "--proxy none",
}
PROXY_SEEDS = range(1, 7)
RATES = "--preset cpu --no-finals --scorer.epochs 1 --rest-steps 320 --arch-steps 10 --seed 0"  # 32 to 1, as the preset


@dataclass(frozen=True)
class Config(CellConfig):
    """Which cells, on which copy of the data."""

    cifar100: str = "data/cifar100.npz"
    """CIFAR-100 as --data of search.py takes it."""
    out: Path = Path("runs/search_quality")
    """Folder with the run folders."""
    results: Path = RESULTS


def cells(config: Config) -> dict[str, Callable[[], dict[str, Any]]]:
    """The work of each cell, by its name."""
    work = {"rates": partial(run, "rates", RATES, config)}
    for name, (seeds, flags) in PRESETS.items():
        for seed in seeds:
            given = f" --proxy {config.out}/preset-cpu-{seed}/proxy.json" if name == "gpu" else ""
            cell = f"preset/{name}/{seed}"
            work[cell] = partial(run, cell, f"{flags} --seed {seed}{given}", config)
    for arm, flags in PROXIES.items():
        for seed in PROXY_SEEDS:
            scorer = None if "random" in flags or "none" in flags else seed
            command = f"--preset cpu --no-finals {flags} --seed {seed}"
            cell = f"proxies/{arm}/{seed}"
            work[cell] = partial(run, cell, command, config, scorer_seed=scorer)
    return work


def run(name: str, flags: str, config: Config, *, scorer_seed: int | None = None) -> dict[str, Any]:
    """Search, with the scores of the scorer of a seed if one is given, and return what the line holds.

    Raises StoppedError at its time.
    """
    folder = config.out / name.replace("/", "-")
    data = None if "quick" in flags else config.cifar100
    if scorer_seed is not None:  # one scorer a seed serves all proxies
        scorer = config.out / f"scorer-{scorer_seed}"
        if not (scorer / "scores.npz").exists():
            search_once(f"--preset cpu --seed {scorer_seed} --stop-after scores", scorer, data)
        flags += f" --scores {scorer}/scores.npz"
    result = search_once(flags, folder, data)
    assert result.genotype is not None
    history = [json.loads(line) for line in (folder / "genotypes.jsonl").read_text().splitlines()]
    return {
        "flags": flags,
        "genotype": result.genotype.to_json(),
        "records": _records(folder, history),
        "cost": _passes(files.read_json(folder / "cost.json")["stages"]),
    }


def _records(folder: Path, history: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Tables of alpha and beta along the search."""
    arrays = {name: torch.from_numpy(array) for name, array in files.read_npz(folder / "alphas.npz").items()}
    records = []
    for i, row in enumerate(history):
        record = {"arch_step": row["arch_step"], "alpha": packed([arrays[name][i] for name in ARCHITECTURE_NAMES])}
        if REMOVAL_NAMES[0] in arrays:
            record["removal"] = packed([arrays[name][i] for name in REMOVAL_NAMES])
        records.append(record)
    return records


def _passes(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    names = ("images_forward", "images_backward", "wall_s")
    return {stage: {name: cost[name] for name in names} for stage, cost in stages.items() if not cost["skipped"]}


def main() -> int:
    config = tyro.cli(Config, description=__doc__)
    return run_cells(cells(config), config.results, only=config.only, minutes=config.minutes)


if __name__ == "__main__":
    sys.exit(main())
