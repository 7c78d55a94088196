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
    """Write `model` in eval mode to `path`, as a program on normalised images (N, 3, S, S) for any N.

    Before it is written, the program is loaded again and must agree with the model on `images`, and on the first alone,
    to 1e-5 of the largest logit. Raises ValueError if it does not.
    """
    model = model.eval()
    example = images[:1].expand(2, -1, -1, -1)  # with a batch of one, export takes the size for fixed
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # harmless: no tensors share storage
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
