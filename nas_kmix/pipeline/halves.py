"""The two halves of a proxy, or of all images: what trains the weights, and what trains the architecture."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from nas_kmix.engine.data import ImageData
from nas_kmix.manifest import ProxyManifest
from nas_kmix.sampling import split_by_class

SET_ASIDE = 0.1  # of all images, where there is no proxy


@dataclass(frozen=True)
class Halves:
    """Which images train the weights and which the architecture: int64, sorted; `identity` tells halves apart."""

    weights: np.ndarray
    arch: np.ndarray
    identity: str

    def __post_init__(self):
        if len(self.weights) == 0 or len(self.arch) == 0:
            raise ValueError("The proxy leaves no image for the architecture; raise --ratio or --arch-share.")

    def check_processes(self, count: int, batch_size: int) -> None:
        """Raise ValueError where a batch has fewer images than there are processes to share it."""
        check_shared_batch(min(batch_size, len(self.weights), len(self.arch)), count)

    def epoch_steps(self, batch_size: int) -> int:
        """Steps per epoch of the weights' half."""
        return math.ceil(len(self.weights) / batch_size)

    @staticmethod
    def of_proxy(manifest: ProxyManifest) -> Halves:
        return Halves(manifest.weights, manifest.arch, identity=manifest.hash())

    @staticmethod
    def of_all_images(data: ImageData, arch_share: float, *, seed: int) -> Halves:
        """All images that can be read, divided by class, but for a tenth that is left for the verdict of the finals."""
        used, _ = split_by_class(data.good(), data.labels[data.good()], SET_ASIDE, seed=seed + 1)
        weights, arch = split_by_class(used, data.labels[used], arch_share, seed=seed)
        return Halves(weights, arch, identity=f"all images but {SET_ASIDE:.0%}, arch_share {arch_share}")


def check_shared_batch(images: int, processes: int) -> None:
    """Raise ValueError where a batch has fewer images than there are processes to share it."""
    if images < processes:
        raise ValueError(
            f"A batch of the search has {images} images, fewer than the {processes} processes that share it; start "
            "fewer, or raise --batch-size or --ratio."
        )
