"""Class indices from labels in the forms in which data sets and trainers give them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def class_indices(labels: Any, *, device: torch.device | str | None = None) -> Tensor:
    """int64 (N,) of indices (N,) or (N, 1), as MedMNIST gives them, or of one-hot rows (N, classes).

    A tensor, an array, or a list of numbers or arrays. Raises ValueError for anything else, such as several classes
    of one image. Labels on a GPU are not looked at, which would be a sync point.
    """
    if not isinstance(labels, Tensor):
        try:
            rows = [np.asarray(row.cpu() if isinstance(row, Tensor) else row) for row in labels]
            labels = torch.as_tensor(np.stack(rows))
        except (TypeError, ValueError) as error:
            raise ValueError(f"labels must be class indices, one per image, not {type(labels).__name__}.") from error
    labels = labels if device is None else labels.to(device)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 2:
        looked_at = labels.device.type == "cpu"
        if looked_at and not (((labels == 0) | (labels == 1)).all() and (labels.sum(dim=1) == 1).all()):
            raise ValueError("labels (N, classes) must be one-hot: mixing starts from one class per image.")
        return labels.int().argmax(dim=1)  # bool has no argmax
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"labels must be class indices, one per image, or one-hot, not {labels.dtype} {tuple(labels.shape)}."
        )
    return labels.long()
