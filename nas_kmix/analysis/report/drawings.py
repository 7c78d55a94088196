"""Matplotlib's figures as SVG inside the page, in the page's font and, in light and dark, in its colours."""

from __future__ import annotations

import re

from matplotlib.figure import Figure

from nas_kmix.analysis.figures import svg_text
from nas_kmix.analysis.report.charts import svg
from nas_kmix.analysis.report.markup import Markup

# What the style sheet calls the colours that figures are drawn in; any other stays as it is.
PAGE_COLOURS = {
    "#ffffff": "ground", "#000000": "ink", "#444444": "soft", "#dddddd": "rule", "#666666": "soft",
    "#0072b2": "c0", "#d55e00": "c1", "#009e73": "c2",
    "#cfe6f5": "sep", "#fbdcc4": "dil", "#c9ebdf": "pool", "#f3f3f3": "skip",
}  # fmt: skip


def drawing(figure: Figure, title: str, class_: str = "drawn") -> Markup:
    """The figure, and `title` for those who do not see it."""
    text = svg_text(figure, salt=title)
    text = text[text.index('<g id="figure_1">') : text.rindex("</svg>")]
    text = re.sub(r' id="[a-z0-9]+_\d+"', "", text)  # matplotlib restarts its group numbers in each figure
    text = re.sub(r" font-family: [^;\"]*;?", "", text)
    text = re.sub("#[0-9a-f]{6}", lambda found: _page_colour(found[0]), text)
    width, height = figure.get_size_inches() * 72
    return svg(title, Markup(text), width=width, height=height, class_=class_)


def _page_colour(colour: str) -> str:
    return f"var(--{PAGE_COLOURS[colour]})" if colour in PAGE_COLOURS else colour
