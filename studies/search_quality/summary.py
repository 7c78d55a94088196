"""summary.json and turn.png, from the lines of results.jsonl and the judge's verdicts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from darts_space import Genotype
from darts_space.derivation import EdgesBy
from nas_kmix.engine import files
from studies.cells import mean_and_error, read_results
from studies.search_quality.judged import genotypes, verdict
from studies.search_quality.pools import genotypes as pool_of

FOLDER = Path(__file__).parent
Line = Mapping[str, Any]


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
        "retraining": _retraining(_by_arm(runs, "retrain/")),
        "finals": {arm: _ranking(lines) for arm, lines in _by_arm(read_results(FOLDER / "pools.jsonl"), "").items()},
        "proxies": _proxies(_by_arm(runs, "proxies/")),
        "gpu": presets.get("gpu", []),
        "quick": _mean([winner["z"] for winner in presets.get("quick", [])], "z"),
    }
    files.write_json(FOLDER / "summary.json", {**whole, "turn": turn, "searches": searches})
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
    """What the gradient's t statistic says at each step: mean and standard error over the seeds.

    z with edges by alpha; where there is one, by removal too.
    """
    readings = [{r["step"]: genotypes(r) for r in line["readings"] if "t" in r} for line in lines]
    steps = sorted(set.intersection(*(set(one) for one in readings)))

    def said(rule: EdgesBy, name: str) -> np.ndarray:
        return np.array([[verdict(one[step][rule])[name] for step in steps] for one in readings])

    z = said("alpha", "z")
    curve = {
        "steps": steps,
        "z_mean": z.mean(0).round(3).tolist(),
        "z_se": _errors(z).round(3).tolist(),
        "pools_mean": said("alpha", "pools_normal").mean(0).round(2).tolist(),
        "n": len(lines),
    }
    if all("removal" in one[step] for one in readings for step in steps):
        z = said("removal", "z")
        curve |= {"removal_z_mean": z.mean(0).round(3).tolist(), "removal_z_se": _errors(z).round(3).tolist()}
    return curve


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
        for name in ("z", "percentile", "percentile_equal_params"):
            values = np.array([one[name] for one in found], dtype=float)[:, None]
            row |= {name: round(float(values.mean()), 2), f"{name}_se": round(float(_errors(values)[0]), 2)}
        rows.append(row)
    return rows


def _winner(line: Line) -> dict[str, Any]:
    """A genotype of search.py and what the judge says of it."""
    found = Genotype.from_json(line["genotype"])
    said = verdict(found)
    names = ("percentile", "percentile_equal_params", "z")
    return {"seed": _seed(line), "genotype": found.to_json(), **{name: round(float(said[name]), 2) for name in names}}


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


def _errors(values: np.ndarray) -> np.ndarray:
    """Standard errors over the first axis; 0 for a single row."""
    return values.std(0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.zeros(values.shape[1])


def _picture(turn: Mapping[str, Any]) -> Figure:
    """z and pools against steps, an arm a line."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for arm, curve in turn.items():
        z, error = np.array(curve["z_mean"]), np.array(curve["z_se"])
        style = {"marker": "o", "markersize": 3, "label": f"{arm} ({curve['n']})"}
        (line,) = above.plot(curve["steps"], z, **style)
        above.fill_between(curve["steps"], z - error, z + error, color=line.get_color(), alpha=0.15)
        below.plot(curve["steps"], curve["pools_mean"], **style)
    above.axhline(0.0, color="grey", linewidth=0.8)
    above.set_ylabel("z among random architectures")
    below.set_ylabel("pools among 8 operations")
    below.set_xlabel("steps of the weights")
    above.legend(fontsize=8, ncols=4)
    return figure
