"""Top-1 accuracy of a run's scorer on the test images, which `search.py` itself never reads.

python -m studies.first_run.evaluate_scorer --run runs/first_run
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from nas_kmix.engine.data import DataConfig, load_data
from nas_kmix.engine.run import Run
from nas_kmix.scorer import load_scorer


@dataclass(frozen=True)
class Config:
    """Which run to evaluate."""

    run: Path
    batch_size: int = 512


@torch.inference_mode()
def main(config: Config) -> None:
    settings = json.loads((config.run / "config.json").read_text())["input"]
    test = load_data(DataConfig(data=settings["data"], image_size=settings["image_size"]), split="test")
    model, test, _ = load_scorer(config.run / "scorer.pt", test, run=Run(config.run, stages=("scorer",)))
    model.eval()
    correct = 0
    for batch in test.batches(np.array_split(np.arange(len(test)), -(-len(test) // config.batch_size))):
        correct += int((model(test.normalise(batch.images)).argmax(dim=1) == batch.labels).sum())
    print(json.dumps({"test_images": len(test), "top1_percent": round(100 * correct / len(test), 2)}))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
