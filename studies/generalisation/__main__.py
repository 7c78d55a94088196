"""Does mixing five images flatten the loss and blunt attacks? The paper's Figure 3 and Table 4 on CIFAR-100, one seed.

    python -m studies.generalisation                          # all cells that results.jsonl lacks, one after the other
    python -m studies.generalisation --only train/plain/0     # one of them
    python -m studies.generalisation --summary                # the tables of the README, from results.jsonl

Four trainings: the small network without mixing and with DCutMix (K=5, alpha .2), and two substitutes of the attacker,
the same network from another seed (grey-box) and a genotype's network (black-box). Then the landscapes of the first
two, on the same 1,000 test images, and FGSM white-box and PGD grey- and black-box on all 10,000. All on one thread.
After --minutes a training or the landscapes save their state and the program ends with code 75; the same command goes
on from there. A trial of everything:

    python -m studies.generalisation --results runs/trial.jsonl --out runs/trial \
        "--train-flags=--limit-steps 2 --epochs 1" "--analysis-flags=--images 20"
"""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro

import train_eval
from nas_kmix.analysis import landscape, robustness
from studies.cells import CellConfig, read_results, run_cells

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results.jsonl"

SMALL = "--backbone small --batch-size 128"
TRAININGS = {
    "plain/0": f"{SMALL} --mix none --epochs 20 --seed 0",
    "dcutmix/0": f"{SMALL} --mix dcutmix --mix-k 5 --mix-alpha 0.2 --epochs 20 --seed 0",
    "plain/1": f"{SMALL} --mix none --epochs 20 --seed 1",
    "genotype/0": "--genotype PC_DARTS_cifar --channels 4 --layers 5 --train-images 25000 --epochs 10 --seed 0",
}
COMPARED = ("plain/0", "dcutmix/0")
SUBSTITUTES = {"white": None, "grey": "plain/1", "black": "genotype/0"}
ATTACKS = {"white": "fgsm", "grey": "pgd", "black": "pgd"}  # as in the paper's Table 4


@dataclass(frozen=True)
class Config(CellConfig):
    """Which cells, on which copy of the data."""

    cifar100: str = "cifar100"
    """CIFAR-100 as --data of train_eval.py takes it."""
    out: Path = Path("runs/generalisation")
    """Folder with the run folders."""
    train_flags: str = ""
    """Further flags of all trainings."""
    analysis_flags: str = ""
    """Further flags of all analyses."""
    results: Path = RESULTS
    """The file of the finished cells; figures are put beside it."""
    summary: bool = False
    """Print the existing results, and compute nothing."""


def folder_of(name: str, config: Config) -> Path:
    return config.out / name.replace("/", "-")


def cells(config: Config) -> dict[str, Callable[[], dict[str, Any]]]:
    """All cells by name, in the order in which they need each other."""
    return {
        **{f"train/{name}": partial(train, name, config) for name in TRAININGS},
        "landscape": partial(look, config),
        **{f"attack/{threat}": partial(attack, threat, config) for threat in SUBSTITUTES},
    }


def train(name: str, config: Config) -> dict[str, Any]:
    command = shlex.split(f"--preset cpu --val-share 0 --eval-every 5 {TRAININGS[name]} {config.train_flags}")
    place = ["--data", config.cifar100, "--out", str(folder_of(name, config)), "--threads", "1"]
    place += ["--device", config.device]
    result = train_eval.run(train_eval.parse([*command, *place]))
    return {"command": ["train_eval.py", *command, *place], **{key: result[key] for key in ("params", "macs", "last")}}


def look(config: Config) -> dict[str, Any]:
    """Both landscapes; the figure and the arrays go beside the results."""
    runs = [str(folder_of(name, config)) for name in COMPARED]
    out = config.out / "landscape"
    command = [*runs, "--out", str(out), *_analysis_flags(config)]
    found = landscape.run(tyro.cli(landscape.Config, args=command))
    for path in (*out.glob("*.npz"), out / "landscape.png"):
        shutil.copyfile(path, config.results.parent / path.name)
    rows = {}
    for name, arrays in found.items():
        noise = arrays["noise"]
        rows[name] = {
            "loss": float(arrays["loss"]),
            "eigenvalues": arrays["eigenvalues"].tolist(),
            "surface_rise": float(arrays["surface"].mean() - arrays["loss"]),
            "slice_rise": float(arrays["slice"].mean() - arrays["loss"]),
            "sigmas": arrays["sigmas"].tolist(),
            "noise_mean": noise.mean(axis=0).tolist(),
            "noise_std": noise.std(axis=0, ddof=1).tolist(),
        }
    return {"command": ["-m", "nas_kmix.analysis.landscape", *command], "landscapes": rows}


def attack(threat: str, config: Config) -> dict[str, Any]:
    runs = [str(folder_of(name, config)) for name in COMPARED]
    command = [*runs, "--attack", ATTACKS[threat], "--images", "0", *_analysis_flags(config)]
    if SUBSTITUTES[threat] is not None:
        command += ["--substitute", str(folder_of(SUBSTITUTES[threat], config))]
    rows = robustness.run(tyro.cli(robustness.Config, args=command))
    return {"command": ["-m", "nas_kmix.analysis.robustness", *command], "rows": rows}


def _analysis_flags(config: Config) -> list[str]:
    return ["--data", config.cifar100, "--threads", "1", "--device", config.device, *shlex.split(config.analysis_flags)]


def summary(results: list[dict[str, Any]]) -> str:
    """Two Markdown tables: the loss around both networks, and their accuracies under attack."""
    found = {line["cell"]: line for line in results}
    lines = []
    if "landscape" in found:
        lines += [
            "| network | loss | eigenvalues | mean rise of the surface | of the slice | loss under noise |",
            "|---|---|---|---|---|---|",
        ]
        for name, row in found["landscape"]["landscapes"].items():
            values = ", ".join(f"{value:.1f}" for value in row["eigenvalues"])
            noise = f"{row['noise_mean'][-1]:.2f} ± {row['noise_std'][-1]:.2f} at σ = {row['sigmas'][-1]:g}"
            rises = f"{row['surface_rise']:.3f} | {row['slice_rise']:.3f}"
            lines.append(f"| {name} | {row['loss']:.3f} | {values} | {rises} | {noise} |")
        lines.append("")
    threats = [threat for threat in SUBSTITUTES if f"attack/{threat}" in found]
    if threats:
        heads = [f"{ATTACKS[threat].upper()} {threat}" for threat in threats]
        lines += [f"| network | clean | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
        tables = [{row["run"]: row for row in found[f"attack/{threat}"]["rows"]} for threat in threats]
        for name, row in tables[0].items():
            shares = [table[name][f"{ATTACKS[threat]}_accuracy"] for threat, table in zip(threats, tables, strict=True)]
            shown = " | ".join(f"{100 * share:.2f} %" for share in (row["clean_accuracy"], *shares))
            lines.append(f"| {name} | {shown} |")
    return "\n".join(lines)


def main() -> int:
    config = tyro.cli(Config, description=__doc__)
    if config.summary:
        print(summary(read_results(config.results)))
        return 0
    return run_cells(cells(config), config.results, config)


if __name__ == "__main__":
    sys.exit(main())
