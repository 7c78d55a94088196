"""The random draws of scoring: phi, boxes and partners of every anchor, before any pixel is touched.

Image indices in, `Draws` out. Every draw is a function of (seed, image index, draw) alone, through Philox with the
index as its counter. Scores therefore do not depend on batch size, order, workers or shards, and raising the number of
draws keeps the earlier ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
import tyro
from scipy import special

from nas_kmix.boxes import boxes_from_uniforms
from nas_kmix.engine.keys import NOT_IN_KEY

PHI, BOXES, PARTNERS, POOL = 1, 2, 3, 4  # one random stream per quantity
DOUBLES_PER_COUNTER = 4  # a Philox counter yields four 64-bit numbers


@dataclass(frozen=True)
class ScoringConfig:
    """How to mix anchors: as in the paper (SM, "Data Subsampling"), but for loss and partners (studies/selection)."""

    draws: int = 10
    """M, mixes per image; at least 2, and at least 4 to estimate the reliability."""
    k: int = 3
    """Images in a mix, anchor included; the paper uses two partners."""
    alpha: float = 2 / 9
    """Dirichlet concentration of each partner's share of the rest."""
    phi_anchor: float = 0.5
    """The anchor's share, in (0, 1); 0.5 was the paper's best."""
    loss: Literal["mixed", "minus_entropy", "anchor"] = "anchor"
    """mixed: cross-entropy with the mixed label (eq. 8) | minus_entropy: the same minus that label's entropy |
    anchor: cross-entropy with the image's own label, whose rankings repeat best."""
    partners: Literal["fresh", "fixed", "common"] = "common"
    """fresh: new partners at every draw, as in the paper | fixed: the same at all draws of an image |
    common: the same for all images at one draw, with the same phi and boxes, so that only the images differ."""
    baselines: bool = False
    """Also measure what other methods select by: predictive entropy under mixing and without, BALD and variation ratio
    of a dropout before the last layer, k-centre order. It takes one more pass per image; the time of the k-centre order
    grows with the square of the number of images."""
    batch_size: int = field(default=512, metadata=NOT_IN_KEY)
    """Mixed images per forward pass."""
    pool_size: int = field(default=4096, metadata=NOT_IN_KEY)  # its effect is in the key, see `scoring.scoring_key`
    """Images from which a streamed set draws partners; a resident set draws from all its images."""
    seed: Annotated[int, tyro.conf.Suppress] = 0
    """Seed of every draw."""

    @property
    def revision(self) -> dict[str, str]:
        """For keys: EL2N was once measured only on demand."""
        return {"el2n": "always"}

    def __post_init__(self):
        if self.draws < 2:
            raise ValueError(f"--scoring.draws must be at least 2 to measure a variation, not {self.draws}.")
        if self.k < 2:
            raise ValueError(f"--scoring.k must be at least 2, as a mix needs two images, not {self.k}.")
        if not 0.0 < self.phi_anchor < 1.0:
            raise ValueError(f"--scoring.phi-anchor must lie strictly between 0 and 1, not {self.phi_anchor}.")
        if not 0.0 < self.alpha < math.inf:
            raise ValueError(f"--scoring.alpha must be positive and finite, not {self.alpha}.")
        if self.pool_size < self.k:
            raise ValueError(f"--scoring.pool-size must be at least --scoring.k, {self.k}, not {self.pool_size}.")
        if self.batch_size < 1:
            raise ValueError(f"--scoring.batch-size must be at least 1, not {self.batch_size}.")


@dataclass(frozen=True)
class Draws:
    """Everything random about the mixes of some anchors; row i * M + m is draw m of anchor i.

    anchor: (R,) rows into the batch of anchors; partners: (R, K-1) rows into the pool; boxes: (R, K-1, 4).
    """

    anchor: np.ndarray
    partners: np.ndarray
    boxes: np.ndarray

    def batches(self, size: int) -> Iterator[Draws]:
        for i in range(0, len(self.anchor), size):
            rows = slice(i, i + size)
            yield Draws(self.anchor[rows], self.partners[rows], self.boxes[rows])


def draw(indices: np.ndarray, pool_rows: np.ndarray, size: tuple[int, int], config: ScoringConfig) -> Draws:
    """All M draws for the images `indices`; `pool_rows` are the dataset indices of the possible partners."""
    n, free = len(indices), config.k - 1
    sticks = np.empty((n, config.draws, free))
    boxes = np.empty((n, config.draws, free, 2))
    partners = np.empty((n, config.draws, free), dtype=np.int64)
    for m in range(config.draws):
        sticks[:, m, 1:] = uniforms(PHI, m, indices, free - 1, config)
        boxes[:, m] = uniforms(BOXES, m, indices, 2 * free, config).reshape(n, free, 2)
        drawn = 0 if config.partners == "fixed" else m
        partners[:, m] = draw_partners(uniforms(PARTNERS, drawn, indices, free + 1, config), indices, pool_rows)
    # The anchor breaks its share off the stick. Of the rest, a Dirichlet over K - 1 partners breaks off pieces of
    # Beta(a, (K-1-k) a), drawn by inverting their distribution functions: that takes a fixed number of uniforms.
    sticks[:, :, 0] = config.phi_anchor
    for k in range(1, free):
        sticks[:, :, k] = special.betaincinv(config.alpha, (free - k) * config.alpha, sticks[:, :, k])
    sticks = sticks.reshape(-1, free)
    return Draws(
        np.repeat(np.arange(n), config.draws),
        partners.reshape(-1, free),
        boxes_from_uniforms(sticks, size, boxes.reshape(-1, free, 2)),
    )


def uniforms(stream: int, draw: int, indices: np.ndarray, count: int, config: ScoringConfig) -> np.ndarray:
    """Uniform numbers (N, count) in [0, 1) that depend on (seed, stream, draw, index) alone; `indices` ascend."""
    if config.partners == "common":
        indices = np.zeros_like(indices)
    counters = -(-count // DOUBLES_PER_COUNTER)
    first, last = (int(indices[0]), int(indices[-1])) if len(indices) else (0, 0)
    philox = np.random.Philox(key=[config.seed, stream], counter=[first * counters, draw, 0, 0])
    block = np.random.Generator(philox).random((last - first + 1, counters * DOUBLES_PER_COUNTER))
    return block[indices - first, :count]


def draw_partners(numbers: np.ndarray, indices: np.ndarray, pool_rows: np.ndarray) -> np.ndarray:
    """K - 1 different rows of the pool per anchor, never the anchor's own: uniform numbers (N, K) to int64 (N, K-1).

    K different rows are drawn; the last is a spare, used where the anchor itself comes up. With common uniforms, all
    other anchors therefore get the same partners.
    """
    rows = np.empty(numbers.shape, dtype=np.int64)
    for k in range(numbers.shape[1]):
        free = len(pool_rows) - k
        rows[:, k] = np.minimum((numbers[:, k] * free).astype(np.int64), free - 1)
        for taken in np.sort(rows[:, :k], axis=1).T:  # step over the rows already taken, in ascending order
            rows[:, k] += rows[:, k] >= taken
    return np.where(pool_rows[rows[:, :-1]] == indices[:, None], rows[:, -1:], rows[:, :-1])


def pool_of_streamed(n: int, config: ScoringConfig) -> np.ndarray:
    rng = np.random.default_rng([config.seed, POOL])
    return np.sort(rng.choice(n, size=min(config.pool_size, n), replace=False))
