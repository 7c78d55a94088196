"""Accuracy of classifiers under attack and on hard images, and how well they detect images of unknown classes.

In:  `PixelClassifier`s and images. Out: shares in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from nas_kmix.analysis.attacks import PixelClassifier
from nas_kmix.engine.data import Batch, ImageData
from nas_kmix.engine.progress import Progress
from nas_kmix.engine.sources import Source

Attack = Callable[[PixelClassifier, Tensor, Batch], Tensor]  # (network, pixels, batch) to adversarial pixels


def attacked_accuracy(
    models: Mapping[str, PixelClassifier],
    data: ImageData,
    indices: np.ndarray,
    attacks: Mapping[str, Attack],
    *,
    substitute: PixelClassifier | None = None,
    batch_size: int = 100,
) -> dict[str, dict[str, float]]:
    """Share of `indices` that each model still gets right: `clean`, and under each of `attacks`, by their names.

    With a `substitute`, one set of examples is made on it for all models. Unreadable files are not counted.
    """
    correct = {name: dict.fromkeys(("clean", *attacks), 0) for name in models}
    networks = "1 network" if len(models) == 1 else f"{len(models)} networks"
    count, progress = 0, Progress(f"attack on {networks}", len(indices), unit="image")
    for batch in data.batches(np.array_split(indices, math.ceil(len(indices) / batch_size))):
        if len(batch.indices) == 0:
            continue
        pixels = to_pixels(batch.images)
        shared = {} if substitute is None else {k: attack(substitute, pixels, batch) for k, attack in attacks.items()}
        for name, model in models.items():
            examples = shared or {kind: attack(model, pixels, batch) for kind, attack in attacks.items()}
            for kind, shown in {"clean": pixels, **examples}.items():
                correct[name][kind] += int((_logits(model, shown).argmax(dim=1) == batch.labels).sum())
        count += len(batch.indices)
        progress.update(len(batch.indices))
    progress.close()
    return {name: {kind: hits / count for kind, hits in row.items()} for name, row in correct.items()}


def to_pixels(images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) to float32 in [0, 1]."""
    return images.to(torch.float32) / 255.0


def natural_accuracy(model: PixelClassifier, data: ImageData, *, batch_size: int = 100) -> tuple[float, float]:
    """Accuracy among all of the network's classes, and among only those that `data` has images of.

    The second is how ImageNet-A's accuracies are given by Hendrycks et al. (2021).
    """
    logits, labels = all_logits(model, data, data.good(), batch_size=batch_size)
    present = torch.as_tensor(np.unique(data.labels))
    among_all = logits.argmax(dim=1) == labels
    among_present = present[logits[:, present].argmax(dim=1)] == labels
    return among_all.double().mean().item(), among_present.double().mean().item()


def ood_aupr(inside: Tensor, outside: Tensor) -> float:
    """Area under the precision-recall curve of telling `outside` (the positives) from `inside`, logits (N, classes).

    The anomaly score is minus the largest softmax probability; the area is scikit-learn's average precision. An
    uninformative score gets the share of positives.
    """
    scores = [-logits.double().softmax(dim=1).amax(dim=1) for logits in (inside, outside)]
    positive = np.repeat([0, 1], [len(inside), len(outside)])
    return float(average_precision_score(positive, torch.cat(scores).numpy()))


def all_logits(
    model: PixelClassifier, data: ImageData, indices: np.ndarray, *, batch_size: int = 100
) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) and labels (N,) of the readable ones of `indices`, on the CPU. Raises ValueError for none."""
    found = [
        (_logits(model, to_pixels(batch.images)).cpu(), batch.labels.cpu())
        for batch in data.batches(np.array_split(indices, math.ceil(len(indices) / batch_size)))
        if len(batch.indices)
    ]
    if not found:
        raise ValueError(f"{data.source.name}: not one image can be read.")
    logits, labels = zip(*found, strict=True)
    return torch.cat(logits), torch.cat(labels)


@torch.no_grad()
def _logits(model: PixelClassifier, pixels: Tensor) -> Tensor:
    return model(pixels)


def of_known_classes(source: Source, class_names: tuple[str, ...], *, known: bool) -> Source:
    """The images of `source` whose class is among `class_names`, labelled by its place there; or all others.

    Others keep their labels. Raises ValueError, naming the folder, if nothing is left.
    """
    places = np.array([class_names.index(name) if name in class_names else -1 for name in source.class_names])
    rows = np.flatnonzero((places[source.labels] >= 0) == known)
    if len(rows) == 0:
        if known:
            raise ValueError(
                f"{source.folder} has no images of the network's classes; its folders must be named as those of the "
                "training images."
            )
        raise ValueError(
            f"{source.folder} has no images of any other classes; if its folders are named by what a network takes "
            "them for, as those of ImageNet-O are, add --ood-folders mistaken."
        )
    found = source.part(rows)
    return replace(found, labels=places[found.labels], class_names=class_names) if known else found
