"""From one score per image to the indices of a proxy dataset, class by class (SM eq. 1).

In: scores (N,), highest first, and labels (N,). Out: sorted indices. A class of N_c images contributes
`floor(ratio * N_c + 1/2)` of them, at least one. *Interval* sampling (SM Fig. 3b) walks through the class
in order of score and takes every s-th image, so that the proxy extends below the highest scores;
s = 1 is *top*, and s = 1 / ratio spreads evenly over the class, which is nearly a random choice.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np

DIVISION = 12  # random stream
Method = Literal["interval", "top", "bottom", "random"]


def select(
    scores: np.ndarray,
    labels: np.ndarray,
    ratio: float,
    *,
    method: Method = "interval",
    interval: int = 4,
    balanced: bool = True,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Choose a share `ratio` in (0, 1] of the images: int64 indices into `scores`, sorted.

    method: `top` takes the highest scores, `bottom` the lowest, `interval` ranks 0, s, 2s, … of the descending
        order with s = `interval`, and after the end of the class continues at rank 1, then 2; `random` (needs `rng`)
        ignores the scores. Ties go to the lower index.
    balanced: class by class; otherwise the whole set counts as one class.

    Raises ValueError for scores that are not finite, unequal lengths, and values out of range.
    """
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    _check(scores, labels, ratio, method, interval, rng)
    groups = [np.arange(len(scores))]
    if balanced:
        by_class = np.argsort(labels, kind="stable")
        groups = np.split(by_class, np.flatnonzero(np.diff(labels[by_class])) + 1)
    chosen = []
    for members in groups:  # indices of one class, ascending
        count = max(1, math.floor(ratio * len(members) + 0.5))
        if method == "random":
            chosen.append(rng.permutation(members)[:count])
            continue
        # A stable sort of members in ascending order leaves the lower index first among equal scores.
        ranked = members[np.argsort(scores[members] if method == "bottom" else -scores[members], kind="stable")]
        step = interval if method == "interval" else 1
        chosen.append(ranked[_interval_ranks(len(ranked), step)[:count]])
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def split_by_class(
    indices: np.ndarray, labels: np.ndarray, share: float, *, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split `indices` (N,) with `labels` (N,) by class into two sorted parts: the rest, and the `share` that is taken.

    This makes the halves of a search and the images held out for validation. Every class gives its share; remainders
    carry over to the next class, so that the totals are off by less than one image. But every class keeps an image on
    each side, and the only image of a class stays.
    """
    rng = np.random.default_rng([seed, DIVISION])
    kept, taken, owed = [], [], 0.0
    for label in np.unique(labels):
        members = rng.permutation(indices[labels == label])
        count = 0
        if len(members) > 1:
            owed += share * len(members)
            count = min(max(round(owed), 1), len(members) - 1)
            owed -= count
        taken.append(members[:count])
        kept.append(members[count:])
    return np.sort(np.concatenate(kept)), np.sort(np.concatenate(taken))


def _interval_ranks(n: int, step: int) -> np.ndarray:
    """All ranks below `n` in the order 0, s, 2s, …, then 1, 1+s, …, then 2, …"""
    ranks = np.arange(n)
    return np.lexsort((ranks, ranks % step))


def _check(scores, labels, ratio, method, interval, rng) -> None:
    if scores.ndim != 1 or labels.shape != scores.shape or len(scores) == 0:
        raise ValueError(
            f"scores and labels must be lists of the same length, at least 1, not {scores.shape} and {labels.shape}."
        )
    if not np.isfinite(scores).all():
        raise ValueError(f"scores[{int(np.flatnonzero(~np.isfinite(scores))[0])}] is not a finite number.")
    if not 0.0 < ratio <= 1.0:
        raise ValueError(f"ratio is the share of images to keep and must lie in (0, 1], not {ratio}.")
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, not {method!r}.")
    if interval < 1:
        raise ValueError(f"interval must be at least 1, not {interval}.")
    if method == "random" and rng is None:
        raise ValueError("method 'random' needs rng, a numpy.random.Generator.")
