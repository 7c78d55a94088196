"""From a training's settings to its mixer: all of the paper's by name."""

from __future__ import annotations

from functools import partial
from typing import Literal, Protocol

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from nas_kmix.engine.feed import Mix
from nas_kmix.mixing import DCutMix, DMixup, Mixer, SaliencyDCutMix
from nas_kmix.rivals import CutMix, ManifoldMixup, Mixup

MixName = Literal["none", "dmixup", "dcutmix", "saliency_dcutmix", "mixup", "cutmix", "manifold_mixup"]
K_IMAGES = {"dmixup": DMixup, "dcutmix": DCutMix, "saliency_dcutmix": SaliencyDCutMix}
TWO_IMAGES = {"mixup": Mixup, "cutmix": CutMix}


class MixSettings(Protocol):
    """The fields of a training's config that its mixer is made from."""

    mix: MixName
    mix_k: int
    mix_alpha: float
    mix_prob: float


def make_mix(settings: MixSettings, num_classes: int, model: nn.Module) -> Mix:
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
