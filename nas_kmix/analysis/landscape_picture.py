"""The figure of `nas_kmix.analysis.landscape`: a surface for each network, and all slices and noise curves together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette without its yellow: colours that colour-blind people tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
PANEL_INCHES = 3.6
MOST_COLUMNS = 4


def draw_landscapes(landscapes: Mapping[str, Mapping[str, Any]]) -> Figure:
    """One figure of all networks, by name, of what `read_landscape` returns. Losses that are not finite leave gaps."""
    columns = min(MOST_COLUMNS, max(2, len(landscapes)))
    rows = -(-len(landscapes) // columns)
    figure = Figure(figsize=(columns * PANEL_INCHES, (rows + 1) * PANEL_INCHES), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(rows, 1))
    finite = [found["surface"][np.isfinite(found["surface"])] for found in landscapes.values()]
    values = np.concatenate([*finite, [0.0]])
    for place, (name, found) in enumerate(landscapes.items(), start=1):
        axes = above.add_subplot(rows, columns, place, projection="3d")
        first, second = np.meshgrid(found["axis"], found["axis"], indexing="ij")
        surface = np.where(np.isfinite(found["surface"]), found["surface"], np.nan)
        axes.plot_surface(first, second, surface, cmap="viridis", vmin=values.min(), vmax=values.max(), linewidth=0)
        # One scale for all: a surface is flat or deep only beside another.
        axes.set(zlim=(values.min(), values.max()), xlabel="eigenvector 1", ylabel="eigenvector 2", zlabel="loss")
        axes.set_box_aspect(None, zoom=0.85)  # the layout does not know how far the label of the third axis stands out
        axes.set_title(f"{name}\nλ = {found['eigenvalues'][0]:.3g}, {found['eigenvalues'][1]:.3g}", fontsize=10)
    slices, noise = below.subplots(1, 2)
    _draw_slices(slices, landscapes)
    _draw_noise(noise, landscapes)
    return figure


def _draw_slices(axes: Axes, landscapes: Mapping[str, Mapping[str, Any]]) -> None:
    for place, (name, found) in enumerate(landscapes.items()):
        axes.plot(found["slice_axis"], found["slice"], color=COLOURS[place % len(COLOURS)], label=name)
    axes.set(xlabel="filter-normalised random direction", ylabel="loss")
    axes.legend(fontsize=8)


def _draw_noise(axes: Axes, landscapes: Mapping[str, Mapping[str, Any]]) -> None:
    """The mean over the draws in a band of one standard deviation to both sides."""
    for place, (name, found) in enumerate(landscapes.items()):
        colour = COLOURS[place % len(COLOURS)]
        sigmas, noise = np.insert(found["sigmas"], 0, 0.0), np.insert(found["noise"], 0, found["loss"], axis=1)
        mean, deviation = noise.mean(axis=0), noise.std(axis=0, ddof=1)
        axes.plot(sigmas, mean, color=colour, label=name)
        axes.fill_between(sigmas, mean - deviation, mean + deviation, color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel="σ of Gaussian noise on all parameters", ylabel="loss")
