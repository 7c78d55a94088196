"""Did the search earn its cost? Accuracies of the finals in, a verdict with its uncertainty out.

The null hypothesis is that the entry is one more random architecture. If the m controls' accuracies have the standard
deviation s, the entry's less their mean has the standard error s * sqrt(1 + 1/m), and their quotient has Student's t
distribution with m - 1 degrees of freedom. If the null hypothesis holds, "better" and "worse" are each said with
probability 5 % at most.

All accuracies are of images that neither the search nor the finals have used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

LEVEL = 0.05  # on each side
DEMONSTRATION = 4  # with fewer controls than that only enormous differences can be seen

Word = Literal["better than random", "no better than random", "worse than random"]


@dataclass(frozen=True)
class Verdict:
    """`mean` is the entry's accuracy less the controls' mean, in [-1, 1], `se` its standard error, `n` the controls.

    detectable: the smallest difference that would have been called better, or worse.
    """

    word: Word
    mean: float
    se: float
    n: int
    detectable: float


def standard_error(accuracy: float, images: int) -> float:
    """The binomial standard error of one accuracy."""
    return math.sqrt(max(accuracy * (1 - accuracy), 0.0) / images)


def judge(entry: float, controls: Sequence[float], images: int) -> Verdict:
    """Compare the entry's accuracy with those of at least two random controls, all on the same `images` images."""
    m = len(controls)
    if m < 2:
        raise ValueError(f"A verdict needs at least two random controls, not {m}.")
    mean = float(np.mean(controls))
    # One image more of either kind, so that controls which are all right or all wrong leave something uncertain.
    least = standard_error((mean * images + 1) / (images + 2), images)
    spread = max(float(np.std(controls, ddof=1)), least)
    se = spread * math.sqrt(1 + 1 / m)
    from scipy import stats  # late, since it takes half as long to import as torch

    difference, detectable = entry - mean, float(stats.t.ppf(1 - LEVEL, m - 1)) * se
    word: Word = "no better than random"
    if abs(difference) > detectable:
        word = "better than random" if difference > 0 else "worse than random"
    return Verdict(word, difference, se, m, detectable)


def pooled(means: Sequence[float], errors: Sequence[float]) -> tuple[float, float]:
    """The mean difference of independent runs, and its standard error from those of the runs."""
    return float(np.mean(means)), float(np.linalg.norm(errors)) / len(errors)


def in_words(result: dict[str, Any]) -> list[str]:
    """The verdict of a `result.json` in plain words: on the search, on what could be seen, on the winner.

    Raises KeyError, TypeError and ValueError for a result that lacks something.
    """
    winner, entry, random, compared = (result[name] for name in ("winner", "entry", "random", "entry_minus_random"))
    difference = f"{_points(compared['mean'], sign=True)} ± {_points(compared['se'])} points"
    lines = [
        f"The search is {result['verdict']}: its genotype reaches {_points(entry['accuracy'])} %, {random['n']} random "
        f"ones {_points(random['mean'])} ± {_points(random['sd'])} % (difference {difference}, on {result['images']:,} "
        "unused training images)."
    ]
    seen = f"A difference below {_points(compared['detectable'])} points could not have been seen"
    few = f"; with {random['n']} controls this is a demonstration" if random["n"] < DEMONSTRATION else ""
    lines.append(f"{seen}{few}.")
    lead = winner["accuracy"] - entry["accuracy"]
    if winner["genotype"] == entry["genotype"]:
        lines.append("The finals kept the search's own genotype.")
    else:
        lines.append(
            f"The finals chose another genotype ({winner['title']}), {_points(lead, sign=True)} points from the "
            "search's own; this difference is not tested."
        )
    if random["best"] > max(winner["accuracy"], entry["accuracy"]):
        lines.append(f"A random control is ahead of both, with {_points(random['best'])} %.")
    return lines


def _points(share: float, *, sign: bool = False) -> str:
    return f"{100 * share:{'+' if sign else ''}.1f}"
