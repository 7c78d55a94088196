"""Both cells of a genotype, laid out by `cell_layout`: a `Genotype` in, a matplotlib `Figure` out."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse, FancyBboxPatch, PathPatch
from matplotlib.path import Path

from darts_space import Genotype
from darts_space.cell import Edge
from nas_kmix.analysis.cell_layout import LABEL_HEIGHT, LABEL_WIDTH, STATE_HEIGHT, STATE_WIDTH, Layout, lay_out

STATE_NAMES = ("$c_{k-2}$", "$c_{k-1}$", "0", "1", "2", "3", "$c_{k}$")

# Fill and border of a label by the first word of its operation: tints and shades of Okabe and Ito's colours, which
# colour-blind people tell apart. The text says the same.
COLOURS = {
    "sep": ("#cfe6f5", "#0072b2"),
    "dil": ("#fbdcc4", "#d55e00"),
    "max": ("#c9ebdf", "#009e73"),
    "avg": ("#c9ebdf", "#009e73"),
    "skip": ("#f3f3f3", "#666666"),
}
LINE_COLOUR = "#444444"

ROW_INCHES = 0.42  # the unit of all lengths
MARGIN, TITLE = 0.5, 1.0


def draw_cells(genotype: Genotype, title: str = "") -> Figure:
    """The normal cell above the reduction cell, in one figure and at one scale."""
    parts = (
        ("Normal cell", lay_out(genotype.normal), genotype.normal, False),
        ("Reduction cell (/2: with stride 2)", lay_out(genotype.reduce), genotype.reduce, True),
    )
    width = max(layout.width for _, layout, _, _ in parts) + 2 * MARGIN
    height = sum(layout.height + TITLE for _, layout, _, _ in parts) + MARGIN + bool(title) * TITLE
    figure = Figure(figsize=(width * ROW_INCHES, height * ROW_INCHES))
    bottom = height
    if title:
        bottom -= TITLE
        figure.text(MARGIN / width, (bottom + 0.4) / height, title, fontsize=13, fontweight="bold")
    for name, layout, edges, reduces in parts:
        bottom -= TITLE
        figure.text(MARGIN / width, (bottom + 0.2) / height, name, fontsize=11)
        bottom -= layout.height
        axes = figure.add_axes((0, bottom / height, 1, layout.height / height))
        _draw_cell(axes, layout, edges, reduces, width)
    return figure


def draw_cell(edges: tuple[Edge, ...], *, reduces: bool) -> Figure:
    """One cell without a title."""
    layout = lay_out(edges)
    width = layout.width + 2 * MARGIN
    figure = Figure(figsize=(width * ROW_INCHES, layout.height * ROW_INCHES))
    _draw_cell(figure.add_axes((0, 0, 1, 1)), layout, edges, reduces, width)
    return figure


def _draw_cell(axes: Axes, layout: Layout, edges: tuple[Edge, ...], reduces: bool, width: float) -> None:
    """Draw into axes that are `width` wide and as high as the layout."""
    axes.set(xlim=(-MARGIN, width - MARGIN), ylim=(layout.height / 2, -layout.height / 2))
    axes.axis("off")
    for bundle in layout.bundles:
        # White below, so that where two lines cross one is seen to pass over the other.
        for colour, line_width, cap in (("white", 5.0, "butt"), (LINE_COLOUR, 1.6, "round")):
            for start, end in bundle:
                middle = (start[0] + end[0]) / 2
                curve = Path([start, (middle, start[1]), (middle, end[1]), end], [Path.MOVETO] + 3 * [Path.CURVE4])
                axes.add_patch(PathPatch(curve, fill=False, edgecolor=colour, linewidth=line_width, capstyle=cap))
    for point in layout.branches:
        axes.plot(*point, "o", color=LINE_COLOUR, markersize=4)
    for place, (x, y) in layout.labels.items():
        operation, source = edges[place]
        fill, border = COLOURS[operation.split("_")[0]]
        corner = (x - LABEL_WIDTH / 2, y - LABEL_HEIGHT / 2)
        shape = "round,pad=0,rounding_size=0.2"
        style = "dashed" if operation == "skip_connect" else "solid"
        colours = {"facecolor": fill, "edgecolor": border, "linestyle": style}
        axes.add_patch(FancyBboxPatch(corner, LABEL_WIDTH, LABEL_HEIGHT, boxstyle=shape, **colours))
        text = operation + (" /2" if reduces and source < 2 else "")
        axes.text(x, y, text, ha="center", va="center_baseline", fontsize=11)
    for state, (x, y) in layout.states.items():
        axes.add_patch(
            Ellipse((x, y), STATE_WIDTH, STATE_HEIGHT, facecolor="white", edgecolor="black", linewidth=1.4, zorder=3)
        )
        axes.text(x, y, STATE_NAMES[state], ha="center", va="center", fontsize=13, zorder=4)
