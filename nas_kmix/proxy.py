"""Stage three: which images make the proxy dataset. Scores and labels in, a `ProxyManifest` out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated

import numpy as np
import tyro

from nas_kmix.engine.data import ImageData
from nas_kmix.engine.sources import BadImageError
from nas_kmix.manifest import ProxyManifest, paths_of
from nas_kmix.sampling import Method, select, split_by_class
from nas_kmix.scores import Measure, ScoreTable

SELECTION = 11  # random stream


@dataclass(frozen=True)
class ProxyConfig:
    """Which images make the proxy. The default is the paper's high-CV sampling at an interval (SM Fig. 3)."""

    ratio: float = 0.1
    """t, the share of each class to keep, in (0, 1]."""
    measure: Measure = "cv"
    """What ranks the images: coefficient of variation, mean or standard deviation of their losses."""
    method: Method = "interval"
    """interval | top | bottom | random; a random proxy needs no scorer and no scores."""
    interval: int = 4
    """s: take every s-th image of the ranking; 1 is `top`, 1 / ratio is nearly random."""
    balanced: bool = True
    """Select class by class."""
    arch_share: float = 0.5
    """Share of the proxy that trains the architecture; the rest trains the weights (.5 on CIFAR, .2 on ImageNet)."""
    seed: Annotated[int, tyro.conf.Suppress] = 0
    """Seed of the split into halves and of a random selection."""

    def __post_init__(self):
        if not 0.0 < self.ratio <= 1.0:
            raise ValueError(f"--ratio is the share of images to keep and must lie in (0, 1], not {self.ratio}.")
        if self.interval < 1:
            raise ValueError(f"--interval must be at least 1, not {self.interval}.")
        if not 0.0 < self.arch_share < 1.0:
            raise ValueError(f"--arch-share must lie strictly between 0 and 1, not {self.arch_share}.")


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
                balanced=config.balanced,
                rng=rng,
            )
        ]
        content, unreadable = [], []
        for index in chosen.tolist():
            try:
                if table is None:
                    data.source.read(index)  # without scoring, no stage has opened this file yet
                content.append(data.content(index))
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
