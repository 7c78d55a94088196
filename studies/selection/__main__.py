"""Which images should a small training set consist of? The paper's Figure 4a and SM Figures 3 and 4 on CIFAR-100.

    python -m studies.selection                               # all cells that results.jsonl lacks, one after the other
    python -m studies.selection --only train/0.05/paper/1     # one of them
    python -m studies.selection --summary                     # summary.json and the tables, from results.jsonl

A fifth of the training images is set aside. Each arm selects t of all images from the other four fifths; a small
network is trained on them for 200,000 image passes and evaluated on the fifth. A seed fixes scorer, draws, subset and
training together; random images are drawn anew by each seed. A scorer and its scores are those of
`search.py --preset cpu --seed SEED`, which a cell makes if they are missing in --out. `reliability/SCORING/SEED` scores
once more, by the same scorer with other draws, and compares the rankings: Spearman's correlation over all images.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from scipy import stats

from nas_kmix.backbones import build_backbone
from nas_kmix.engine import files
from nas_kmix.engine.augment import Augmentation
from nas_kmix.engine.compute import DeviceConfig, pick_compute
from nas_kmix.engine.data import DataConfig, ImageData, load_data
from nas_kmix.engine.evaluation import evaluate
from nas_kmix.engine.keys import stage_key
from nas_kmix.engine.learner import OptimConfig
from nas_kmix.engine.run import Run
from nas_kmix.engine.training import train
from nas_kmix.mixers import MixConfig, make_mix
from nas_kmix.sampling import select, split_by_class
from nas_kmix.scores import ScoreTable
from studies.cells import CellConfig, mean_and_error, read_results, run_cells, search_once

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results.jsonl"

SEEDS = (1, 2, 3)
RATIOS = (0.05, 0.1, 0.2)
PASSES = 200_000
VALIDATION = 0.2
SELECTION = 41  # random stream

SCORINGS = {
    "paper": "--scoring.partners fresh --scoring.loss mixed",
    "anchor": "--scoring.partners common --scoring.loss anchor",
}
"""Two scorings by one scorer: the paper's; and the same mixes for all images, judged by their own labels."""


@dataclass(frozen=True)
class Arm:
    """How images are selected: by which measure of which scoring."""

    scoring: str = "anchor"
    measure: str = "mean"
    options: tuple[tuple[str, Any], ...] = (("method", "random"),)


def _arm(scoring: str, measure: str, method: str, **options: Any) -> Arm:
    return Arm(scoring, measure, (("method", method), *options.items()))


ARMS = {
    "random": Arm(),
    "paper": _arm("paper", "cv", "interval", interval=4),
    "cv-top": _arm("paper", "cv", "top"),
    "cv-anchor": _arm("anchor", "cv", "interval", interval=4),
    "easiest": _arm("anchor", "mean", "bottom"),
    "hardest": _arm("anchor", "mean", "top"),
    "coverage": _arm("anchor", "mean", "coverage", drop_hardest=0.3),
    "coverage-.5": _arm("anchor", "mean", "coverage", drop_hardest=0.5),
    "coverage-.7": _arm("anchor", "mean", "coverage", drop_hardest=0.7),
    "residual": _arm("anchor", "residual", "top"),
    "histogram": _arm("anchor", "entropy", "histogram"),
    "el2n-coverage": _arm("anchor", "el2n", "coverage", drop_hardest=0.5),
    "mixed-entropy": _arm("anchor", "mixed_entropy", "bottom"),
    "k-centre": _arm("anchor", "k_centre", "top"),
}


DEFAULT = "paper"
"""The arm that search.py selects by."""


@dataclass(frozen=True)
class Config(CellConfig):
    """Which cells, on which copy of the data."""

    cifar100: str = "data/cifar100.npz"
    """CIFAR-100 as --data of search.py takes it."""
    out: Path = Path("runs/selection")
    """Folder with the scorers and scores."""
    results: Path = RESULTS
    summary: bool = False
    """Summarise the existing results, and train nothing."""


def cells(config: Config) -> dict[str, Callable[[], dict[str, Any]]]:
    """All cells by name; the plain trainings, without mixing, come last."""
    work: dict[str, Callable[[], dict[str, Any]]] = {
        f"reliability/{scoring}/{seed}": partial(repeat_scoring, scoring, seed, config)
        for scoring in SCORINGS
        for seed in SEEDS
    }
    for mix in ("dcutmix", "none"):
        for ratio in RATIOS:
            for arm in ARMS:
                for seed in SEEDS:
                    name = f"{'train' if mix == 'dcutmix' else 'plain'}/{ratio:g}/{arm}/{seed}"
                    work[name] = partial(train_on_subset, ratio, arm, seed, mix, config)
    return work


def scores_of(seed: int, scoring: str, config: Config) -> ScoreTable:
    """The scores of one scoring by the scorer of `seed`; both are made if they are missing."""
    for name in dict.fromkeys(("paper", scoring)):
        folder = config.out / f"{seed}-{name}"
        if not (folder / "scores.npz").exists():
            given = "" if name == "paper" else f"--scoring.baselines --scorer {config.out}/{seed}-paper/scorer.pt"
            flags = f"--preset cpu --seed {seed} --stop-after scores {SCORINGS[name]} {given}"
            search_once(flags, folder, config, config.cifar100)
    return ScoreTable.load(config.out / f"{seed}-{scoring}" / "scores.npz")


def repeat_scoring(scoring: str, seed: int, config: Config) -> dict[str, Any]:
    """How well the rankings of one scoring repeat with other draws, and with the next seed's scorer."""
    first = scores_of(seed, scoring, config)
    other_scorer = scores_of(seed % len(SEEDS) + 1, scoring, config)
    folder = config.out / f"{seed}-{scoring}-again"
    flags = f"--preset cpu --seed {seed + 100} --stop-after scores {SCORINGS[scoring]}"
    search_once(f"{flags} --scorer {config.out}/{seed}-paper/scorer.pt", folder, config, config.cifar100)
    again = ScoreTable.load(folder / "scores.npz")
    return {
        measure: {
            name: round(float(stats.spearmanr(first.measure(measure), other.measure(measure)).statistic), 3)
            for name, other in (("same_scorer", again), ("other_scorer", other_scorer))
        }
        for measure in ("cv", "mean")
    }


def train_on_subset(ratio: float, arm: str, seed: int, mix: str, config: Config) -> dict[str, Any]:
    """Select, train, and evaluate on the images that were set aside."""
    compute = pick_compute(DeviceConfig(config.device, threads=1, channels_last=True))
    data = load_data(DataConfig(data=config.cifar100), device=compute.device)
    pool, validation = split_by_class(np.arange(len(data)), data.labels, VALIDATION, seed=0)
    chosen = pool[_selected(ARMS[arm], pool, data, ratio, seed, config)]
    model = build_backbone("small", num_classes=data.num_classes, stem=data.stem, seed=seed).to(compute.device)
    model = compute.layout(model)
    optim = OptimConfig(epochs=round(PASSES / len(chosen)), batch_size=64, lr=0.1, schedule="cosine", weight_decay=5e-4)
    settings = MixConfig("dcutmix") if mix == "dcutmix" else MixConfig("none")
    name = f"{mix}-{ratio:g}-{arm}-{seed}"
    with Run(config.out / name, stages=("training",), compute=compute) as run:
        train(
            model, data, optim, Augmentation(), mix=make_mix(settings, data.num_classes, model), seed=seed, run=run,
            stage="training", key=stage_key("training", {"cell": name}, {}), indices=chosen,
        )  # fmt: skip
    found = evaluate(model, data, compute=compute, indices=validation)
    return {"images": len(chosen), "accuracy": round(found["accuracy"], 4), "loss": round(found["loss"], 4)}


def _selected(arm: Arm, pool: np.ndarray, data: ImageData, ratio: float, seed: int, config: Config) -> np.ndarray:
    """Places in `pool`."""
    options = dict(arm.options)
    scores = np.zeros(len(pool))
    if options["method"] != "random":
        table = scores_of(seed, arm.scoring, config)
        assert np.array_equal(table.index, np.arange(len(data)))
        scores = table.measure(arm.measure)[pool]
    rng = np.random.default_rng([seed, SELECTION])
    return select(scores, data.labels[pool], ratio / (1 - VALIDATION), rng=rng, **options)


def summary(results: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracy by ratio and arm, its difference from random images, paired by seed, and the reliability of rankings."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    repeated: dict[str, list[float]] = {}
    for line in results:
        kind, *place, seed = line["cell"].split("/")
        if kind == "reliability":
            for measure in ("cv", "mean"):
                for what, value in line[measure].items():
                    repeated.setdefault(f"{place[0]} {measure}, {what.replace('_', ' ')}", []).append(value)
        else:
            table = found.setdefault(place[0] if kind == "train" else f"{place[0]} without mixing", {})
            table.setdefault(place[1], {})[int(seed)] = line["accuracy"]
    reliability = {name: mean_and_error(values, 3)["mean"] for name, values in repeated.items()}
    return {**{place: _compared(arms) for place, arms in found.items()}, "reliability": reliability}


def _compared(arms: Mapping[str, Mapping[int, float]]) -> dict[str, Any]:
    """The arms of one ratio; `default` is what search.py selects by default, `best_rival` the best of the others."""
    table: dict[str, Any] = {arm: mean_and_error(list(by_seed.values()), 4) for arm, by_seed in arms.items()}
    for arm, by_seed in arms.items():
        both = sorted(by_seed.keys() & arms.get("random", {}).keys())
        if arm != "random" and both:
            differences = [by_seed[seed] - arms["random"][seed] for seed in both]
            table[f"{arm}_minus_random"] = mean_and_error(differences, 4)
    rivals = [arm for arm in arms if arm not in (DEFAULT, "random")]
    if rivals:
        best = max(rivals, key=lambda arm: table[arm]["mean"])
        table["best_rival"] = {**table[best], "arm": best}
    for suffix in ("", "_minus_random"):
        if DEFAULT + suffix in table:
            table["default" + suffix] = table[DEFAULT + suffix]
    return table


def main() -> int:
    config = tyro.cli(Config, description=__doc__)
    if config.summary:
        whole = summary(read_results(config.results))
        files.write_json(config.results.parent / "summary.json", whole)
        reliability = whole.pop("reliability")
        for place, arms in whole.items():
            for arm, found in arms.items():
                print(f"{place:<24} {arm:<28} {found['mean']:+.4f} ± {found['se']:.4f}  n={found['n']}")
        for name, value in reliability.items():
            print(f"{name:<24} {value:+.3f}")
        return 0
    return run_cells(cells(config), config.results, config)


if __name__ == "__main__":
    sys.exit(main())
