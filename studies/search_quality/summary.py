"""summary.json and turn.png, from results.jsonl, runs.jsonl, pools.jsonl and the judge's verdicts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from darts_space import GENOTYPES, Genotype, read_genotype
from nas_kmix.engine import files
from nas_kmix.pipeline.verdict import pooled
from studies.cells import mean_and_error, read_results
from studies.search_quality import controls, turn
from studies.search_quality.judged import NAMES, genotypes, verdict
from studies.search_quality.pools import genotypes as pool_of
from studies.search_quality.whole import CPU_SEEDS

TENTH = ("preset/cpu/", "preset/cpu-paper/", "proxies/high-cv-.1/", "proxies/random-.1/")
PROXY_PAIRS = (
    ("high-cv-.05", "random-.05"),
    ("high-cv-.1", "random-.1"),
    ("low-cv-.05", "random-.05"),
    ("high-cv-.05", "low-cv-.05"),
    ("all", "random-.1"),
)
Line = Mapping[str, Any]


def main(results: Path) -> int:
    """Summarise `results` and the two files beside it, in their folder."""
    folder = results.parent
    lines, runs, pools = (read_results(path) for path in (results, folder / "runs.jsonl", folder / "pools.jsonl"))
    curves = {arm: turn.curve_of(arm_lines) for arm, arm_lines in _by_arm(lines, "turn/").items()}
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
        "finals": {arm: _ranking(found) for arm, found in _by_arm(pools, "").items()},
        "proxies": _proxies(_by_arm(runs, "proxies/")),
        "tenth": _tenth(runs),
        "gpu": presets.get("gpu", []),
        "presets": {name: _spread(found) for name, found in presets.items()},
        "quick": _z(presets.get("quick", [])),
        "cpu_minus_cpu_paper": mean_and_error(_differences(no_finals["winners"], presets.get("cpu-paper", []), "z"), 3),
        "wiring": controls.wiring(),
        "wiring_with_convolutions": controls.wiring(controls.CONVOLUTIONS, controls.CONVOLUTIONS),
        "wiring_with_convolutions_in_normal": controls.wiring(controls.CONVOLUTIONS),
        "published": {name: _said(read_genotype(name)) for name in GENOTYPES},
        "edges": controls.edges([line for line in runs if line["cell"].startswith(("preset/cpu", "proxies/"))]),
    }
    turned = {"turn": curves, "decided_by": turn.decided_by(lines)}
    files.write_json(folder / "summary.json", {**whole, **turned, "searches": searches})
    turn.picture(curves).savefig(folder / "turn.png", dpi=110)
    for arm, curve in curves.items():
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
            row |= {name: round(float(values.mean()), 2), f"{name}_se": round(float(turn.errors(values)[0]), 2)}
        rows.append(row)
    return rows


def _winner(line: Line) -> dict[str, Any]:
    """A genotype of search.py and what the judge says of it; no percentile of equal size where too few are as large."""
    found = Genotype.from_json(line["genotype"])
    return {"seed": _seed(line), "genotype": found.to_json(), **_said(found)}


def _said(genotype: Genotype) -> dict[str, Any]:
    said = verdict(genotype)
    rounded = {name: None if said[name] is None else round(float(said[name]), 2) for name in NAMES}
    return {**rounded, "pools_normal": said["pools_normal"]}


def _spread(winners: list[Line]) -> dict[str, Any]:
    """Mean, standard error, least and largest of what the judge says of several genotypes."""
    columns = {name: [one[name] for one in winners if one[name] is not None] for name in (*NAMES, "pools_normal")}
    return {
        name: {**mean_and_error(values, 3), "min": min(values), "max": max(values)}
        for name, values in columns.items()
        if values
    }


def _z(winners: list[Line]) -> dict[str, Any]:
    """z alone, in the form that the curves of the turn have."""
    found = mean_and_error((one["z"] for one in winners), 3)
    return {"z_mean": found.get("mean"), "z_se": found.get("se"), "n": found["n"]}


def _seed(line: Line) -> int:
    return int(line["cell"].rsplit("/", 1)[1])


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
    """What the finals changed, paired by run: by the judge, and in accuracy on images that chose neither."""
    pairs = [(line["finals"]["winner"], line["finals"]["entry"]) for line in proved]
    judged = [[verdict(Genotype.from_json(one["genotype"])) for one in pair] for pair in pairs]
    return {
        **{name: mean_and_error((_minus(winner[name], entry[name]) for winner, entry in judged), 3) for name in NAMES},
        "accuracy": mean_and_error((winner["accuracy"] - entry["accuracy"] for winner, entry in pairs), 4),
    }


def _minus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _differences(some: list[Line], others: list[Line], column: str) -> list[float | None]:
    """Of a column, paired by seed."""
    by_seed = {one["seed"]: one[column] for one in others}
    return [_minus(one[column], by_seed[one["seed"]]) for one in some if one["seed"] in by_seed]


def _retraining(arms: Mapping[str, list[Line]]) -> dict[str, Any]:
    """Test accuracies after the last epoch of the winners and of controls of equal cost, beside the judge's z.

    The controls are random genotypes, random convolutions on the winners' wiring (wired), and the winners' operations
    on random wirings (rewired). spearman: of accuracy and z, over all of them and over the random ones alone, with p
    values; settled: of the accuracies after ten epochs and after the last.
    """
    found = {arm: sorted(map(_retrained, lines), key=lambda one: one["seed"]) for arm, lines in arms.items()}
    if min(len(found.get(name, [])) for name in ("winner", "random")) < 2:
        return {"n": 0}
    winners = found.pop("winner")
    table: dict[str, Any] = {"winners": winners, **found, "difference": _difference(winners, found["random"])}
    if len(found.get("wired", [])) > 1:
        table["winners_minus_wired"] = _difference(winners, found["wired"])
        table["wired_minus_random"] = _difference(found["wired"], found["random"])
    if len(found.get("rewired", [])) > 1:
        table["winners_minus_rewired"] = _minus_rewired(winners, found["rewired"])
        table["rewired_minus_random"] = _difference(found["rewired"], found["random"])
    spearman = {}
    everyone = [*winners, *(one for ones in found.values() for one in ones)]
    for name, which in (("all", everyone), ("random", found["random"])):
        rank = stats.spearmanr([one["accuracy"] for one in which], [one["z"] for one in which])
        spearman[name] = {"value": round(rank.statistic, 3), "p": float(f"{rank.pvalue:.2g}"), "n": len(which)}
    after_ten = [next(row for row in line["curve"] if row["epoch"] == 9) for lines in arms.values() for line in lines]
    last = [line["last"]["test_accuracy"] for lines in arms.values() for line in lines]
    settled = stats.spearmanr([row["test_accuracy"] for row in after_ten], last).statistic
    return {**table, "spearman": spearman, "settled": round(settled, 3)}


def _minus_rewired(winners: list[Line], rewired: list[Line]) -> dict[str, Any]:
    """How much worse the operations of a winner do on random wirings: the mean over its wirings, paired by winner."""
    differences = []
    for winner in winners:
        number = CPU_SEEDS.index(winner["seed"])
        own = [one["accuracy"] for one in rewired if one["seed"] % len(CPU_SEEDS) == number]
        differences += [winner["accuracy"] - np.mean(own)] if own else []
    return mean_and_error(differences, 5)


def _difference(some: list[Line], others: list[Line]) -> dict[str, Any]:
    """Of the mean accuracies, with the standard error of two independent samples."""
    one, other = ([line["accuracy"] for line in lines] for lines in (some, others))
    error = np.sqrt(np.var(one, ddof=1) / len(one) + np.var(other, ddof=1) / len(other))
    counts = {"n": len(one), "n_others": len(other)}
    return {"mean": round(float(np.mean(one) - np.mean(other)), 5), "se": round(float(error), 5), **counts}


def _retrained(line: Line) -> dict[str, Any]:
    text = line["command"][line["command"].index("--genotype") + 1]
    z = round(verdict(Genotype.from_text(text))["z"], 3)
    return {"seed": _seed(line), "macs": line["macs"], "accuracy": line["last"]["test_accuracy"], "z": z}


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
    """What the judge says by kind of proxy, and differences of two kinds, paired by seed."""
    found = {arm: [_winner(line) for line in lines] for arm, lines in arms.items()}
    table: dict[str, Any] = {arm: {**_z(winners), **_spread(winners)} for arm, winners in found.items()}
    high_cv = []
    for one, other in PROXY_PAIRS:
        if one in found and other in found:
            differences = {
                name: _differences(found[one], found[other], name) for name in ("z", "percentile_equal_params")
            }
            table[f"{one} minus {other}"] = {name: mean_and_error(values, 3) for name, values in differences.items()}
            if other.startswith("random"):
                table[one]["minus_random"] = mean_and_error(differences["z"], 3)
                high_cv += differences["z"] if one.startswith("high-cv") else []
    return {**table, "high-cv minus random": mean_and_error(high_cv, 3)}


def _tenth(runs: list[Line]) -> dict[str, Any]:
    """The searches on a tenth of CIFAR-100: their z, and how many operations of their normal cells are convolutions."""
    found = [_winner(line) for line in runs if line["cell"].startswith(TENTH)]
    operations = [name for one in found for name, _ in Genotype.from_json(one["genotype"]).normal]
    convolutions = sum(name in controls.CONVOLUTIONS for name in operations)
    z = mean_and_error((one["z"] for one in found), 3)
    return {"z": z, "operations": len(operations), "convolutions": convolutions}
