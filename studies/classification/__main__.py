"""Train any cells of the paper's Tables 1-3 and SM Tables 1 and 2, over seeds, and print them beside the paper's.

    python -m studies.classification --list
    python -m studies.classification --cells "table2-*" --seeds 0 1 2 --out runs/table2
    python -m studies.classification --cells "table2-wrn16-8-*" --out runs/try -- --data data/cifar100.npz --epochs 2

A cell is a preset of train_eval.py (see nas_kmix/paper_tables.py); flags after `--` go to every one of its runs. Every
cell and seed has a folder CELL/seed-N of its own in --out, so that the same command resumes where it was stopped, and
one with more cells or seeds trains only those. The table of the cells that were named goes to the output and, with all
figures behind it, to results.json.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path

import tyro

import train_eval
from nas_kmix.engine import cli, files
from nas_kmix.paper_tables import PAPER


@dataclass(frozen=True)
class Config:
    """Which cells to run."""

    cells: tuple[str, ...] = ("*",)
    """Names of cells or patterns such as table2-*."""
    seeds: tuple[int, ...] = (0, 1, 2)
    out: Path = Path("runs/classification")
    list: bool = False
    """Print the chosen cells with the paper's errors, and train nothing."""


@dataclass(frozen=True)
class Row:
    """One cell as it was found: an error in per cent and training seconds of every seed."""

    cell: str
    paper: float
    errors: tuple[float, ...]
    seconds: tuple[float, ...]
    time_ratio: float | None
    """Over the cell without mixing, mean by mean, where that is named too."""
    paper_time_ratio: float | None


def chosen(patterns: Sequence[str]) -> list[str]:
    """The names of the cells that match any pattern, in the order of the tables. Raises ValueError if one has none."""
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in PAPER):
            raise ValueError(f"--cells {pattern} is no cell of the paper's tables; --list shows them all.")
    return [name for name in PAPER if any(fnmatch(name, pattern) for pattern in patterns)]


def run(config: Config, flags: Sequence[str] = ()) -> list[Row]:
    """Train what is not there yet and return all rows; `flags` are for train_eval.py.

    Raises what `train_eval.run` does.
    """
    found = {}
    for name in chosen(config.cells):
        for seed in config.seeds:
            folder = config.out / name / f"seed-{seed}"
            command = ["--preset", name, "--seed", str(seed), "--out", str(folder), *flags]
            found[name, seed] = train_eval.run(train_eval.parse(command))
        rows = _rows(config, found)
        files.write_json(config.out / "results.json", {"flags": list(flags), "rows": [asdict(row) for row in rows]})
    return rows


def _rows(config: Config, found: dict) -> list[Row]:
    cells = dict.fromkeys(name for name, _ in found)
    seconds = {name: tuple(found[name, seed]["train_s"] for seed in config.seeds) for name in cells}
    rows = []
    for name in cells:
        cell = PAPER[name]
        errors = tuple(_error(found[name, seed]["last"]) for seed in config.seeds)
        ratio = None
        if cell.baseline in seconds:
            ratio = statistics.mean(seconds[name]) / statistics.mean(seconds[cell.baseline])
        rows.append(Row(name, cell.error, errors, seconds[name], ratio, cell.time_ratio))
    return rows


def _error(metrics: dict[str, float]) -> float:
    """Top-1 error of the last epoch in per cent, on the test images where there are any (ImageNet has val alone)."""
    split = "test" if "test_accuracy" in metrics else "val"
    return 100.0 * (1.0 - metrics[f"{split}_accuracy"])


def table(rows: Sequence[Row]) -> str:
    """Rows as text: mean ± standard deviation over the seeds beside the paper's, times in parentheses as in Table 2."""
    lines = [f"{'cell':<42}{'error %':>16}{'paper':>8}{'time':>9}{'paper':>9}"]
    for row in rows:
        spread = f" ± {statistics.stdev(row.errors):.2f}" if len(row.errors) > 1 else ""
        times = ["" if value is None else f"({value:.2f}x)" for value in (row.time_ratio, row.paper_time_ratio)]
        error = f"{statistics.mean(row.errors):.2f}{spread}"
        lines.append(f"{row.cell:<42}{error:>16}{row.paper:>8.2f}{times[0]:>9}{times[1]:>9}".rstrip())
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes as of train_eval.py."""
    argv = list(sys.argv[1:] if argv is None else argv)
    at = argv.index("--") if "--" in argv else len(argv)
    config, flags = tyro.cli(Config, args=argv[:at], description=__doc__), argv[at + 1 :]

    def work() -> None:
        if config.list:
            for name in chosen(config.cells):
                print(f"{name:<42}{PAPER[name].doc}")
        else:
            print(table(run(config, flags)))

    return cli.exit_code(work, lambda error: "Choose another --out for other flags.")


if __name__ == "__main__":
    sys.exit(main())
