"""Stage three: which images make the proxy dataset. Scores and labels in, a `ProxyManifest` out."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Annotated

import numpy as np
import tyro

from nas_kmix.engine.data import ImageData
from nas_kmix.engine.sources import BadImageError
from nas_kmix.manifest import ProxyManifest, paths_of
from nas_kmix.sampling import DROP_HARDEST, Method, select, split_by_class
from nas_kmix.scores import NOT_HARDNESS, Measure, ScoreTable

SELECTION = 11  # random stream


@dataclass(frozen=True)
class ProxyConfig:
    """Which images make the proxy. The defaults are what trained best on CIFAR-100 (studies/selection)."""

    ratio: float = 0.1
    """t, the share of each class to keep, in (0, 1]."""
    measure: Measure = "el2n"
    """What ranks the images; studies/selection chose it and --method. el2n: length of the error vector of the unmixed
    image (Paul et al., NeurIPS 2021) | cv (the paper's), mean, std: of its losses under mixing | residual: the CV less
    what the mean explains of it in the class | forgetting needs --scorer.forgetting, the others --scoring.baselines."""
    method: Method = "coverage"
    """coverage drops the hardest images and stratifies over the score of the rest (Zheng et al., ICLR 2023); histogram
    prefers both tails of the score (Na et al., IJCAI 2021); for both, a high score must mean a hard image, as mean,
    el2n and the entropies do. interval (the paper's), top and bottom go by rank. A random proxy needs no scores."""
    interval: int = 4
    """s: take every s-th image of the ranking; 1 is `top`, 1 / ratio is nearly random."""
    drop_hardest: float = DROP_HARDEST
    """Share of the images with the highest scores that coverage drops, in [0, 1), as far as enough remain. The more
    images are kept, the less should be dropped (Zheng et al.; studies/selection). Where --ratio asks for all that
    remain, coverage takes the lowest scores."""
    balanced: bool = True
    """Select class by class."""
    arch_share: float = 0.5
    """Share of the proxy that trains the architecture; the rest trains the weights (.5 on CIFAR, .2 on ImageNet)."""
    seed: Annotated[int, tyro.conf.Suppress] = 0
    """Seed of the split into halves and of a selection that draws at random."""

    def __post_init__(self):
        if not 0.0 < self.ratio <= 1.0:
            raise ValueError(f"--ratio is the share of images to keep and must lie in (0, 1], not {self.ratio}.")
        if self.interval < 1:
            raise ValueError(f"--interval must be at least 1, not {self.interval}.")
        if self.method in ("coverage", "histogram") and self.measure in NOT_HARDNESS:
            raise ValueError(
                f"--method {self.method} takes high values for hard images, which --measure {self.measure} does not "
                f"give; choose --measure el2n or mean, or --method interval (the paper's) or top."
            )
        if self.method == "interval" and self.measure == "el2n":
            raise ValueError(
                "--method interval takes the highest values, and so with --measure el2n the images on which the scorer "
                "errs most; the paper's selection is --measure cv --method interval."
            )
        if not 0.0 <= self.drop_hardest < 1.0:
            raise ValueError(f"--drop-hardest is a share of images and must lie in [0, 1), not {self.drop_hardest}.")
        if not 0.0 < self.arch_share < 1.0:
            raise ValueError(f"--arch-share must lie strictly between 0 and 1, not {self.arch_share}.")


def smallest_ratio(counts: np.ndarray, *, balanced: bool) -> float | None:
    """The smallest ratio, in millionths, that is sure to leave an image in each half, or None if no ratio is.

    `counts` are the images of each class. The only image of a class goes to the weights, so that two of one class must
    be selected; unbalanced, whatever the scores are, one more than there are classes.
    """
    if max(counts, default=0) < 2:
        return None
    images, wanted = (max(counts), 2) if balanced else (sum(counts), np.count_nonzero(counts) + 1)
    millionths = math.floor((wanted - 0.5) / images * 1e6)
    while math.floor(millionths / 1e6 * images + 0.5) < wanted:  # as `select` counts
        millionths += 1
    return millionths / 1e6


def make_proxy(data: ImageData, table: ScoreTable | None, config: ProxyConfig) -> ProxyManifest:
    """Select images by their scores (`table` may be None for a random proxy) and split them into halves."""
    rng = np.random.default_rng([config.seed, SELECTION])
    if config.method == "random":
        candidates = data.good() if table is None else table.index
        scores = np.zeros(len(candidates))
    elif table is None:
        raise ValueError(f"--method {config.method} needs scores; give --scores, or use --method random.")
    else:
        candidates, scores = table.index, table.measure(config.measure)
    while True:
        chosen = candidates[
            select(
                scores,
                data.labels[candidates],
                config.ratio,
                method=config.method,
                interval=config.interval,
                drop_hardest=config.drop_hardest,
                balanced=config.balanced,
                rng=rng,
            )
        ]
        content, unreadable = [], []
        for index in chosen.tolist():
            try:
                if table is None:
                    data.source.read(index)  # without scoring, no stage has opened this file yet
                content.append(data.source.content(index))
            except BadImageError as error:
                data.bad.add({index: str(error)})
                unreadable.append(index)
        if not unreadable:
            break
        keep = ~np.isin(candidates, unreadable)
        candidates, scores = candidates[keep], scores[keep]
    weights, arch = split_by_class(chosen, data.labels[chosen], config.arch_share, seed=config.seed)
    return ProxyManifest(
        data=data.source.name,
        split=data.source.split,
        n=len(data),
        fingerprint=data.fingerprint,
        class_names=data.class_names,
        **asdict(config),
        scores=None if table is None else table.hash(),
        indices=chosen,
        labels=data.labels[chosen],
        weights=weights,
        arch=arch,
        content=tuple(content),
        paths=paths_of(data, chosen),
    )
