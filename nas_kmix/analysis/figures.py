"""Figures as files, as pixels and as text: the same figure always gives the same bytes."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nas_kmix.engine import files

PICTURES = (".png", ".svg")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a .png or .svg file atomically. Raises OSError naming it."""
    if path.suffix == ".svg":
        files.write_text(path, svg_text(figure))
    else:
        buffer = io.BytesIO()
        figure.savefig(buffer, format=path.suffix[1:], dpi=150)
        files.write_bytes(path, buffer.getvalue())


def svg_text(figure: Figure, salt: str = "nas_kmix") -> str:
    """The figure as an SVG document, without its date. `salt` decides the names inside, which a page must have once."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}):  # letters instead of their outlines
        figure.savefig(buffer, format="svg", dpi=150, metadata={"Date": None})
    return buffer.getvalue()


def pixels_of(figure: Figure) -> np.ndarray:
    """The drawn figure, uint8 (H, W, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
