"""Studies as cells of at most half an hour: each appends a line to a results.jsonl and is skipped from then on."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import SIGTERM, raise_signal, signal
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


def mean_and_error(values: Iterable[float | None], digits: int) -> dict[str, Any]:
    """mean, se (standard error; 0 for a single value) and n of the values that are there; n alone where none is."""
    there = [float(value) for value in values if value is not None]
    if not there:
        return {"n": 0}
    error = float(stats.sem(there)) if len(there) > 1 else 0.0
    return {"mean": round(float(np.mean(there)), digits), "se": round(error, digits), "n": len(there)}


def read_results(path: Path) -> list[dict[str, Any]]:
    """The lines of the cells that are finished, none where the file is not there."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def append_line(results: Path, cell: str, found: Mapping[str, Any], device: str) -> None:
    """Append the line of a finished cell: its name, what it found and where it was made."""
    where = environment(torch.device(device))
    made = {field: where[field] for field in ("packages", "processor", "gpu", "threads", "commit")}
    with open(results, "a", encoding="utf-8") as file:  # several processes may append
        file.write(json.dumps({"cell": cell, **found, "made": made}) + "\n")


def run_cells(cells: Mapping[str, Callable[[], dict[str, Any]]], results: Path, config: CellConfig) -> int:
    """Run the cells that `results` lacks and whose names begin with `only`, in order; returns an exit code.

    After `minutes` a cell is asked to stop. If it saves its state, the code is TRY_AGAIN and the same command goes on;
    otherwise it is 143. Raises SystemExit if no name begins with `only`.
    """
    chosen = {name: work for name, work in cells.items() if name.startswith(config.only)}
    if not chosen:
        raise SystemExit(f"error: --only {config.only} is the beginning of no cell's name.")
    for name, work in chosen.items():
        if name in {line["cell"] for line in read_results(results)}:
            continue
        print(f"=== {name}", flush=True)
        try:
            with _time_limit(config.minutes):
                found = work()
        except StoppedError as stopped:
            if stopped.saved:
                print(f"{name} is saved; the same command goes on with it")
            else:
                print(f"error: {name} was stopped and is not finished; it needs more --minutes.", file=sys.stderr)
            return TRY_AGAIN if stopped.saved and stopped.signum == SIGTERM else 128 + stopped.signum
        append_line(results, name, found, config.device)
    return 0


@contextmanager
def _time_limit(minutes: float) -> Iterator[None]:
    """After so long, SIGTERM; where nothing takes it for a request to save, StoppedError ends the work."""

    def stop(signum: int, _: object) -> None:
        raise StoppedError(signum, saved=False)

    before = signal(SIGTERM, stop)
    timer = threading.Timer(60.0 * minutes, raise_signal, [SIGTERM])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        signal(SIGTERM, before)
