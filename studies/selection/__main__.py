"""Which images should a small training set consist of? The paper's Figure 4a and SM Figures 3 and 4 on CIFAR-100.

    python -m studies.selection                               # all cells that results.jsonl lacks, one after the other
    python -m studies.selection --only train/0.05/paper/1     # one of them
    python -m studies.selection --summary                     # summary.json, figures and tables, from results.jsonl

A fifth of the training images is set aside. Each arm (`arms.py`) selects t of all images from the other four fifths; a
small network is trained on them for 200,000 image passes and evaluated on the fifth. A seed fixes scorer, draws, subset
and training together; random images are drawn anew by each seed. Scorers and scores are those of `search.py --preset
cpu` with the arm's flags, and are made if they are missing in --out.

| cell | what it does |
|---|---|
| `train/T/ARM/SEED`, `plain/…` | train on what the arm selects, with DCutMix and without mixing |
| `ablation/ARM/SEED` | the same at t = .05 for single changes of the paper's recipe and of coverage-.7 |
| `reliability/SCORING/SEED` | Spearman's correlation with other draws, with the next seed's scorer; `unmixed`: EL2N |
| `scorer/SCORER/SEED` | both of these by another scorer: coverage over the mean loss |
| `test/T/ARM/SEED` | select from all training images and evaluate on the test images, by seeds that chose nothing |
"""

from __future__ import annotations

import sys
from collections.abc import Callable
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
from nas_kmix.engine.keys import identity, stage_key
from nas_kmix.engine.learner import OptimConfig
from nas_kmix.engine.run import Run
from nas_kmix.engine.training import train
from nas_kmix.mixers import MixConfig, make_mix
from nas_kmix.sampling import select, split_by_class
from nas_kmix.scores import ScoreTable
from studies.cells import CellConfig, run_cells, search_once
from studies.selection import summary
from studies.selection.arms import (
    ABLATION,
    CONFIRMED,
    DEFAULT_SCORING,
    FEW,
    FRESH_SEEDS,
    HALF,
    PRESETS_SCORER,
    RATIOS,
    RIVALS,
    SCORERS,
    SCORINGS,
    SEEDS,
    Arm,
    mean_coverage,
)

PASSES = 200_000
VALIDATION = 0.2
SELECTION = 41  # random stream
AGAIN = 100  # added to the seed of a second scoring


@dataclass(frozen=True)
class Config(CellConfig):
    """Which cells, on which copy of the data."""

    cifar100: str = "data/cifar100.npz"
    """CIFAR-100 as --data of search.py takes it."""
    out: Path = Path("runs/selection")
    """Folder with the scorers and scores."""
    results: Path = summary.RESULTS
    summary: bool = False
    """Summarise the existing results, and train nothing."""


def cells(config: Config) -> dict[str, Callable[[], dict[str, Any]]]:
    """All cells by name; the plain trainings, without mixing, come last."""
    work: dict[str, Callable[[], dict[str, Any]]] = {}
    for scoring in SCORINGS:
        work |= {f"reliability/{scoring}/{seed}": partial(repeat, scoring, seed, config) for seed in SEEDS}
    work |= {f"reliability/unmixed/{seed}": partial(repeat_el2n, seed, config) for seed in SEEDS}
    for kind, mix in (("train", "dcutmix"), ("plain", "none")):
        for ratio in (*RATIOS, HALF):
            for name in RIVALS if ratio < HALF else FEW:
                for seed in SEEDS:
                    cell = f"{kind}/{ratio:g}/{name}/{seed}"
                    work[cell] = partial(train_on_subset, cell, ratio, RIVALS[name], seed, config, mix=mix)
        if kind == "train":
            for seed in SEEDS:
                for name, arm in ABLATION.items():
                    cell = f"ablation/{name}/{seed}"
                    work[cell] = partial(train_on_subset, cell, RATIOS[0], arm, seed, config)
                for name in SCORERS:
                    work[f"scorer/{name}/{seed}"] = partial(try_scorer, name, seed, config)
            for ratio in RATIOS[:2]:
                for name in CONFIRMED:
                    for seed in FRESH_SEEDS:
                        cell = f"test/{ratio:g}/{name}/{seed}"
                        work[cell] = partial(train_on_subset, cell, ratio, RIVALS[name], seed, config, tested=True)
    return work


def scores_of(seed: int, scorer: str, scoring: str, config: Config, *, draws_seed: int | None = None) -> ScoreTable:
    """The scores of one scoring by one scorer of `seed`; both are made if they are missing.

    The draws are those of `draws_seed`, by default of `seed`.
    """
    made = config.out / f"{seed}-{scorer}"
    if not (made / "scorer.pt").exists():
        search_once(f"--preset cpu --seed {seed} --stop-after scorer {SCORERS[scorer]}", made, config, config.cifar100)
    again = "" if draws_seed is None else f"-{draws_seed}"
    folder = config.out / f"{seed}-{scorer}-{scoring}{again}"
    if not (folder / "scores.npz").exists():
        flags = f"--preset cpu --seed {draws_seed or seed} --stop-after scores {SCORINGS[scoring]}"
        search_once(f"{flags} --scorer {made}/scorer.pt", folder, config, config.cifar100)
    return ScoreTable.load(folder / "scores.npz")


def repeat(scoring: str, seed: int, config: Config) -> dict[str, Any]:
    """How well the rankings of one scoring repeat with other draws, and with the next seed's scorer."""
    first = scores_of(seed, PRESETS_SCORER, scoring, config)
    others = {
        "same_scorer": scores_of(seed, PRESETS_SCORER, scoring, config, draws_seed=seed + AGAIN),
        "other_scorer": scores_of(seed % len(SEEDS) + 1, PRESETS_SCORER, scoring, config),
    }
    return {
        measure: {name: _agreement(first, other, measure) for name, other in others.items()}
        for measure in ("cv", "mean")
    }


def repeat_el2n(seed: int, config: Config) -> dict[str, Any]:
    """The same for EL2N, which has no draws."""
    tables = [scores_of(s, PRESETS_SCORER, DEFAULT_SCORING, config) for s in (seed, seed % len(SEEDS) + 1)]
    return {"el2n": {"other_scorer": _agreement(*tables, "el2n")}}


def try_scorer(scorer: str, seed: int, config: Config) -> dict[str, Any]:
    """Reliability of the mean loss by a scorer, agreement with the preset's, what its choice trains, and cost."""
    chosen = mean_coverage(scorer=scorer)
    table = scores_of(seed, scorer, DEFAULT_SCORING, config)
    again = scores_of(seed, scorer, DEFAULT_SCORING, config, draws_seed=seed + AGAIN)
    preset = scores_of(seed, PRESETS_SCORER, DEFAULT_SCORING, config)
    cost = files.read_json(config.out / f"{seed}-{scorer}" / "cost.json")["stages"]["scorer"]
    return {
        "reliability": _agreement(table, again, "mean"),
        "agreement": _agreement(table, preset, "mean"),
        "cost": {name: cost[name] for name in ("images_forward", "images_backward", "wall_s")},
        **train_on_subset(f"scorer/{scorer}/{seed}", RATIOS[0], chosen, seed, config),
    }


def _agreement(table: ScoreTable, other: ScoreTable, measure: str) -> float:
    """Spearman's correlation of two rankings of all images."""
    return round(float(stats.spearmanr(table.measure(measure), other.measure(measure)).statistic), 3)


def train_on_subset(
    cell: str, ratio: float, arm: Arm, seed: int, config: Config, *, mix: str = "dcutmix", tested: bool = False
) -> dict[str, Any]:
    """Select, train, and evaluate on the images that were set aside, or if `tested` on the test images.

    Returns how many images were selected, the share of them that a random selection of the seed also has, accuracy and
    loss; of the test images also the accuracy on those that do not equal a training image.
    """
    compute = pick_compute(DeviceConfig(config.device, threads=1, channels_last=True))
    data = load_data(DataConfig(data=config.cifar100), device=compute.device)
    pool, validation = np.arange(len(data)), np.empty(0, dtype=np.int64)
    if not tested:
        pool, validation = split_by_class(pool, data.labels, VALIDATION, seed=0)
    share = ratio * len(data) / len(pool)
    chosen = pool[_selected(arm, pool, data, share, seed, config)]
    random = pool[_selected(RIVALS["random"], pool, data, share, seed, config)]

    model = build_backbone("small", num_classes=data.num_classes, stem=data.stem, seed=seed).to(compute.device)
    model = compute.layout(model)
    optim = OptimConfig(epochs=round(PASSES / len(chosen)), batch_size=64, lr=0.1, schedule="cosine", weight_decay=5e-4)
    settings = MixConfig("dcutmix") if mix == "dcutmix" else MixConfig("none")
    inputs = {"data": data.fingerprint, "images": files.hash_arrays(chosen)}
    key = stage_key("training", {"cell": cell, **identity(optim), **identity(settings)}, inputs)
    with Run(config.out / cell.replace("/", "-"), stages=("training",), compute=compute) as run:
        train(
            model, data, optim, Augmentation(), mix=make_mix(settings, data.num_classes, model), seed=seed, run=run,
            stage="training", key=key, indices=chosen,
        )  # fmt: skip

    judges, unseen = data, None
    if tested:
        judges = load_data(DataConfig(data=config.cifar100), split="test", device=compute.device, like=data)
        validation, unseen = judges.good(), _unseen(judges, data)
    found = evaluate(model, judges, compute=compute, indices=validation)
    line = {
        "images": len(chosen),
        "shared_with_random": round(float(np.isin(chosen, random).mean()), 4),
        "accuracy": round(found["accuracy"], 4),
        "loss": round(found["loss"], 4),
    }
    if unseen is not None:
        rest = evaluate(model, judges, compute=compute, indices=unseen)
        line |= {"unseen_images": len(unseen), "unseen_accuracy": round(rest["accuracy"], 4)}
    return line


def _selected(arm: Arm, pool: np.ndarray, data: ImageData, share: float, seed: int, config: Config) -> np.ndarray:
    """Places in `pool`, a `share` of it."""
    options = dict(arm.options)
    scores = np.zeros(len(pool))
    if options["method"] != "random":
        table = scores_of(seed, arm.scorer, arm.scoring, config)
        if not table.belongs_to(data):
            raise SystemExit(
                f"error: {config.out} has scores of other images than {config.cifar100}; choose another --out."
            )
        assert np.array_equal(table.index, np.arange(len(data)))
        scores = table.measure(arm.measure)[pool]
    rng = np.random.default_rng([seed, SELECTION])
    return select(scores, data.labels[pool], share, rng=rng, **options)


def _unseen(test: ImageData, train_images: ImageData) -> np.ndarray:
    """The test images that equal no training image."""
    known = {image.tobytes() for image in train_images.source.arrays}
    return np.array([i for i, image in enumerate(test.source.arrays) if image.tobytes() not in known])


def main() -> int:
    config = tyro.cli(Config, description=__doc__)
    return summary.main(config.results) if config.summary else run_cells(cells(config), config.results, config)


if __name__ == "__main__":
    sys.exit(main())
