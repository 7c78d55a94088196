"""summary.json and turn.png, from the lines of results.jsonl and the judge's verdicts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from nas_kmix.engine import files
from studies.cells import read_results
from studies.search_quality.judged import genotype, unpacked, verdict

FOLDER = Path(__file__).parent
Line = Mapping[str, Any]


def main(results: Path) -> int:
    lines = read_results(results)
    turn = {arm: _curve(arm_lines) for arm, arm_lines in _by_arm(lines, "turn/").items()}
    searches = {arm: _searches(arm_lines) for arm, arm_lines in _by_arm(lines, "search/").items()}
    files.write_json(FOLDER / "summary.json", {"turn": turn, "searches": searches})
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
    """What the gradient's t statistic, edges by alpha, says at each step: mean and standard error over the seeds."""
    verdicts = []
    for line in lines:
        readings = (reading for reading in line["readings"] if "t" in reading)
        verdicts.append({r["step"]: verdict(genotype(unpacked(r["t"]), "alpha")) for r in readings})
    steps = sorted(set.intersection(*(set(one) for one in verdicts)))
    z, pools = (np.array([[one[step][name] for step in steps] for one in verdicts]) for name in ("z", "pools_normal"))
    return {
        "steps": steps,
        "z_mean": z.mean(0).round(3).tolist(),
        "z_se": _errors(z).round(3).tolist(),
        "pools_mean": pools.mean(0).round(2).tolist(),
        "n": len(lines),
    }


def _searches(lines: list[Line]) -> list[dict[str, Any]]:
    """Bilevel searches by length of the rest, rate, architecture steps and choice of edges."""
    groups = defaultdict(list)
    for line in lines:
        for reading in line["readings"]:
            if "alpha" in reading:
                place = reading["step"], reading["arch_lr"], reading["arch_step"]
                for edges_by in ("alpha", "alpha-beta"):
                    found = genotype(unpacked(reading["alpha"]), edges_by)
                    groups[(*place, edges_by)].append(verdict(found))
    rows = []
    for (rest, rate, arch_step, edges_by), found in sorted(groups.items()):
        row = {"rest_steps": rest, "arch_lr": rate, "arch_steps": arch_step, "edges_by": edges_by, "n": len(found)}
        for name in ("z", "percentile", "percentile_equal_params"):
            values = np.array([one[name] for one in found], dtype=float)[:, None]
            row |= {name: round(float(values.mean()), 2), f"{name}_se": round(float(_errors(values)[0]), 2)}
        rows.append(row)
    return rows


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
