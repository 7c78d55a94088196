"""From one score per image to the indices of a proxy dataset, class by class (SM eq. 1).

In: scores (N,), highest first, and labels (N,). Out: sorted indices. A class of N_c images contributes
`floor(ratio * N_c + 1/2)` of them, at least one. *Interval* sampling (SM Fig. 3b) walks through the class
in order of score and takes every s-th image, so that the proxy extends below the highest scores;
s = 1 is *top*, and s = 1 / ratio spreads evenly over the class, which is nearly a random choice.

*Coverage*, the default of search.py, and *histogram* are published too, for scores of which a higher one means a harder
image: EL2N, the mean loss, the entropy.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np

DIVISION = 12  # random stream
DROP_HARDEST = 0.5  # by EL2N, for 5 to 20 % of CIFAR-100 (studies/selection); Zheng et al.: .3 for 10 % of CIFAR-10
STRATA = 50  # of `coverage`
BIN_WIDTH = 0.25  # of `histogram`, in powers of ten
DRAWN = ("coverage", "histogram", "random")
Method = Literal["interval", "top", "bottom", "coverage", "histogram", "random"]


def select(
    scores: np.ndarray,
    labels: np.ndarray,
    ratio: float,
    *,
    method: Method = "interval",
    interval: int = 4,
    drop_hardest: float = DROP_HARDEST,
    balanced: bool = True,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Choose a share `ratio` in (0, 1] of the images: int64 indices into `scores`, sorted.

    method: `top` takes the highest scores, `bottom` the lowest, `interval` ranks 0, s, 2s, … of the descending
        order with s = `interval`, and where the class ends goes on at rank 1, then 2. Ties go to the lower index.
        The others need `rng`: `coverage` drops the share `drop_hardest` with the highest scores, then takes equally
        many from every stratum of the rest; `histogram` prefers both tails of the scores, which must not be negative;
        `random` ignores them.
    balanced: class by class; otherwise the whole set counts as one class.

    Raises ValueError for scores that are not finite, unequal lengths, and values out of range.
    """
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    _check(scores, labels, ratio, method, interval, drop_hardest, rng)
    groups = _by_class(labels) if balanced else [np.arange(len(scores))]
    chosen = []
    for members in groups:
        count = max(1, math.floor(ratio * len(members) + 0.5))
        if method == "coverage":
            places = _coverage(scores[members], count, drop_hardest, rng)
        elif method == "histogram":
            places = rng.choice(len(members), size=count, replace=False, p=_tail_probabilities(scores[members]))
        elif method == "random":
            places = rng.permutation(len(members))[:count]
        else:
            # A stable sort of members in ascending order leaves the lower index first among equal scores.
            ranked = np.argsort(scores[members] if method == "bottom" else -scores[members], kind="stable")
            places = ranked[_interval_ranks(len(ranked), interval if method == "interval" else 1)[:count]]
        chosen.append(members[places])
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def split_by_class(
    indices: np.ndarray, labels: np.ndarray, share: float, *, seed: int, both_sides: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Split `indices` (N,) with `labels` (N,) by class into two sorted parts: the rest, and the `share` that is taken.

    This makes the halves of a search and the images held out for validation. Every class gives its share; remainders
    of up to half an image carry over to the next class. With `both_sides`, every class keeps an image on each side, and
    the only image of a class stays; without, the number taken is the share of all images, rounded.
    """
    rng = np.random.default_rng([seed, DIVISION])
    kept, taken, owed = [], [], 0.0
    for group in _by_class(labels):
        members = rng.permutation(indices[group])
        count = 0
        if len(members) > 1 or not both_sides:
            owed += share * len(members)
            least, most = (1, len(members) - 1) if both_sides else (0, len(members))
            count = min(max(round(owed), least), most)
            owed = min(max(owed - count, -0.5), 0.5)  # the next class need not pay for the least that this one gives
        taken.append(members[:count])
        kept.append(members[count:])
    return np.sort(np.concatenate(kept)), np.sort(np.concatenate(taken))


def _by_class(labels: np.ndarray) -> list[np.ndarray]:
    """The places of each class in `labels`, ascending, in the order of the classes."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def _interval_ranks(n: int, step: int) -> np.ndarray:
    """All ranks below `n` in the order 0, s, 2s, …, then 1, 1+s, …, then 2, …"""
    ranks = np.arange(n)
    return np.lexsort((ranks, ranks % step))


def _coverage(scores: np.ndarray, count: int, drop_hardest: float, rng: np.random.Generator) -> np.ndarray:
    """Coverage-centric selection (Zheng et al., ICLR 2023, algorithm 1): `count` places in `scores`.

    The hardest are dropped, as far as enough remain. The range of the other scores is cut into strata of equal width,
    at most one for each image wanted, and the smallest stratum chooses first, at random, an equal share of what is
    still wanted; so what a small one cannot give falls to the larger ones.
    """
    n = len(scores)
    easy = np.argsort(scores, kind="stable")[: max(count, n - math.floor(drop_hardest * n + 0.5))]
    strata = min(STRATA, count)
    low, high = scores[easy[0]], scores[easy[-1]]
    width = (high - low) / strata or 1.0
    stratum = np.minimum((scores[easy] - low) // width, strata - 1)
    chosen: list[int] = []
    sizes = sorted((rng.permutation(easy[stratum == s]) for s in range(strata)), key=len)
    for strata_left, members in zip(range(strata, 0, -1), sizes, strict=True):
        chosen.extend(members[: (count - len(chosen)) // strata_left])
    return np.array(chosen)


def _tail_probabilities(scores: np.ndarray) -> np.ndarray:
    """The probabilities P1 of Na et al. (IJCAI 2021), which favour the sparse bins of a histogram, its two tails.

    Bins are equally wide in the logarithm of the score. One of h images shares the weight max(h) - h + 1 among them.
    """
    smallest = scores[scores > 0].min(initial=1.0)  # zeros are counted with it
    bins = np.floor(np.log10(np.maximum(scores, smallest)) / BIN_WIDTH)
    _, which, sizes = np.unique(bins, return_inverse=True, return_counts=True)
    weights = ((sizes.max() - sizes + 1) / sizes)[which]
    return weights / weights.sum()


def _check(scores, labels, ratio, method, interval, drop_hardest, rng) -> None:
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
    if not 0.0 <= drop_hardest < 1.0:
        raise ValueError(f"drop_hardest is a share of images and must lie in [0, 1), not {drop_hardest}.")
    if method == "histogram" and scores.min() < 0:
        raise ValueError("method 'histogram' takes the logarithm of scores, such as entropies, that are not negative.")
    if method in DRAWN and rng is None:
        raise ValueError(f"method {method!r} needs rng, a numpy.random.Generator.")
