"""summary.json and turn.png, from the lines of results.jsonl and the judge's verdicts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats

from darts_space import ARCHITECTURE_NAMES, Genotype, derive
from darts_space.derivation import EdgesBy
from nas_kmix.engine import files
from nas_kmix.pipeline.verdict import pooled
from studies.cells import mean_and_error, read_results
from studies.search_quality.judged import genotypes, unpacked, verdict
from studies.search_quality.pools import genotypes as pool_of

FOLDER = Path(__file__).parent
NAMES = ("percentile", "percentile_equal_params", "z")
DRAWS, EDGE_DRAWS = 1000, 10  # of random operations, and of random edges for every run
Line = Mapping[str, Any]
RANGES = {"gap": (-0.05, 0.05, 0.15, 0.25, 0.35, 0.5, 0.8), "passes": (3, 6, 9, 12, 16, 20, 25, 40)}


def main(results: Path) -> int:
    lines, runs = read_results(results), read_results(FOLDER / "runs.jsonl")
    turn = {arm: _curve(arm_lines) for arm, arm_lines in _by_arm(lines, "turn/").items()}
    searches = {arm: _searches(arm_lines) for arm, arm_lines in _by_arm(lines, "search/").items()}
    presets = {name: [_winner(line) for line in found] for name, found in _by_arm(runs, "preset/").items()}
    proved = _by_arm(runs, "proved/").get("cpu", [])
    no_finals = {"winners": presets.get("cpu", []), "cost": _cost(runs, "preset/cpu/")}
    with_finals = {"winners": [_winner(line) for line in proved], "cost": _cost(runs, "proved/cpu/")}
    whole = {
        **(with_finals if proved else no_finals),
        "no_finals": no_finals,
        "verdicts": [{"seed": _seed(line), **_verdict(line["finals"])} for line in proved],
        "pooled_verdict": _pooled(proved),
        "winner_minus_entry": _winner_minus_entry(proved),
        "retraining": _retraining(_by_arm(runs, "retrain/")),
        "finals": {arm: _ranking(lines) for arm, lines in _by_arm(read_results(FOLDER / "pools.jsonl"), "").items()},
        "proxies": _proxies(_by_arm(runs, "proxies/")),
        "gpu": presets.get("gpu", []),
        "quick": _mean([winner["z"] for winner in presets.get("quick", [])], "z"),
        "wiring": _wiring(),
        "edges": _edges([line for line in runs if line["cell"].startswith(("preset/cpu", "proxies/"))]),
    }
    decided_by = _decided_by(lines)
    files.write_json(FOLDER / "summary.json", {**whole, "turn": turn, "decided_by": decided_by, "searches": searches})
    _picture(turn).savefig(FOLDER / "turn.png", dpi=110)
    for arm, curve in turn.items():
        print(
            f"{arm:<18} n={curve['n']}",
            *(f"{s}:{z:+.1f}" for s, z in zip(curve["steps"], curve["z_mean"], strict=True)),
        )
    for arm, rows in searches.items():
        for row in rows:
            print(f"{arm:<18}", *(f"{name} {value}" for name, value in row.items()))
    return 0


def _by_arm(lines: Iterable[Line], start: str) -> dict[str, list[Line]]:
    arms = defaultdict(list)
    for line in lines:
        if line["cell"].startswith(start):
            arms[line["cell"].removeprefix(start).rsplit("/", 1)[0]].append(line)
    return dict(arms)


def _curve(lines: list[Line]) -> dict[str, Any]:
    """What the gradient's t statistic says at each step: mean and standard error over the seeds, with edges by alpha.

    passes: over the images of the weights. gap: see `_trained`; none before the first step.
    """
    readings = [{r["step"]: genotypes(r) for r in line["readings"] if "t" in r} for line in lines]
    steps = sorted(set.intersection(*(set(one) for one in readings)))

    def said(rule: EdgesBy, name: str) -> np.ndarray:
        return np.array([[verdict(one[step][rule])[name] for step in steps] for one in readings])

    z = said("alpha", "z")
    setting = lines[0]["setting"]
    return {
        "steps": steps,
        "passes": [round(step * setting["batch"] / setting["weight_images"], 2) for step in steps],
        "gap_mean": np.mean([[one["gap"] for one in _trained(line)] for line in lines], 0).round(3).tolist(),
        "z_mean": z.mean(0).round(3).tolist(),
        "z_se": _errors(z).round(3).tolist(),
        "z_inputs_mean": (z_inputs := said("inputs", "z")).mean(0).round(3).tolist(),
        "z_inputs_se": _errors(z_inputs).round(3).tolist(),
        "pools_mean": said("alpha", "pools_normal").mean(0).round(2).tolist(),
        "n": len(lines),
    }


def _trained(line: Line) -> list[dict[str, float]]:
    """What may decide the turn, and z and pools with edges by alpha, at the readings of a line after step 0.

    gap: how far the loss of the architecture's half lies above the training loss of the steps since the last reading.
    """
    setting = line["setting"]
    rows = []
    for r in line["readings"]:
        if "loss" in r and "t" in r:
            said = verdict(genotypes(r)["alpha"])
            rows.append(
                {
                    "steps": r["step"],
                    "passes": r["step"] * setting["batch"] / setting["weight_images"],
                    "train_loss": r["loss"],
                    "held_out_loss": r["val_loss"],
                    "gap": r["val_loss"] - r["loss"],
                    "z": said["z"],
                    "pools": said["pools_normal"],
                }
            )
    return rows


def _decided_by(lines: list[Line]) -> dict[str, Any]:
    """Over all readings of the turn: Spearman's correlation with the pools, and means of z and pools by range."""
    rows = [row for line in lines if line["cell"].startswith("turn/") for row in _trained(line)]
    if not rows:
        return {"n": 0}
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    z, pools = columns.pop("z"), columns.pop("pools")
    correlations = {name: stats.spearmanr(values, pools).statistic for name, values in columns.items()}
    table: dict[str, Any] = {
        "n": len(rows),
        "correlation_with_pools": {name: round(float(value), 3) for name, value in correlations.items()},
    }
    for name, ends in RANGES.items():
        which = np.searchsorted(ends, columns[name])
        table[name] = [
            {
                "to": [*ends, None][i],
                "pools": round(float(pools[which == i].mean()), 2),
                "z": round(float(z[which == i].mean()), 2),
                "n": int((which == i).sum()),
            }
            for i in range(len(ends) + 1)
            if (which == i).any()
        ]
    return table


def _searches(lines: list[Line]) -> list[dict[str, Any]]:
    """Bilevel searches by length of the rest, rate, architecture steps and choice of edges."""
    groups = defaultdict(list)
    for line in lines:
        for reading in line["readings"]:
            if "alpha" in reading:
                place = reading["step"], reading["arch_lr"], reading["arch_step"]
                for edges_by, found in genotypes(reading).items():
                    groups[(*place, edges_by)].append(verdict(found))
    rows = []
    for (rest, rate, arch_step, edges_by), found in sorted(groups.items()):
        row = {"rest_steps": rest, "arch_lr": rate, "arch_steps": arch_step, "edges_by": edges_by, "n": len(found)}
        for name in NAMES:
            values = np.array([one[name] for one in found], dtype=float)[:, None]
            row |= {name: round(float(values.mean()), 2), f"{name}_se": round(float(_errors(values)[0]), 2)}
        rows.append(row)
    return rows


def _winner(line: Line) -> dict[str, Any]:
    """A genotype of search.py and what the judge says of it."""
    found = Genotype.from_json(line["genotype"])
    said = verdict(found)
    return {"seed": _seed(line), "genotype": found.to_json(), **{name: round(float(said[name]), 2) for name in NAMES}}


def _seed(line: Line) -> int:
    return int(line["cell"].rsplit("/", 1)[1])


def _mean(values: list[float], name: str) -> dict[str, Any]:
    """Mean and standard error of a column."""
    if not values:
        return {"n": 0}
    found = mean_and_error(values, 3)
    return {f"{name}_mean": found["mean"], f"{name}_se": found["se"], "n": found["n"]}


def _cost(runs: list[Line], start: str) -> dict[str, Any]:
    """Image passes of the preset cpu, mean over these runs, and the minutes that they take at the measured rates."""
    whole = [line["cost"] for line in runs if line["cell"].startswith(start)]
    rates = {stage: cost for line in runs if line["cell"] == "rates" for stage, cost in line["cost"].items()}
    stages = {}
    for stage in whole[0] if whole else ():
        passes = {
            name: float(np.mean([cost[stage][name] for cost in whole]))
            for name in ("images_forward", "images_backward")
        }
        stages[stage] = passes
        if stage in rates:
            per_image = rates[stage]["wall_s"] / max(1, rates[stage]["images_forward"])
            stages[stage] = {**passes, "minutes_one_thread": round(passes["images_forward"] * per_image / 60, 2)}
    return stages


def _verdict(result: Mapping[str, Any]) -> dict[str, Any]:
    """What result.json says of the entry among random architectures."""
    return {"verdict": result["verdict"], **result["entry_minus_random"]}


def _pooled(proved: list[Line]) -> dict[str, Any]:
    """The mean difference of entries and random controls, and its standard error from those of the runs."""
    differences = [line["finals"]["entry_minus_random"] for line in proved]
    if not differences:
        return {"n": 0}
    mean, error = pooled([one["mean"] for one in differences], [one["se"] for one in differences])
    return {"mean": round(mean, 5), "se": round(error, 5), "n": len(differences)}


def _winner_minus_entry(proved: list[Line]) -> dict[str, Any]:
    """What the finals changed, by the judge: paired by run."""
    pairs = [
        [verdict(Genotype.from_json(line["finals"][one]["genotype"])) for one in ("winner", "entry")] for line in proved
    ]
    return {name: mean_and_error([winner[name] - entry[name] for winner, entry in pairs], 3) for name in NAMES if pairs}


def _retraining(arms: Mapping[str, list[Line]]) -> dict[str, Any]:
    """Test accuracies after the last epoch of the winners and of random genotypes of equal cost."""
    found = {
        name: [{"macs": line["macs"], "accuracy": line["last"]["test_accuracy"]} for line in lines]
        for name, lines in arms.items()
    }
    winners, random = ([one["accuracy"] for one in found.get(name, [])] for name in ("winner", "random"))
    if min(len(winners), len(random)) < 2:
        return {"n": 0}
    error = np.sqrt(np.var(winners, ddof=1) / len(winners) + np.var(random, ddof=1) / len(random))
    difference = {"mean": float(np.mean(winners) - np.mean(random)), "se": float(error), "n": len(winners)}
    return {"winners": found["winner"], "random": found["random"], "difference": difference}


def _ranking(lines: list[Line]) -> dict[str, Any]:
    """How finals of one arm rank pools of random genotypes, beside the judge; means over the pools."""
    found: dict[str, Any] = {"n": len(lines)}
    for criterion, sign in (("accuracy", 1), ("loss", -1), ("train_loss", -1)):
        rows = []
        for line in lines:
            judged = [verdict(genotype) for genotype in pool_of(_seed(line))]
            values = sign * np.array(line[criterion])
            pick = judged[int(values.argmax())]
            rank = stats.spearmanr(values, [one["z"] for one in judged]).statistic
            rows.append((rank, pick["percentile"], pick["percentile_equal_params"]))
        names = ("spearman", "percentile_of_pick", "percentile_of_pick_equal_params")
        columns = zip(names, zip(*rows, strict=True), strict=True)
        found[criterion] = {name: mean_and_error(values, 3) for name, values in columns}
    return {**{name: found["accuracy"][name]["mean"] for name in ("spearman", "percentile_of_pick")}, **found}


def _proxies(arms: Mapping[str, list[Line]]) -> dict[str, Any]:
    """z by kind of proxy, and its difference from random images of the same number, paired by seed."""
    z = {arm: {_seed(line): _winner(line)["z"] for line in lines} for arm, lines in arms.items()}
    table = {}
    for arm, by_seed in z.items():
        table[arm] = _mean(list(by_seed.values()), "z")
        random = z.get(f"random-{arm.rsplit('-', 1)[-1]}", {})
        both = sorted(by_seed.keys() & random.keys())
        if both and not arm.startswith("random"):
            differences = [by_seed[seed] - random[seed] for seed in both]
            table[arm]["minus_random"] = mean_and_error(differences, 3)
    return table


def _wiring() -> dict[str, Any]:
    """Random operations on the wiring that `--edges-by inputs` prescribes."""
    rng = np.random.default_rng(0)
    tables = {name: torch.zeros(14, 8) if name.startswith("alpha") else torch.zeros(14) for name in ARCHITECTURE_NAMES}
    said = []
    for _ in range(DRAWS):
        for name in ("alphas_normal", "alphas_reduce"):
            tables[name] = torch.from_numpy(rng.random((14, 8)))
        said.append(verdict(derive(**tables, edges_by="inputs")))
    # Few random architectures are as large as some of them, so that they have no percentile among those.
    return {name: mean_and_error([one[name] for one in said if one[name] is not None], 3) for name in NAMES}


def _edges(runs: list[Line]) -> dict[str, Any]:
    """What other choices of edges would have made of the last records; alpha chooses the operations in all of them.

    less_random: the difference from edges drawn at random, paired by run.
    """
    rng = np.random.default_rng(0)
    z: dict[str, list[float]] = defaultdict(list)
    for line in runs:
        last = line["records"][-1]
        for rule, found in genotypes(last).items():
            z[rule].append(verdict(found)["z"])
        tables = dict(zip(ARCHITECTURE_NAMES, unpacked(last["alpha"]), strict=True))
        draws = [(torch.from_numpy(rng.random(14)), torch.from_numpy(rng.random(14))) for _ in range(EDGE_DRAWS)]
        random = [verdict(derive(**tables, edges_by="removal", removal=edges))["z"] for edges in draws]
        z["random"].append(float(np.mean(random)))
    table: dict[str, Any] = {rule: mean_and_error(values, 3) for rule, values in z.items()}
    for rule in z.keys() - {"random"}:
        if len(z[rule]) == len(z["random"]):
            table[rule]["less_random"] = mean_and_error(np.subtract(z[rule], z["random"]).tolist(), 3)
    return table


def _errors(values: np.ndarray) -> np.ndarray:
    """Standard errors over the first axis; 0 for a single row."""
    return values.std(0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.zeros(values.shape[1])


def _picture(turn: Mapping[str, Any]) -> Figure:
    """z and pools against steps, and pools against passes and the gap, an arm a line."""
    figure = Figure(figsize=(12, 9), layout="constrained")
    (z_axes, pools_axes), (passes_axes, gap_axes) = figure.subplots(2, 2)
    for number, (arm, curve) in enumerate(turn.items()):
        z, error, steps = (np.array(curve[name]) for name in ("z_mean", "z_se", "steps"))
        color = f"C{number % 10}"
        style = {"marker": "os"[number // 10], "markersize": 3, "color": color, "label": f"{arm} ({curve['n']})"}
        z_axes.plot(steps, z, **style)
        z_axes.fill_between(steps, z - error, z + error, color=color, alpha=0.15)
        pools_axes.plot(steps, curve["pools_mean"], **style)
        first = len(steps) - len(curve["gap_mean"])  # reading after step 0
        passes_axes.plot(curve["passes"][first:], curve["pools_mean"][first:], **style)
        gap_axes.plot(curve["gap_mean"], curve["pools_mean"][first:], **style)
    z_axes.axhline(0.0, color="grey", linewidth=0.8)
    z_axes.set_ylabel("z among random architectures")
    for axes in (pools_axes, passes_axes, gap_axes):
        axes.set_ylabel("pools among 8 operations")
    for axes in (z_axes, pools_axes):
        axes.set_xlabel("steps of the weights")
    passes_axes.set_xlabel("passes over the images of the weights")
    passes_axes.set_xscale("log")
    gap_axes.set_xlabel("held-out loss less training loss")
    z_axes.legend(fontsize=8, ncols=3)
    return figure
