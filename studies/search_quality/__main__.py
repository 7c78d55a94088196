"""How long must a supernet's weights train before alpha means anything, and what does the search then find?

    python -m studies.search_quality --data data/cifar100.npz --only turn          # the cells that results.jsonl lacks
    python -m studies.search_quality --data data/cifar100.npz --only turn/base/0   # one of them
    NAS_KMIX_JUDGE=FOLDER python -m studies.search_quality --summary               # summary.json and the pictures

A cell is one arm and one seed (`arms.py`). It takes five minutes to half an hour of one thread; a GPU runs `--together`
of them at once. A finished cell appends its line to results.jsonl and is skipped from then on. Lines hold tables of
alpha or of its gradient, no verdicts: the judge reads them only for the summary.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from nas_kmix.engine.compute import DeviceConfig, pick_device
from nas_kmix.engine.data import DataConfig, load_data
from studies.cells import append_line, read_results
from studies.search_quality.arms import Cell, cells
from studies.search_quality.training import Halves, random_halves, side_by_side

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Config:
    """Which cells, and where."""

    data: str = "data/cifar100.npz"
    """CIFAR-100 as --data of search.py takes it; the first 150 images of each class are enough for most cells."""
    only: str = ""
    """The cells whose names begin so; several beginnings are separated by commas."""
    results: Path = FOLDER / "results.jsonl"
    device: str = "cpu"
    together: int = 1
    """Cells at once, on a GPU."""
    seconds: float = 1e9
    """After so long no further cell is begun, and unfinished ones are dropped."""
    summary: bool = False
    """Judge what there is, and train nothing."""


def main() -> int:
    config = tyro.cli(Config, description=__doc__)
    if config.summary:
        from studies.search_quality import summary  # needs the judge

        return summary.main(config.results)
    return run(config)


def run(config: Config) -> int:
    """Run the cells that the results lack."""
    began = time.monotonic()
    device = pick_device(DeviceConfig(device=config.device, threads=1))
    data = load_data(DataConfig(data=config.data), device=device)
    chosen = {cell.name: cell for start in config.only.split(",") for cell in cells(start)}
    if not chosen:
        raise SystemExit(f"error: --only {config.only} is the beginning of no cell's name.")
    done = {line["cell"] for line in read_results(config.results)}
    todo = [cell for name, cell in chosen.items() if name not in done]

    def halves(cell: Cell) -> Halves:
        return random_halves(data, cell.setting.weight_images, cell.seed)

    for cell, found in side_by_side(todo, data, halves, config.together):
        append_line(config.results, cell.name, found, device.type)
        print(f"{time.monotonic() - began:6.0f} s  {cell.name}", flush=True)
        if time.monotonic() - began > config.seconds:
            break
    return 0


if __name__ == "__main__":
    sys.exit(main())
