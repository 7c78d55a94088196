"""Published measures to select images by. A classifier and images in, a value each out.

The images are unmixed and pass through the network once: all measures but EL2N, which every scoring has, follow from
the input of its last linear layer, the features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas_kmix.backbones import last_linear
from nas_kmix.engine.compute import Compute
from nas_kmix.engine.data import ImageData

DROPOUT, PASSES = 0.5, 50  # before the last layer, and how often
MASKS = 5  # random stream
IMAGES_AT_ONCE = 512


@torch.inference_mode()
def measure_baselines(
    model: nn.Module, data: ImageData, indices: np.ndarray, *, seed: int, compute: Compute | None = None
) -> dict[str, np.ndarray]:
    """The measures of the images `indices` of `data`, ascending, by name: float64 (N,) each.

    The model is in eval mode meanwhile and as before afterwards. `seed` draws the dropout. Raises ValueError for a file
    that cannot be read.
    """
    compute, was_training = compute or Compute(), model.training
    model.eval()  # also for the last layer alone, before which a scorer trained with dropout drops features
    try:
        return _measures(model, data, indices, seed, compute)
    finally:
        model.train(was_training)


def _measures(
    model: nn.Module, data: ImageData, indices: np.ndarray, seed: int, compute: Compute
) -> dict[str, np.ndarray]:
    head = last_linear(model)
    features = _features(model, head, data, indices, compute)
    keep = np.random.default_rng([seed, MASKS]).random((PASSES, head.in_features)) >= DROPOUT
    masks = torch.as_tensor(keep, device=data.device) / (1.0 - DROPOUT)
    found: dict[str, list[Tensor]] = {name: [] for name in ("entropy", "bald", "variation_ratio")}
    for part in features.split(IMAGES_AT_ONCE):
        probabilities = head(part).softmax(dim=1)
        found["entropy"].append(entropy(probabilities))
        bald, ratio = mc_dropout(part, head, masks)
        found["bald"].append(bald)
        found["variation_ratio"].append(ratio)
    measures = {name: torch.cat(values).cpu().double().numpy() for name, values in found.items()}
    return {**measures, "k_centre": -pick_order(features).astype(np.float64)}


def entropy(probabilities: Tensor) -> Tensor:
    """In nats, of probabilities (..., C): (...)."""
    return -torch.special.xlogy(probabilities, probabilities).sum(dim=-1)


def el2n(probabilities: Tensor, labels: Tensor) -> Tensor:
    """The length of the error vector p - y (Paul, Ganguli & Dziugaite, NeurIPS 2021, there of networks in training).

    probabilities (N, C) and labels (N,) to (N,) in [0, sqrt(2)].
    """
    return (probabilities - F.one_hot(labels, probabilities.shape[1])).norm(dim=1)


def mc_dropout(features: Tensor, head: nn.Linear, masks: Tensor) -> tuple[Tensor, Tensor]:
    """BALD and variation ratio under dropout before the last layer (Gal, Islam & Ghahramani, ICML 2017).

    features (N, D) and T masks (T, D), the same for all images, as if T networks had been drawn. BALD (N,), in nats, is
    the entropy of the mean prediction less the mean entropy: what the networks disagree about. The variation ratio (N,)
    is the share of networks that do not predict the most frequent class.
    """
    mean, own = torch.zeros(len(features), head.out_features, device=features.device), 0.0
    votes = torch.zeros_like(mean)
    for mask in masks:
        probabilities = head(features * mask).softmax(dim=1)
        mean += probabilities / len(masks)
        own += entropy(probabilities) / len(masks)
        votes.scatter_add_(1, probabilities.argmax(dim=1, keepdim=True), torch.ones_like(votes[:, :1]))
    return (entropy(mean) - own).clamp_(min=0.0), 1.0 - votes.amax(dim=1) / len(masks)


def pick_order(features: Tensor) -> np.ndarray:
    """The place of each image in a k-centre greedy selection (Sener & Savarese, ICLR 2018): int64 (N,), 0 is first.

    The first image is the one nearest the mean; then always the one that is farthest from all picked so far. Time grows
    with N^2 D, memory with N D: distances to a pick are forgotten once they have lowered those to the nearest pick.
    """
    features = features - features.mean(dim=0)  # small numbers lose less in the difference of squares
    squares = features.square().sum(dim=1)
    nearest = torch.full_like(squares, math.inf)
    order = torch.empty(len(features), dtype=torch.int64, device=features.device)
    pick = squares.argmin()
    for place in range(len(features)):
        order[pick] = place
        distances = torch.addmv(squares + squares[pick], features, features[pick], alpha=-2.0)
        nearest = torch.minimum(nearest, distances)
        nearest[pick] = -math.inf
        pick = nearest.argmax()
    return order.cpu().numpy()


@torch.inference_mode()
def note_forgetting(
    memory: dict[str, Tensor], model: nn.Module, data: ImageData, *, compute: Compute | None = None
) -> float:
    """Record which images of `data` the model classifies correctly; returns their share, the training accuracy.

    Called after each epoch with one `memory`, which holds, on the CPU, bool (N,) `right` and `learned` and int64 (N,)
    `forgotten`. Augmentation is off and the model in eval mode, and put back.
    """
    compute = compute or Compute()
    right = torch.zeros(len(data), dtype=torch.bool)
    was_training, indices = model.training, data.good()
    model.eval()
    for batch in data.batches(np.array_split(indices, -(-len(indices) // IMAGES_AT_ONCE)), persistent=True):
        with compute.autocast():
            predicted = model(compute.layout(data.normalise(batch.images))).argmax(dim=1)
        right[batch.indices] = (predicted == batch.labels).cpu()
    model.train(was_training)
    before = memory or {"right": torch.zeros_like(right), "learned": torch.zeros_like(right), "forgotten": 0}
    memory["forgotten"] = before["forgotten"] + (before["right"] & ~right).long()
    memory["learned"] = before["learned"] | right
    memory["right"] = right
    return right[indices].double().mean().item()


def forgetting_counts(memory: Mapping[str, Tensor], epochs: int) -> Tensor:
    """How often each image was classified correctly after one epoch and wrongly after the next: int64 (N,).

    One that was never classified correctly counts `epochs`, more than any other (Toneva et al., ICLR 2019).
    """
    return memory["forgotten"].where(memory["learned"], epochs)


def _features(model: nn.Module, head: nn.Linear, data: ImageData, indices: np.ndarray, compute: Compute) -> Tensor:
    """What the last layer sees of each image, float32 (N, D)."""
    features: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _module, inputs: features.append(inputs[0].float()))
    try:
        for batch in data.batches(np.array_split(indices, -(-len(indices) // IMAGES_AT_ONCE))):
            with compute.autocast():
                model(compute.layout(data.normalise(batch.images)))
    finally:
        hook.remove()
    found = torch.cat(features)
    if len(found) < len(indices):
        raise ValueError(data.bad.first())
    return found
