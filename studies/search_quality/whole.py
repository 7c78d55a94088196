"""Whole runs of search.py as cells: presets as they ship, proxies of several kinds, finals, and retraining.

    python -m studies.search_quality.whole --only preset/cpu/101     # one of them; without --only, all that are missing
    python -m studies.search_quality.whole --only rates              # alone on the machine: image passes per second

A cell is a run folder, and appends its line to runs.jsonl: the flags, the genotype, the tables of every record, what
the finals said and the cost. After --minutes a cell saves its state and the program ends with code 75; the same command
goes on from there. `proved/cpu/SEED` adds the finals to the run of `preset/cpu/SEED`. The five winners are retrained
like the small networks of studies/transfer, and so are controls of their cost: sixteen random genotypes, eight of
random convolutions on the winners' wiring (`wired`), and the winners' operations on ten random wirings (`rewired`).
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from darts_space import ARCHITECTURE_NAMES, Genotype, random_genotype
from darts_space.cell import CONCAT, NODES
from nas_kmix.engine import files
from nas_kmix.pipeline.history import REMOVAL_NAMES
from studies.cells import CellConfig, read_results, run_cells, search_once
from studies.search_quality.controls import CONVOLUTIONS
from studies.search_quality.training import packed
from studies.transfer import __main__ as transfer

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "runs.jsonl"

CPU_SEEDS = range(101, 106)
HIGH_CV = "--scoring.partners fresh --scoring.loss mixed --measure cv"  # the paper's scores
PRESETS = {
    "cpu": (CPU_SEEDS, "--preset cpu --no-finals"),
    "cpu-paper": (CPU_SEEDS, f"--preset cpu --no-finals --rest-steps 2400 {HIGH_CV} --method interval"),
    "quick": (range(5), "--preset quick --no-finals"),
    "gpu": (range(101, 103), "--preset gpu"),  # on the proxies of cpu's first two seeds
}
PROXIES = {
    "high-cv-.05": f"{HIGH_CV} --method interval --ratio 0.05",
    "random-.05": "--ratio 0.05 --method random",
    "low-cv-.05": f"{HIGH_CV} --method bottom --ratio 0.05",
    "high-cv-.1": f"{HIGH_CV} --method interval --ratio 0.1",
    "random-.1": "--ratio 0.1 --method random",
    "all": "--proxy none",
}
PROXY_SEEDS = range(1, 7)
# Less of everything, but as many resting steps for one of the architecture, and as many epochs of the finals for one
# judgement, as the preset has.
RATES = "--preset cpu --scorer.epochs 1 --rest-steps 240 --arch-steps 10 --finals.controls 2 --jobs 1 --seed 0"
CONTROLS = {"random": 16, "wired": 8, "rewired": 10}  # beside the winners, in the retraining


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
            cell = f"preset/{name}/{seed}"
            work[cell] = partial(
                run, cell, f"{flags} --seed {seed}", config, proxy_seed=seed if name == "gpu" else None
            )
    for seed in CPU_SEEDS:
        work[f"proved/cpu/{seed}"] = partial(run, f"preset/cpu/{seed}", f"--preset cpu --seed {seed}", config)
    for arm, flags in PROXIES.items():
        for seed in PROXY_SEEDS:
            scorer = None if "random" in flags or "none" in flags else seed
            command = f"--preset cpu --no-finals --rest-steps 2400 {flags} --seed {seed}"
            cell = f"proxies/{arm}/{seed}"
            work[cell] = partial(run, cell, command, config, scorer_seed=scorer)
    numbered = (f"{kind}/{i:02}" for kind, count in CONTROLS.items() for i in range(count))
    for name in (*(f"winner/{seed}" for seed in CPU_SEEDS), *numbered):
        work[f"retrain/{name}"] = partial(_retrain, name, config)
    return work


def _retrain(name: str, config: Config) -> dict[str, Any]:
    genotype = _retrained(config.results)[name]
    return transfer.run_cell(transfer.Cell(f"retrain/{name}", genotype, transfer.SMALL, config.cifar100), config)


@functools.cache
def _retrained(results: Path) -> dict[str, Genotype]:
    """The winners of the finals and controls of about their cost, by the names of their cells."""
    lines = {line["cell"]: line for line in read_results(results)}
    cells = {seed: f"proved/cpu/{seed}" for seed in CPU_SEEDS}
    if missing := [cell for cell in cells.values() if cell not in lines]:
        raise SystemExit(f"error: {results} lacks {', '.join(missing)}, whose winners are retrained; run them first.")
    winners = {f"winner/{seed}": Genotype.from_json(lines[cell]["genotype"]) for seed, cell in cells.items()}
    target = float(np.mean([transfer.macs(genotype) for genotype in winners.values()]))
    controls = {
        "random": transfer.random_genotypes(CONTROLS["random"], target),
        "wired": _wired(CONTROLS["wired"], target),
        "rewired": _rewired(list(winners.values()), CONTROLS["rewired"]),
    }
    return winners | {f"{kind}/{i:02}": one for kind, drawn in controls.items() for i, one in enumerate(drawn)}


def _wired(count: int, target: float) -> list[Genotype]:
    """Random convolutions on the wiring of `--edges-by inputs`, within a tenth of `target` multiply-adds."""
    rng, found = np.random.default_rng(0), []
    while len(found) < count:
        cells = [[(str(rng.choice(CONVOLUTIONS)), source) for _ in range(NODES) for source in (0, 1)] for _ in range(2)]
        genotype = Genotype(cells[0], CONCAT, cells[1], CONCAT)
        if abs(transfer.macs(genotype) / target - 1.0) <= 0.1:
            found.append(genotype)
    return found


def _rewired(winners: Sequence[Genotype], count: int) -> list[Genotype]:
    """The operations of the winners, in turn, on random wirings. The cost hardly changes."""
    rng, found = np.random.default_rng(0), []
    for i in range(count):
        own, random = winners[i % len(winners)], random_genotype(rng)
        normal, reduce = (
            [(name, source) for (name, _), (_, source) in zip(ours, wiring, strict=True)]
            for ours, wiring in ((own.normal, random.normal), (own.reduce, random.reduce))
        )
        found.append(Genotype(normal, CONCAT, reduce, CONCAT))
    return found


def run(
    name: str, flags: str, config: Config, *, scorer_seed: int | None = None, proxy_seed: int | None = None
) -> dict[str, Any]:
    """Search in the folder of `name`; returns the line's content.

    With `scorer_seed`, on the scores of that seed's scorer; with `proxy_seed`, on the proxy of that seed's preset cpu.

    Raises StoppedError at its time.
    """
    folder = config.out / name.replace("/", "-")
    data = None if "quick" in flags else config.cifar100
    if scorer_seed is not None:
        flags += f" --scores {scores_of(scorer_seed, config)}"
    if proxy_seed is not None:
        flags += f" --proxy {_proxy_of(proxy_seed, config)}"
    result = search_once(flags, folder, config, data)
    assert result.genotype is not None
    history = [json.loads(line) for line in (folder / "genotypes.jsonl").read_text().splitlines()]
    return {
        "flags": flags,
        "genotype": result.genotype.to_json(),
        "finals": result.finals,
        "records": _records(folder, history),
        "cost": _passes(files.read_json(folder / "cost.json")["stages"]),
    }


def scores_of(seed: int, config: Config) -> Path:
    """The paper's scores by the scorer of a seed, which serves all its proxies; made if they are missing."""
    flags = f"--preset cpu {HIGH_CV} --method interval --seed {seed} --stop-after scores"
    return _made(config.out / f"scorer-{seed}", "scores.npz", flags, config)


def _proxy_of(seed: int, config: Config) -> Path:
    """The proxy of the preset cpu; made if it is missing."""
    flags = f"{PRESETS['cpu'][1]} --seed {seed} --stop-after proxy"
    return _made(config.out / f"preset-cpu-{seed}", "proxy.json", flags, config)


def _made(folder: Path, name: str, flags: str, config: Config) -> Path:
    """The file of that name in the run folder, after a search with these flags if it was not there."""
    if not (folder / name).exists():
        search_once(flags, folder, config, config.cifar100)
    return folder / name


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
    """What every stage cost, also where an earlier command ran it and this one only added the finals."""
    names = ("images_forward", "images_backward", "wall_s")
    return {stage: {name: cost[name] for name in names} for stage, cost in stages.items() if cost["wall_s"] > 0}


def main() -> int:
    config = tyro.cli(Config, description=__doc__)
    return run_cells(cells(config), config.results, config)


if __name__ == "__main__":
    sys.exit(main())
