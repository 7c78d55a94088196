"""What TensorBoard shows while a search runs: its architecture tables and cells so far, as uint8 pictures (H, W, 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from darts_space import Genotype
from darts_space.cell import EDGES, NODES, PRIMITIVES, node_rows
from nas_kmix.analysis.cell_picture import draw_cells


def pictures(tables: Sequence[Mapping[str, Tensor]], genotype: Genotype) -> dict[str, np.ndarray]:
    """`alpha`, a heat map over the epochs so far, whose tables these are, and `cells`, the present genotype."""
    return {"alpha": pixels_of(draw_alphas(tables)), "cells": pixels_of(draw_cells(genotype))}


def draw_alphas(tables: Sequence[Mapping[str, Tensor]]) -> Figure:
    """softmax(alpha) less 1/8 by edge (rows), operation and epoch (columns) for both cells."""
    names = {"alphas_normal": "normal cell", "alphas_reduce": "reduction cell"}
    shares = {
        name: torch.stack([row[name] for row in tables]).double().softmax(-1).numpy() - 1 / len(PRIMITIVES)
        for name in names
    }
    largest = max(np.abs(values).max() for values in shares.values())
    epochs = len(tables)
    figure = Figure(figsize=(10, 5), layout="constrained")
    for axes, (name, values) in zip(figure.subplots(2, 1, sharex=True), shares.items(), strict=True):
        rows = values.transpose(1, 2, 0).reshape(EDGES, -1)  # (14, 8 * epochs)
        extent = (0, len(PRIMITIVES), EDGES, 0)
        image = axes.imshow(rows, "PuOr", aspect="auto", extent=extent, vmin=-largest, vmax=largest)
        axes.vlines(range(1, len(PRIMITIVES)), 0, EDGES, color="black", linewidth=0.8)
        axes.hlines([node_rows(node).start for node in range(1, NODES)], 0, len(PRIMITIVES), "grey", linewidth=0.5)
        axes.set_xticks(np.arange(len(PRIMITIVES)) + 0.5, PRIMITIVES, fontsize=8)
        middles = [(node_rows(node).start + node_rows(node).stop) / 2 for node in range(NODES)]
        axes.set_yticks(middles, [f"node {node}" for node in range(NODES)], fontsize=8)
        axes.set_title(f"alpha, {names[name]}: in each column the epochs 0 to {epochs - 1}", fontsize=9)
    figure.colorbar(image, ax=figure.axes, label="softmax − 1/8", fraction=0.03)
    return figure


def pixels_of(figure: Figure) -> np.ndarray:
    """The drawn figure, uint8 (H, W, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
