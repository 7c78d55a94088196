"""The paper's mixers by name: training settings in, a mixing function out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from nas_kmix.engine.feed import Mix
from nas_kmix.mixing import DCutMix, DMixup, Mixer, SaliencyDCutMix
from nas_kmix.rivals import CutMix, ManifoldMixup, Mixup

MixName = Literal["none", "dmixup", "dcutmix", "saliency_dcutmix", "mixup", "cutmix", "manifold_mixup"]
K_IMAGES = {"dmixup": DMixup, "dcutmix": DCutMix, "saliency_dcutmix": SaliencyDCutMix}
TWO_IMAGES = {"mixup": Mixup, "cutmix": CutMix}


@dataclass(frozen=True)
class MixConfig:
    """How training images are mixed."""

    mix: MixName = "none"
    """dmixup, dcutmix and saliency_dcutmix mix K images; mixup, cutmix and manifold_mixup mix two."""
    mix_k: int = 5
    """K, images in a mix, at least 2; mixup, cutmix and manifold_mixup ignore it."""
    mix_alpha: float = 0.2
    """Concentration of the shares' distribution: Dirichlet for K images, Beta for two."""
    mix_prob: float = 1.0
    """Probability that a batch is mixed."""

    def __post_init__(self):
        if self.mix_k < 2:
            raise ValueError(f"--mix-k must be at least 2, not {self.mix_k}.")
        if not 0.0 < self.mix_alpha < math.inf:
            raise ValueError(f"--mix-alpha must be positive, not {self.mix_alpha}.")
        if not 0.0 <= self.mix_prob <= 1.0:
            raise ValueError(f"--mix-prob must lie in [0, 1], not {self.mix_prob}.")

    def check_processes(self, count: int) -> None:
        """Raise ValueError where `count` processes cannot share a batch that is mixed like this."""
        if self.mix == "manifold_mixup" and count > 1:
            raise ValueError(
                "The mix manifold_mixup needs the whole batch in one forward pass; train with it in a single process."
            )


def make_mix(settings: MixConfig, num_classes: int, model: nn.Module) -> Mix:
    """The mixing function for a training loop; `model` is the network in training."""
    if settings.mix == "none":
        return partial(_one_hot, num_classes)
    shared = {"alpha": settings.mix_alpha, "num_classes": num_classes, "p": settings.mix_prob}
    if settings.mix in K_IMAGES:
        mixer = K_IMAGES[settings.mix](k=settings.mix_k, **shared)
    elif settings.mix in TWO_IMAGES:
        mixer = TWO_IMAGES[settings.mix](**shared)
    else:
        mixer = ManifoldMixup(model=model, **shared)
    return partial(_mix, mixer)


def _one_hot(num_classes: int, images: Tensor, labels: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    return images, F.one_hot(labels, num_classes).float()


def _mix(mixer: Mixer, images: Tensor, labels: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    return mixer(images, labels, rng=rng)
