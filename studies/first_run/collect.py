"""Gather what a finished run leaves for the record, without any pixels, and measure its scorer on the test images.

    python search.py --preset cpu --data data/cifar100.npz --ratio 0.05 --threads 1 --out runs/first_run
    python -m studies.first_run.collect --run runs/first_run --out studies/first_run

Copies the small files of the run and writes `cv.npz` (CV and, if it was measured, EL2N of every image, float32) and
`results.json`. `search.py` itself never reads a test image; this does, once.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from scipy import stats

from nas_kmix.engine import files
from nas_kmix.engine.data import DataConfig, load_data
from nas_kmix.engine.evaluation import evaluate
from nas_kmix.manifest import ProxyManifest
from nas_kmix.pipeline.scorer import load_scorer
from nas_kmix.scores import ScoreTable

COPIED = (
    "config.json",
    "env.json",
    "proxy.json",
    "genotype.json",
    "genotypes.jsonl",
    "alphas.npz",
    "cost.json",
    "metrics.csv",
)
OF_FINALS = ("candidates.json", "finals.jsonl", "result.json")


@dataclass(frozen=True)
class Config:
    """Which run to gather, and where."""

    run: Path
    out: Path
    batch_size: int = 512


def main(config: Config) -> None:
    config.out.mkdir(parents=True, exist_ok=True)
    proved = OF_FINALS if (config.run / "finals.jsonl").exists() else ()
    for name in (*COPIED, *proved):
        shutil.copyfile(config.run / name, config.out / name)
    settings = files.read_json(config.out / "config.json")
    settings["input"]["data"] = Path(settings["input"]["data"]).name  # its folder means nothing elsewhere
    files.write_json(config.out / "config.json", settings)
    table = ScoreTable.load(config.run / "scores.npz")
    measures = {"cv": table.cv, **table.columns}
    files.write_npz(config.out / "cv.npz", {name: values.astype(np.float32) for name, values in measures.items()})
    proxy = ProxyManifest.load(config.run / "proxy.json")
    chosen = np.isin(table.index, proxy.indices)
    results = {
        "scorer_test_top1_percent": test_accuracy(config),
        "reliability_of_cv": round(table.reliability(), 4),
        "cv_percentiles_0_5_50_95_100": np.percentile(table.cv, [0, 5, 50, 95, 100]).round(4).tolist(),
        "rank_correlation_cv_mean_loss": round(float(stats.spearmanr(table.cv, table.mean).statistic), 4),
        "mean_loss_all": round(float(table.mean.mean()), 4),
        "mean_loss_proxy": round(float(table.mean[chosen].mean()), 4),
    }
    for name, values in measures.items():
        results |= {
            f"{name}_all": round(float(values.mean()), 4),
            f"{name}_proxy": round(float(values[chosen].mean()), 4),
        }
    files.write_json(config.out / "results.json", results)
    print(json.dumps(results, indent=2))


def test_accuracy(config: Config) -> float:
    """Top-1 accuracy of the run's scorer on the test images, in percent."""
    settings = json.loads((config.run / "config.json").read_text())["input"]
    model, test, _ = load_scorer(config.run / "scorer.pt", load_data(DataConfig(**settings), split="test"))
    return round(100 * evaluate(model, test, batch_size=config.batch_size)["accuracy"], 2)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
