"""Adversarial examples in L-infinity: pixels in [0, 1] and labels in, pixels in [0, 1] out.

Both attacks climb the cross-entropy of a network that takes pixels (`PixelClassifier`: normalisation is part of it), in
evaluation mode. Every example lies in [0, 1] and at most eps from its image, exactly: bounds are rounded towards
the image.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PixelClassifier(nn.Module):
    """A network behind its normalisation: pixels (N, 3, H, W) in [0, 1] to logits."""

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model((pixels - self.mean) / self.std)


def fgsm(model: nn.Module, pixels: Tensor, labels: Tensor, *, eps: float) -> Tensor:
    """x + eps sign(grad), clipped to [0, 1] (Goodfellow et al. 2015). `pixels` is float (N, 3, H, W) in [0, 1]."""
    low, high = linf_ball(pixels, eps)
    with _evaluating(model):
        sign = _gradient_sign(model, pixels, labels)
    return torch.where(sign > 0, high, torch.where(sign < 0, low, pixels))


def pgd(
    model: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    *,
    eps: float,
    step: float,
    steps: int,
    start: Tensor | None = None,
) -> Tensor:
    """`steps` steps of size `step` along the gradient's sign, each projected to the ball of FGSM (Madry et al. 2018).

    `start`, as `random_starts` draws it, in [-1, 1], is where in the ball to begin; None begins at the image. All
    images take all steps, and the last point is returned.
    """
    low, high = linf_ball(pixels, eps)
    found = pixels if start is None else torch.clamp(pixels + eps * start, low, high)
    with _evaluating(model):
        for _ in range(steps):
            found = torch.clamp(found + step * _gradient_sign(model, found, labels), low, high)
    return found


def random_starts(indices: np.ndarray, shape: tuple[int, ...], *, seed: tuple[int, ...]) -> Tensor:
    """Uniform in [-1, 1], float32 (len(indices), *shape), each a function of `seed` and its image's index alone.

    So an image is attacked in the same way whichever batch it is in.
    """
    drawn = [np.random.default_rng([*seed, int(index)]).random(shape, dtype=np.float32) for index in indices]
    return torch.from_numpy(np.stack(drawn) * 2.0 - 1.0)


def linf_ball(pixels: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The least and the greatest floats in [0, 1] that are, in exact arithmetic, within `eps` of `pixels`.

    `eps` itself is rounded down to a float first.
    """
    radius = torch.tensor(eps, dtype=pixels.dtype, device=pixels.device)
    if radius.item() > eps:
        radius = radius.nextafter(radius.new_zeros(()))
    low = -_sum_rounded_down(-pixels, radius)
    return low.clamp_min(0.0), _sum_rounded_down(pixels, radius).clamp_max(1.0)


def _sum_rounded_down(a: Tensor, b: Tensor) -> Tensor:
    """The greatest float at most a + b. The rounding error of a sum is itself a float: Knuth's TwoSum."""
    total = a + b
    of_b = total - a
    error = (a - (total - of_b)) + (b - of_b)
    return torch.where(error < 0, total.nextafter(total.new_full((), -torch.inf)), total)


def _gradient_sign(model: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
    with torch.enable_grad():
        pixels = pixels.detach().requires_grad_()
        # The sum, not the mean: a batch must not scale an image's gradient towards zero.
        loss = F.cross_entropy(model(pixels), labels, reduction="sum")
        return torch.autograd.grad(loss, pixels)[0].sign()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside: BatchNorm must neither normalise by the batch nor learn from it."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
