"""The pictures of `nas_kmix.analysis.landscape`: the surface of each network, its slice and its noise curve.

In:  what `read_landscape` returns, by the network's name. Losses that are not finite leave gaps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette without its yellow: colours that colour-blind people tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
PANEL_INCHES = 3.6
MOST_COLUMNS = 4

Landscapes = Mapping[str, Mapping[str, Any]]


def draw_landscapes(landscapes: Landscapes) -> Figure:
    """One figure of all networks: their surfaces side by side, below them all slices and all noise curves.

    A single surface stands beside its curves.
    """
    rows = math.ceil(len(landscapes) / MOST_COLUMNS)
    columns = math.ceil(len(landscapes) / rows)
    if len(landscapes) == 1:
        figure = Figure(figsize=(3 * PANEL_INCHES, PANEL_INCHES), layout="constrained")
        above, below = figure.subfigures(1, 2, width_ratios=(1, 2))
    else:
        figure = Figure(figsize=(columns * PANEL_INCHES, (rows + 1) * PANEL_INCHES), layout="constrained")
        above, below = figure.subfigures(2, 1, height_ratios=(rows, 1))
    limits = _limits(landscapes)
    for place, (name, found) in enumerate(landscapes.items(), start=1):
        axes = above.add_subplot(rows, columns, place, projection="3d")
        _draw_surface(axes, found, limits)
        axes.set_title(f"{name}\nλ = {found['eigenvalues'][0]:.3g}, {found['eigenvalues'][1]:.3g}", fontsize=10)
    slices, noise = below.subplots(1, 2)
    _draw_slices(slices, landscapes)
    _draw_noise(noise, landscapes)
    slices.legend(fontsize=8)
    return figure


def draw_parts(name: str, found: Mapping[str, Any]) -> dict[str, Figure]:
    """The `surface`, the `slice` and the `noise` curve of a single network as figures of their own."""
    figures = {part: Figure(figsize=(4.4, 3.2), layout="constrained") for part in ("surface", "slice", "noise")}
    _draw_surface(figures["surface"].add_subplot(projection="3d"), found, _limits({name: found}))
    _draw_slices(figures["slice"].add_subplot(), {name: found})
    _draw_noise(figures["noise"].add_subplot(), {name: found})
    return figures


def _limits(landscapes: Landscapes) -> tuple[float, float]:
    """The lowest and the highest loss of all surfaces, 0 included: a surface is flat or deep only beside another."""
    finite = [found["surface"][np.isfinite(found["surface"])] for found in landscapes.values()]
    values = np.concatenate([*finite, [0.0]])
    return values.min(), values.max()


def _draw_surface(axes: Axes, found: Mapping[str, Any], limits: tuple[float, float]) -> None:
    first, second = np.meshgrid(found["axis"], found["axis"], indexing="ij")
    surface = np.where(np.isfinite(found["surface"]), found["surface"], np.nan)
    axes.plot_surface(first, second, surface, cmap="cividis", vmin=limits[0], vmax=limits[1], rasterized=True)
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_pane_color("#ffffff00")
    inside = np.array([-0.6, 0.6]) * found["axis"][-1]  # at the corners the ticks of two axes would meet
    axes.set(zlim=limits, xticks=inside, yticks=inside)
    axes.locator_params(axis="z", nbins=3)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("eigenvector 1", labelpad=6)
    axes.set_ylabel("eigenvector 2", labelpad=6)
    axes.set_zlabel("loss")
    axes.set_box_aspect(None, zoom=0.8)  # the layout does not know how far the label of the third axis stands out


def _draw_slices(axes: Axes, landscapes: Landscapes) -> None:
    for place, (name, found) in enumerate(landscapes.items()):
        axes.plot(found["slice_axis"], found["slice"], color=COLOURS[place % len(COLOURS)], label=name)
    axes.locator_params(nbins=5)
    axes.set(xlabel="filter-normalised random direction", ylabel="loss")


def _draw_noise(axes: Axes, landscapes: Landscapes) -> None:
    """The mean over the draws in a band of one standard deviation to both sides."""
    for place, (name, found) in enumerate(landscapes.items()):
        colour = COLOURS[place % len(COLOURS)]
        sigmas, noise = np.insert(found["sigmas"], 0, 0.0), np.insert(found["noise"], 0, found["loss"], axis=1)
        mean, deviation = noise.mean(axis=0), noise.std(axis=0, ddof=1)
        axes.plot(sigmas, mean, color=colour, label=name)
        axes.fill_between(sigmas, mean - deviation, mean + deviation, color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel="σ of Gaussian noise on all parameters", ylabel="loss")
