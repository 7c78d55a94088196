"""Which images a network trains on and which it is evaluated on. Data flags in, parts of splits out.

The val split selects the best epoch; without one, a share of the training images is held out. Test accuracy is only
reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from nas_kmix.engine.compute import Compute
from nas_kmix.engine.data import DataConfig, ImageData, InputFormat, load_data, prepared_for_evaluation
from nas_kmix.engine.datasets import splits_of
from nas_kmix.engine.distributed import World, is_main
from nas_kmix.engine.evaluation import evaluate
from nas_kmix.engine.folders import SplitFolderError, look_alikes
from nas_kmix.engine.progress import Progress
from nas_kmix.sampling import split_by_class


@dataclass(frozen=True)
class Part:
    """Some images of a split."""

    data: ImageData
    indices: np.ndarray

    def examples(self) -> torch.Tensor:
        """The first seven images, uint8 (7, 3, S, S); fewer if there are fewer."""
        return self.data.fetch(self.indices[:7]).images

    def readable(self, bad: Mapping[str, str]) -> int:
        """How many of the images are not in `bad`."""
        paths = self.data.source.paths
        return len(self.indices) - (0 if paths is None else sum(paths[i] in bad for i in self.indices.tolist()))


Evaluated = dict[str, Part]  # by the name of the split, val before test


def divide(
    data: ImageData, evaluated: Evaluated, *, val_share: float, train_images: int | None, seed: int
) -> tuple[Part, Evaluated]:
    """The training images and the splits to evaluate: `evaluated`, with held-out images as val if it has none."""
    indices = data.good()
    if "val" not in evaluated and val_share > 0.0:
        indices, held_out = split_by_class(indices, data.labels[indices], val_share, seed=seed)
        if len(held_out) == 0:
            raise ValueError("No class has an image to hold out; use --val-share 0, or data with a val split.")
        own = prepared_for_evaluation(data, held_out)
        evaluated = {"val": Part(data, held_out) if own is data else Part(own, own.good()), **evaluated}
    if train_images is not None:
        if train_images > len(indices):
            raise ValueError(f"--train-images {train_images} is more than the {len(indices)} images available.")
        if train_images < len(indices):
            share = train_images / len(indices)
            _, indices = split_by_class(indices, data.labels[indices], share, seed=seed, both_sides=False)
    return Part(data, indices), evaluated


def other_splits(
    config: DataConfig,
    like: InputFormat,
    *,
    device: torch.device,
    workers: int,
    strict: bool,
    same_classes: bool = True,
) -> Evaluated:
    """The val and test splits that --data has, prepared `like` the training images."""
    evaluated = {}
    for split in ("val", "test"):
        if split in splits_of(config.data):
            options = {"device": device, "workers": workers, "same_classes": same_classes, "strict": strict}
            try:
                part = load_data(config, split=split, like=like, **options)
            except SplitFolderError as error:
                if split == "val" or not same_classes:  # test images are only reported on: training does without them
                    raise
                if is_main():
                    Progress.say(f"warning: no test images: {error}")
                continue
            evaluated[split] = Part(part, part.good())
    return evaluated


def where_validation_comes_from(data: str, evaluated: Evaluated, own: Evaluated, val_share: float) -> str:
    """A line on the images that choose the best epoch: of the split val, or held out; `evaluated` are the splits."""
    names = look_alikes(Path(data), "val") if "val" not in evaluated and Path(data).is_dir() else []
    meant = f"; {Path(data, names[0])} is not read, rename it to val if it is meant" if names else ""
    if "val" not in own:
        return f"validation: none, the last epoch counts{meant}"
    count = len(own["val"].indices)
    if "val" in evaluated:
        part = own["val"]
        lacking = part.data.num_classes - len(np.unique(part.data.labels[part.indices]))
        lacks = f", which lacks {lacking} of the {part.data.num_classes} classes" if lacking else ""
        return f"validation: {count} images of the split val{lacks}"
    return f"validation: {count} images held out of the training images (--val-share {val_share:g}){meant}"


def of_known_classes(part: Part, class_names: tuple[str, ...], checkpoint: str) -> Part:
    """The images of the classes that the network of `checkpoint` knows, labelled by its class indices."""
    source = part.data.source
    number = {name: i for i, name in enumerate(class_names)}
    numbers = np.array([number.get(name, -1) for name in source.class_names])
    if (numbers < 0).all():
        raise ValueError(
            f"{checkpoint} knows none of the classes of --data {source.name}, e.g. {source.class_names[0]!r}; "
            f"its own are {', '.join(class_names[:3])}, …"
        )
    labels = numbers[source.labels]
    data = replace(part.data, source=replace(source, labels=labels, class_names=class_names))
    return Part(data, part.indices[labels[part.indices] >= 0])


def evaluate_all(
    model: nn.Module, evaluated: Evaluated, compute: Compute, world: World, progress: Progress | None = None
) -> dict[str, float]:
    """val_loss, val_accuracy, …, test_accuracy."""
    metrics = {}
    for split, part in evaluated.items():
        options = {"compute": compute, "world": world, "progress": progress}
        found = evaluate(model, part.data, indices=part.indices, **options)
        metrics |= {f"{split}_{name}": value for name, value in found.items()}
    return metrics
