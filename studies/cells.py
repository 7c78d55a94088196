"""Studies as cells of at most half an hour: each appends a line to a results.jsonl and is skipped from then on."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import SIGTERM, raise_signal
from typing import Any

import numpy as np
import torch
from scipy import stats

from nas_kmix.commands import search
from nas_kmix.engine.compute import environment
from nas_kmix.engine.run import StoppedError

TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h


@dataclass(frozen=True)
class CellConfig:
    """Which cells of a study to run."""

    only: str = ""
    """The cells whose names begin so."""
    minutes: float = 28.0
    """Time for a cell, after which it saves its state and the program ends."""
    device: str = "cpu"
    """cpu, on one thread, or cuda."""

    @property
    def place(self) -> str:
        """The flags of both commands that say where to compute."""
        return f"--threads 1 --device {self.device} --no-report"


def search_once(flags: str, folder: Path, config: CellConfig, data: str | None = None) -> search.Result:
    """Run search.py in `folder`. Raises StoppedError where its time is over."""
    where = f"{config.place} --jobs 2 --cuda-graphs" if config.device == "cuda" else config.place
    given = [] if data is None else ["--data", data]
    return search.run(search.parse([*flags.split(), *given, *where.split(), "--out", str(folder)]))


def mean_and_error(values: Sequence[float], digits: int) -> dict[str, Any]:
    """mean, se (standard error; 0 for a single value) and n."""
    error = float(stats.sem(values)) if len(values) > 1 else 0.0
    return {"mean": round(float(np.mean(values)), digits), "se": round(error, digits), "n": len(values)}


def read_results(path: Path) -> list[dict[str, Any]]:
    """The lines of the cells that are finished, none where the file is not there."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def run_cells(cells: Mapping[str, Callable[[], dict[str, Any]]], results: Path, config: CellConfig) -> int:
    """Run the cells that `results` lacks and whose names begin with `only`, in order; returns an exit code.

    A line is the cell's name, what it returned and where it was made. After `minutes` a cell gets SIGTERM, upon which
    it must save its state and raise StoppedError: the code is then TRY_AGAIN, and the same command goes on.
    """
    for name, work in cells.items():
        if not name.startswith(config.only) or name in {line["cell"] for line in read_results(results)}:
            continue
        print(f"=== {name}", flush=True)
        timer = threading.Timer(60.0 * config.minutes, raise_signal, [SIGTERM])
        timer.daemon = True
        timer.start()
        try:
            found = work()
        except StoppedError:
            print(f"{name} is saved; the same command goes on with it")
            return TRY_AGAIN
        finally:
            timer.cancel()
        where = environment(torch.device(config.device))
        made = {field: where[field] for field in ("packages", "processor", "gpu", "threads", "commit")}
        with open(results, "a", encoding="utf-8") as file:  # several processes may append
            file.write(json.dumps({"cell": name, **found, "made": made}) + "\n")
    return 0
