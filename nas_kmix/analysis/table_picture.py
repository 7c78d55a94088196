"""An architecture table over a search as a heat map: how the weights of edges or operations moved from equal ones.

In:  values (14, records), the edges' weights less what equal weights would be.
Out: a panel with a row for each edge, by the node that it leads to, and a column for each record.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from darts_space.cell import EDGES, NODES, node_rows

RISE, FALL = "#2078be", "#de7800"
# Clear in the middle, so that the ground shows, whatever its colour.
HEAT = LinearSegmentedColormap.from_list("heat", [(0.0, FALL), (0.5, FALL + "00"), (0.5, RISE + "00"), (1.0, RISE)])
POINTS = 72.0  # in an inch


def draw_panel(axes: Axes, values: np.ndarray, largest: float, chosen: Sequence[int] = ()) -> None:
    """Blue above 0, orange below, in full colour at +-`largest`; a dot at the rows that are `chosen`."""
    records = values.shape[1]
    axes.imshow(
        values, HEAT, aspect="auto", interpolation="none", vmin=-largest, vmax=largest, extent=(0, records, EDGES, 0)
    )
    axes.hlines([node_rows(node).start for node in range(1, NODES)], 0, records, "#dddddd", linewidth=0.8)
    middles = [(node_rows(node).start + node_rows(node).stop) / 2 for node in range(NODES)]
    axes.set_yticks(middles, [str(node) for node in range(NODES)])
    axes.set_xticks([0, records], ["0", f"record {records - 1}"])
    for label, side in zip(axes.get_xticklabels(), ("left", "right"), strict=True):
        label.set_horizontalalignment(side)
    axes.tick_params(length=0, pad=3, labelsize=9, labelcolor="#444444")
    axes.spines[:].set_color("#dddddd")
    axes.plot(np.full(len(chosen), 1.04), 1 - (np.array(chosen) + 0.5) / EDGES, "o", color="black", markersize=5,
              clip_on=False, in_layout=False, transform=axes.transAxes)  # fmt: skip


def panel_figure(
    values: np.ndarray, largest: float, chosen: Sequence[int] = (), *, width: float = 190.0, height: float = 126.0
) -> Figure:
    """A single panel; width and height in points."""
    figure = Figure(figsize=(width / POINTS, height / POINTS))
    left, right, below = 14 / width, 14 / width, 15 / height
    draw_panel(figure.add_axes((left, below, 1 - left - right, 1 - below - 1 / height)), values, largest, chosen)
    return figure
