"""What TensorBoard shows while a search runs: its architecture tables and cells so far, as uint8 pictures (H, W, 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from darts_space import Genotype
from darts_space.cell import PRIMITIVES
from nas_kmix.analysis.cell_picture import draw_cells
from nas_kmix.analysis.figures import pixels_of
from nas_kmix.analysis.table_picture import draw_panel


def pictures(tables: Sequence[Mapping[str, Tensor]], genotype: Genotype) -> dict[str, np.ndarray]:
    """`alpha`, heat maps over a search so far, whose tables these are, and `cells`, the present genotype."""
    return {"alpha": pixels_of(draw_alphas(tables)), "cells": pixels_of(draw_cells(genotype))}


def draw_alphas(tables: Sequence[Mapping[str, Tensor]]) -> Figure:
    """softmax(alpha) less 1/8: a row of panels for each cell, in it one for each operation."""
    names = {"alphas_normal": "normal", "alphas_reduce": "reduction"}
    shares = [torch.stack([row[name] for row in tables]).double().softmax(-1).numpy() for name in names]
    shares = np.stack(shares) - 1 / len(PRIMITIVES)  # (2, records, 14, 8)
    largest = np.abs(shares).max()
    figure = Figure(figsize=(16, 4.5), layout="constrained")
    for row, cell, name in zip(figure.subplots(2, len(PRIMITIVES)), shares, names.values(), strict=True):
        for axes, values, operation in zip(row, np.moveaxis(cell, 2, 0), PRIMITIVES, strict=True):
            draw_panel(axes, values.T, largest)
            axes.set_title(f"{operation}, {name}", fontsize=9)
    figure.suptitle(f"softmax(alpha) − 1/8 by edge and record; full colour at ±{largest:.2g}", fontsize=10)
    return figure
