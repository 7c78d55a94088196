"""summary.json, the tables and selection.png, from the lines of results.jsonl alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from scipy import stats

from nas_kmix.engine import files
from studies.cells import mean_and_error, read_results
from studies.selection.arms import CONFIRMED, DEFAULT, HALF, RATIOS, RIVALS, SCORERS, SCORINGS

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results.jsonl"
HARD = ("hardest", "el2n", "mixed-entropy", "variation-ratio", "forgetting")  # arms that take hard images alone
Line = Mapping[str, Any]
BySeed = Mapping[str, Mapping[int, Line]]


def main(results: Path) -> int:
    found = summary(read_results(results))
    files.write_json(results.parent / "summary.json", found)
    picture(found).savefig(results.parent / "selection.png", dpi=110)
    for title, rows in tables(found).items():
        print(f"\n{title}\n\n" + "\n".join(rows))
    return 0


def summary(lines: Iterable[Line]) -> dict[str, Any]:
    """Accuracies by ratio and arm, their differences from random images, paired by seed, and the reliabilities.

    The keys are ratios, "RATIO without mixing" and "RATIO test" for what the test images say; "order_without_mixing",
    "ablation", "scorers" and "reliability".
    """
    kinds: dict[str, dict[str, dict[int, Line]]] = defaultdict(lambda: defaultdict(dict))
    for line in lines:
        kind, *place, seed = line["cell"].split("/")
        suffix = {"plain": " without mixing", "test": " test"}.get(kind, "")
        table = place[0] + suffix if len(place) > 1 else kind
        kinds[table][place[-1]][int(seed)] = line
    ratios = sorted((name for name in kinds if name[0].isdigit()), key=lambda name: (name.partition(" ")[2], name))
    whole: dict[str, Any] = {name: _compared(kinds[name]) for name in ratios}
    for name in (name for name in ratios if name.endswith("test")):
        whole[name]["unseen"] = {arm: _mean(by_seed, "unseen_accuracy") for arm, by_seed in kinds[name].items()}
    whole["order_without_mixing"] = {
        name: {"all": _order(kinds[name], plain), "without_hard": _order(kinds[name], plain, HARD)}
        for name in (f"{ratio:g}" for ratio in RATIOS)
        if name in kinds and (plain := kinds.get(f"{name} without mixing"))
    }
    whole["ablation"] = {
        arm: {"accuracy": _mean(by_seed, "accuracy"), "shared_with_random": _mean(by_seed, "shared_with_random")}
        for arm, by_seed in (_base_of_ablation(kinds.get("0.05", {})) | kinds["ablation"]).items()
    }
    whole["scorers"] = {name: _scorer(kinds["scorer"][name]) for name in SCORERS if name in kinds["scorer"]}
    whole["reliability"] = _reliability(kinds["reliability"])
    return whole


def _base_of_ablation(arms: BySeed) -> dict[str, Mapping[int, Line]]:
    """The arms at t = .05 that the ablation changes; their first lines lack the overlap."""
    return {name: arms[name] for name in ("random", "paper", "cv-top", "coverage-.7") if name in arms}


def _compared(arms: BySeed) -> dict[str, Any]:
    """The arms of one ratio; `default` is what search.py selects by default, `best_rival` the best of the others."""
    table = _columns(arms, "accuracy")
    rivals = [arm for arm in arms if arm not in (DEFAULT, "random")]
    if rivals:
        strongest = max(rivals, key=lambda arm: table[arm]["mean"])
        table["best_rival"] = {**table[strongest], "arm": strongest}
    for suffix in ("", "_minus_random"):
        if DEFAULT + suffix in table:
            table["default" + suffix] = table[DEFAULT + suffix]
    return {**table, "loss": _columns(arms, "loss")}


def _columns(arms: BySeed, name: str) -> dict[str, Any]:
    """Means of accuracy or loss by arm, and their differences from random images and the default, paired by seed."""
    table = {arm: _mean(by_seed, name) for arm, by_seed in arms.items()}
    for arm, by_seed in arms.items():
        for base, title in (("random", "random"), (DEFAULT, "default")):
            both = sorted(by_seed.keys() & arms.get(base, {}).keys())
            if arm != base and both:
                differences = [by_seed[seed][name] - arms[base][seed][name] for seed in both]
                table[f"{arm}_minus_{title}"] = mean_and_error(differences, 6)
    return table


def _order(mixed: BySeed, plain: BySeed, without: Collection[str] = ()) -> dict[str, Any]:
    """Spearman's correlation of the arms' mean accuracies with and without mixing."""
    arms = [arm for arm in RIVALS if arm in mixed and arm in plain and arm not in without]
    means = [[_mean(kind[arm], "accuracy")["mean"] for arm in arms] for kind in (mixed, plain)]
    return {"value": round(float(stats.spearmanr(*means).statistic), 3), "n": len(arms)}


def _mean(by_seed: Mapping[int, Line], name: str) -> dict[str, Any]:
    """Mean over the seeds whose lines have a value of that name."""
    return mean_and_error((line.get(name) for line in by_seed.values()), 6)


def _scorer(by_seed: Mapping[int, Line]) -> dict[str, Any]:
    cost = [line["cost"] for line in by_seed.values()]
    return {
        **{name: _mean(by_seed, name) for name in ("reliability", "agreement", "accuracy")},
        "cost": {name: float(np.mean([one[name] for one in cost])) for name in cost[0]},
    }


def _reliability(scorings: BySeed) -> dict[str, float]:
    """Mean correlation by scoring, measure and what differs."""
    found = {}
    for scoring, by_seed in scorings.items():
        lines = list(by_seed.values())
        for measure in (name for name in ("cv", "mean", "el2n") if name in lines[0]):
            for other in lines[0][measure]:
                values = [line[measure][other] for line in lines]
                found[f"{scoring} {measure}, {other.replace('_', ' ')}"] = round(float(np.mean(values)), 3)
    return found


def tables(whole: Mapping[str, Any]) -> dict[str, list[str]]:
    """The tables of the README, as lines of Markdown, by their titles."""
    found = {}
    for suffix in ("", " without mixing", " test"):
        ratios = [name for name in whole if name[0].isdigit() and name.partition(" ")[2] == suffix.strip()]
        arms = [arm for arm in RIVALS if any(arm in whole[ratio] for ratio in ratios)]
        if arms:
            arms.sort(key=lambda arm: -whole[ratios[0]].get(arm, {}).get("mean", 0.0))
            rows = [_row(arm, (text for ratio in ratios for text in _cells(whole[ratio], arm))) for arm in arms]
            head = _head("arm", *(title for ratio in ratios for title in (f"t = {ratio}", "less random")))
            found[f"Accuracy{suffix}"] = [*head, *rows]
    rows = [
        _row(arm, (_percent(v["accuracy"]), _percent(v["shared_with_random"]))) for arm, v in whole["ablation"].items()
    ]
    found["Ablation, t = 0.05"] = [*_head("arm", "accuracy", "shared with random"), *rows]
    rows = [
        _row(
            name,
            (
                f"{v['reliability']['mean']:.2f}", f"{v['agreement']['mean']:.2f}", _percent(v["accuracy"]),
                f"{v['cost']['images_backward'] / 1000:,.0f} thousand", f"{v['cost']['wall_s']:.0f} s",
            ),
        )
        for name, v in whole["scorers"].items()
    ]  # fmt: skip
    found["Scorers"] = [*_head("scorer", "reliability", "agreement", "accuracy", "images backward", "time"), *rows]
    kinds = [f"{measure}, {other} scorer" for measure in ("cv", "mean") for other in ("same", "other")]
    reliability = whole["reliability"]
    names = [name for name in SCORINGS if f"{name} {kinds[0]}" in reliability]
    rows = [_row(name, (f"{reliability[f'{name} {kind}']:.2f}" for kind in kinds)) for name in names]
    found["Reliability"] = [*_head("scoring", *kinds), *rows]
    return found


def _head(*titles: str) -> list[str]:
    return ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]


def _row(name: str, values: Iterable[str]) -> str:
    return "| " + " | ".join((name, *values)) + " |"


def _cells(ratio: Mapping[str, Any], arm: str) -> tuple[str, str]:
    return _percent(ratio.get(arm)), _percent(ratio.get(f"{arm}_minus_random"))


def _percent(value: Mapping[str, Any] | None) -> str:
    if not value or not value["n"]:
        return ""
    error = f" ± {100 * value['se']:.1f}" if value["n"] > 1 else ""
    return f"{100 * value['mean']:.1f}{error} ({value['n']})"


def picture(whole: Mapping[str, Any]) -> Figure:
    """Error against the share of the images, with mixing and without, as in the paper's Fig. 4a."""
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    for axes, suffix in zip(figure.subplots(1, 2, sharey=True), ("", " without mixing"), strict=True):
        ratios = [name for name in whole if name[0].isdigit() and name.partition(" ")[2] == suffix.strip()]
        for number, arm in enumerate(RIVALS):
            points = [(float(name.split(" ")[0]), whole[name][arm]) for name in ratios if arm in whole[name]]
            shares = [share for share, _ in points]
            errors = [100 * (1 - value["mean"]) for _, value in points]
            style = {"color": f"C{number % 10}", "ls": ("-", "--", ":")[number // 10], "marker": "."}
            style["lw"] = 2.5 if arm in CONFIRMED else 1
            axes.errorbar(shares, errors, [100 * value["se"] for _, value in points], label=arm, **style)
        axes.set_xscale("log")
        axes.set_xticks([*RATIOS, HALF], [f"{100 * ratio:.0f} %" for ratio in (*RATIOS, HALF)])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("share of the images")
        axes.set_title("without mixing" if suffix else "with DCutMix")
    figure.axes[0].set_ylabel("error on the images set aside (%)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure
