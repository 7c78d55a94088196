"""The augmentations that the paper compares with, as published: Mixup, CutMix, Cutout and Manifold Mixup.

The first three are called like the mixers in `mixing.py`. Mixup and CutMix draw one lambda per batch; CutMix, one box.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas_kmix.engine.augment import cutout
from nas_kmix.mixing import Mixer, MixPlan, box_plan, permutations


@dataclass(kw_only=True, eq=False)
class Mixup(Mixer):
    """lambda x + (1 - lambda) x', and the same for the labels (Zhang et al., ICLR 2018)."""

    alpha: float = 1.0
    """lambda ~ Beta(alpha, alpha)."""

    def __post_init__(self):
        super().__post_init__()
        _check_alpha(self.alpha)

    def plan(self, images: Tensor, *, rng: np.random.Generator) -> MixPlan:
        """Draw lambda and partners."""
        share = rng.beta(self.alpha, self.alpha)
        weights = torch.tensor([share, 1.0 - share], device=images.device).expand(len(images), 2)
        return MixPlan(torch.as_tensor(permutations(len(images), 2, rng), device=images.device), weights, None)


@dataclass(kw_only=True, eq=False)
class CutMix(Mixer):
    """Paste a box of another image, 1 - lambda of the area before the border clips it (Yun et al., ICCV 2019).

    The label weights follow the clipped box.
    """

    alpha: float = 1.0
    """lambda ~ Beta(alpha, alpha)."""

    def __post_init__(self):
        super().__post_init__()
        _check_alpha(self.alpha)

    def plan(self, images: Tensor, *, rng: np.random.Generator) -> MixPlan:
        """Draw lambda, the centre of the box and partners."""
        size = np.array(images.shape[2:])
        halves = (size * np.sqrt(1.0 - rng.beta(self.alpha, self.alpha))).astype(np.int64) // 2
        center = rng.integers(0, size)
        start, end = (center - halves).clip(0), (center + halves).clip(max=size)
        box = np.concatenate([start, end - start])[None, None]  # (1, 1, 4), for all images
        plan = box_plan(permutations(len(images), 2, rng), box, tuple(size.tolist()), device=images.device)
        return MixPlan(plan.partners, plan.weights.expand(len(images), -1), plan.owner.expand(len(images), -1, -1))


@dataclass(kw_only=True, eq=False)
class Cutout(Mixer):
    """Set a square of every image to zero, the mean of normalised images (DeVries & Taylor, 2017).

    Its centre is uniform and the border clips it; labels do not change.
    """

    size: int = 16
    """Side of the square in pixels."""

    def __post_init__(self):
        super().__post_init__()
        if self.size < 1:
            raise ValueError(f"size is the side of the cut-out square in pixels, at least 1, not {self.size}.")

    def mix(self, images: Tensor, labels: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Mix without the checks and the draw of `p` that the call makes."""
        return cutout(images, self.size, rng=rng), F.one_hot(labels.long(), self.num_classes).float()


def manifold_mixup(
    model: nn.Module, images: Tensor, labels: Tensor, rng: np.random.Generator, *, alpha: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Mixup at the input or after a stage of the network, drawn per batch (Verma et al., ICML 2019).

    Args:
        model: a network with `stage_ends`, the names of the layers whose outputs may be mixed: all of `BACKBONES`.
        images: (N, C, H, W).
        labels: class indices (N,).
        rng: draws lambda ~ Beta(alpha, alpha), the layer and the partners.
        alpha: 1 is Mixup's on CIFAR-100 in the CutMix paper.

    Returns:
        The network's logits (N, classes) and soft labels float32 (N, classes) to train it with.

    Raises:
        ValueError: a network without `stage_ends`, or an alpha that is not positive.
    """
    layer, mix = _draw_manifold_mixup(model, images, rng, alpha)
    if layer == "":
        logits = model(mix(images))
    else:
        hook = model.get_submodule(layer).register_forward_hook(lambda _module, _inputs, output: mix(output))
        try:
            logits = model(images)
        finally:
            hook.remove()
    return logits, mix(F.one_hot(labels.long(), logits.shape[1]).float())


@dataclass(kw_only=True, eq=False)
class ManifoldMixup(Mixer):
    """`manifold_mixup` for a training loop that knows only mixers: the model's next forward pass does the mixing.

    That pass must take exactly the images that the call returns, in one batch.
    """

    model: nn.Module
    """A network with `stage_ends`."""
    alpha: float = 1.0
    """lambda ~ Beta(alpha, alpha)."""

    def mix(self, images: Tensor, labels: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Mix without the checks and the draw of `p` that the call makes."""
        layer, mix = _draw_manifold_mixup(self.model, images, rng, self.alpha)
        soft_labels = mix(F.one_hot(labels.long(), self.num_classes).float())
        if layer == "":
            return mix(images), soft_labels

        def once(_module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
            hook.remove()
            return mix(output)

        hook = self.model.get_submodule(layer).register_forward_hook(once)
        return images, soft_labels


def _draw_manifold_mixup(
    model: nn.Module, images: Tensor, rng: np.random.Generator, alpha: float
) -> tuple[str, Callable[[Tensor], Tensor]]:
    """The layer after which to mix (empty: the input), and a function that mixes any tensor with one row per image."""
    _check_alpha(alpha)
    if not hasattr(model, "stage_ends"):
        raise ValueError(
            f"Manifold Mixup mixes after the layers named in `stage_ends`, which {type(model).__name__} lacks: "
            "choose one of nas_kmix.backbones, or another --mix."
        )
    share = rng.beta(alpha, alpha)
    layer = str(rng.choice(["", *model.stage_ends]))
    partners = torch.as_tensor(rng.permutation(len(images)), device=images.device)
    return layer, lambda x: torch.lerp(x.index_select(0, partners), x, share)


def _check_alpha(alpha: float) -> None:
    if not 0.0 < alpha < float("inf"):
        raise ValueError(f"alpha of the Beta distribution must be positive and finite, not {alpha}.")
