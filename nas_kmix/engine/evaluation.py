"""Accuracy and loss of a classifier on a split, every image exactly once."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from nas_kmix.engine.compute import Compute
from nas_kmix.engine.data import ImageData
from nas_kmix.engine.distributed import World
from nas_kmix.engine.progress import Progress

EVALUATION_BATCH = 256  # images, by default
TOP = 5  # with more classes than this, top-5 accuracy is reported too


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: ImageData,
    *,
    compute: Compute | None = None,
    world: World | None = None,
    batch_size: int = EVALUATION_BATCH,
    indices: np.ndarray | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Evaluate in eval mode on `indices` of `data` (default: all good images); the model's mode is restored.

    Returns `loss` (cross-entropy in nats, hard labels), `accuracy` and, with more than five classes, `accuracy_top5`,
    as means over the images, in [0, 1]. Bad files do not count. Each process of the `world` takes
    its share of the images, and all get the same result. `progress` counts this process's images.
    """
    compute, world = compute or Compute(), world or World()
    indices = data.good() if indices is None else indices
    indices = indices[world.share(len(indices))]
    was_training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float32 if data.device.type == "mps" else torch.float64, device=data.device)
    count = 0
    plan = np.array_split(indices, max(1, math.ceil(len(indices) / batch_size)))
    for batch in data.batches(plan, persistent=True):
        if len(batch.indices) == 0:  # every file of it was bad
            continue
        with compute.autocast():
            logits = model(compute.layout(data.normalise(batch.images)))
        logits = logits.float()
        top = logits.topk(min(TOP, logits.shape[1]), dim=1).indices == batch.labels[:, None]  # (N, 5)
        loss = F.cross_entropy(logits, batch.labels, reduction="sum")
        sums += torch.stack([loss, top[:, 0].sum(), top.sum()])
        count += len(batch.indices)
        if progress is not None:
            progress.update(len(batch.indices))
    model.train(was_training)
    *sums, count = world.total(*sums.tolist(), count)
    if count == 0:
        raise ValueError(f"{data.source.name}: no image of the {data.source.split} split can be read.")
    loss, first, fifth = (value / count for value in sums)
    return {"loss": loss, "accuracy": first} | ({"accuracy_top5": fifth} if data.num_classes > TOP else {})
