"""The turn: when alpha begins to mean something, from the readings of the cells `turn/ARM/SEED`; tables and picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from darts_space.derivation import EdgesBy
from studies.search_quality.judged import genotypes, verdict

Line = Mapping[str, Any]
RANGES = {"gap": (-0.05, 0.05, 0.15, 0.25, 0.35, 0.5, 0.8), "passes": (3, 6, 9, 12, 16, 20, 25, 40)}


def curve_of(lines: list[Line]) -> dict[str, Any]:
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
        "z_se": errors(z).round(3).tolist(),
        "z_inputs_mean": (z_inputs := said("inputs", "z")).mean(0).round(3).tolist(),
        "z_inputs_se": errors(z_inputs).round(3).tolist(),
        "pools_mean": said("alpha", "pools_normal").mean(0).round(2).tolist(),
        "n": len(lines),
    }


def decided_by(lines: list[Line]) -> dict[str, Any]:
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


def _trained(line: Line) -> list[dict[str, float]]:
    """A row for each reading after step 0: steps, passes and losses; the judge's z, and pools, with edges by alpha.

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


def picture(turn: Mapping[str, Any]) -> Figure:
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


def errors(values: np.ndarray) -> np.ndarray:
    """Standard errors over the first axis; 0 for a single row."""
    return values.std(0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.zeros(values.shape[1])
