"""Values over a plane as small pictures inside SVG: the architecture tables over the epochs, a loss landscape."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nas_kmix.analysis.report.charts import BOTTOM, HEIGHT, LEFT, TOP, Scale, axes, svg
from nas_kmix.analysis.report.markup import Markup, data_address, number, tag

RISE, FALL = (32, 120, 190), (222, 120, 0)  # of a heat map, above and below its middle
# A few colours of the map "cividis" (Nunez et al. 2018), made for colour-blind readers.
CIVIDIS = np.array([(0, 34, 78), (53, 69, 108), (102, 105, 112), (148, 142, 119), (200, 184, 102), (254, 232, 56)])


def heat_panel(
    title: str,
    values: np.ndarray,
    largest: float,
    *,
    rules: Sequence[int] = (),
    row_labels: dict[float, str] | None = None,
    dots: Sequence[int] = (),
    columns: tuple[str, str] = ("", ""),
    width: float = 168.0,
    height: float = 112.0,
) -> Markup:
    """values (rows, columns) around 0 as a heat map: blue above, orange below, full at +-`largest`, clear at 0.

    rules: rows before which a line divides; row_labels: text at a height in rows; dots: marked rows; columns: what the
    first and the last column are.
    """
    rows, left = len(values), 26.0
    strength = np.clip(np.abs(values) / (largest or 1.0), 0.0, 1.0)
    colours = np.where((values > 0)[..., None], RISE, FALL)
    pixels = np.concatenate([colours, np.rint(255 * strength)[..., None]], axis=2).astype(np.uint8)
    image = tag(
        "image", href=data_address(pixels), x=left, y=0.0, width=width, height=height,
        preserveAspectRatio="none", class_="pixels",
    )  # fmt: skip
    unit = height / rows
    marks = [tag("path", d=f"M{left:g} {row * unit:.2f}h{width:g}", class_="rule") for row in rules]
    marks += [
        tag("text", text, x=left - 4, y=row * unit + 3.5, class_="tick end") for row, text in (row_labels or {}).items()
    ]
    marks += [tag("circle", cx=left + width + 7, cy=(row + 0.5) * unit, r=3.0, class_="chosen") for row in dots]
    marks.append(tag("rect", x=left, y=0.0, width=width, height=height, class_="frame"))
    for at, text, class_ in ((left, columns[0], "tick"), (left + width, columns[1], "tick end")):
        marks.append(tag("text", text, x=at, y=height + 12, class_=class_))
    return svg(title, image, *marks, width=left + width + 14, height=height + 16, class_="panel")


def surface(title: str, values: np.ndarray, x: np.ndarray, y: np.ndarray, x_label: str, y_label: str) -> Markup:
    """values (len(y), len(x)) as a map from dark blue, lowest, to yellow, highest (cividis)."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    share = np.nan_to_num((values - low) / ((high - low) or 1.0))
    pixels = _cividis(share)
    side = HEIGHT - TOP - BOTTOM
    scales = Scale(float(x[0]), float(x[-1]), LEFT, LEFT + side), Scale(float(y[0]), float(y[-1]), TOP + side, TOP)
    image = tag(
        "image", href=data_address(pixels[::-1]), x=LEFT, y=TOP, width=side, height=side,
        preserveAspectRatio="none", class_="pixels",
    )  # fmt: skip
    key = data_address(_cividis(np.linspace(1, 0, 64)[:, None]))
    bar = tag("image", href=key, x=LEFT + side + 16, y=TOP, width=12.0, height=side, preserveAspectRatio="none")
    ends = [
        tag("text", number(value), x=LEFT + side + 33, y=at, class_="tick")
        for value, at in ((high, TOP + 9), (low, TOP + side))
    ]
    return svg(title, image, bar, *ends, axes(*scales, x_label, y_label, right=LEFT + side, grid=False))


def _cividis(share: np.ndarray) -> np.ndarray:
    """Shares (H, W) in [0, 1] to uint8 (H, W, 3)."""
    stops = np.linspace(0, 1, len(CIVIDIS))
    return np.rint(np.stack([np.interp(share, stops, CIVIDIS[:, c]) for c in range(3)], axis=2)).astype(np.uint8)
