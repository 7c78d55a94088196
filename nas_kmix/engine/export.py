"""A trained network as a program that runs without this repository's code (torch.export)."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from nas_kmix.engine import files

TOLERANCE = 1e-5


@torch.no_grad()
def export_model(model: nn.Module, images: Tensor, path: Path) -> None:
    """Write `model`, in evaluation mode, as a program of normalised images (N, 3, S, S) for any N to `path`.

    What was written is loaded again and must agree with the model on `images` and on the first of them alone, to 1e-5
    of the largest logit. Raises ValueError if it does not, and nothing is written then.
    """
    model = model.eval()
    example = images[:1].expand(2, -1, -1, -1)  # of a batch of one the size would be taken for fixed
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # said of every network whose tensors do not share storage; nothing is wrong
        warnings.filterwarnings("ignore", message="No complete tensor found in the group")
        torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for batch in (images, images[:1]):
        expected = model(batch)
        error = float((loaded(batch) - expected).abs().max() / expected.abs().max().clamp(min=1.0))
        if not error <= TOLERANCE:
            raise ValueError(f"--export {path}: the exported program differs from the model by {error:.1e}.")
    files.write_bytes(path, buffer.getvalue())
