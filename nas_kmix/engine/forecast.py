"""Time and memory of a step at any batch size, from two small batches.

In:  a step, as a function of the number of images. Out: its `Cost` with 8 and with 16 images, and on the line through
the two. The tensors are counted that a forward pass keeps for the backward one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

SMALL = 8  # images in the smaller of the two batches; the larger has twice as many
COPIES = 4  # of the weights: they, their gradients, the momentum, and one that comes and goes


class Cost(NamedTuple):
    """What a step, or a stage, takes."""

    seconds: float
    bytes: float


def measured(step: Callable[[int], Any], model: nn.Module) -> tuple[Cost, Cost]:
    """What `step` costs with 8 and with 16 images, once a first one has warmed up."""
    step(SMALL)
    return cost_of(step, SMALL, model), cost_of(step, 2 * SMALL, model)


def cost_of(step: Callable[[int], Any], n: int, model: nn.Module) -> Cost:
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        with suppress(NotImplementedError, RuntimeError):  # a tensor without storage
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    _synchronise(model)
    start = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step(n)
    _synchronise(model)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return Cost(time.perf_counter() - start, COPIES * weights + sum(kept.values()))


def _synchronise(model: nn.Module) -> None:
    if (device := next(model.parameters()).device).type == "cuda":
        torch.cuda.synchronize(device)


def at(n: int, small: Cost, large: Cost) -> Cost:
    """On the line through both, at `n` images; never less than a share of the small batch."""
    place, share = (n - SMALL) / SMALL, n / (4 * SMALL)
    return Cost(*(max(a + (b - a) * place, a * min(1.0, share)) for a, b in zip(small, large, strict=True)))


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{max(1.0, count / 1e6):.0f} MB"
