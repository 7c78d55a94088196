"""From a training's settings to its mixer: all of the paper's by name."""

from __future__ import annotations

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
    """How the images of a training are mixed."""

    mix: MixName = "none"
    """dmixup, dcutmix and saliency_dcutmix mix K images; mixup, cutmix and manifold_mixup are their rivals of two."""
    mix_k: int = 5
    """Images in a mix, at least 2; the rivals have two."""
    mix_alpha: float = 0.2
    """Concentration of the Dirichlet distribution that the shares are drawn from, of the rivals' Beta distribution."""
    mix_prob: float = 1.0
    """Probability that a batch is mixed at all."""

    def check_processes(self, count: int) -> None:
        """Raise ValueError where `count` processes cannot share a batch that is mixed like this."""
        if self.mix == "manifold_mixup" and count > 1:
            raise ValueError(
                "The mix manifold_mixup takes a whole batch in one forward pass; train with it in a single process."
            )


def make_mix(settings: MixConfig, num_classes: int, model: nn.Module) -> Mix:
    """The mixing function of the training loop; `model` is the one that is trained."""
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
