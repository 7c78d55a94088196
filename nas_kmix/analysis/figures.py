"""Writing figures so that the same figure gives the same bytes."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from nas_kmix.engine import files

PICTURES = (".png", ".svg")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a .png or .svg file atomically. Raises OSError naming it."""
    buffer = io.BytesIO()
    # An SVG otherwise holds the date and random names, and its text would be outlines instead of letters.
    with matplotlib.rc_context({"svg.hashsalt": "nas_kmix", "svg.fonttype": "none"}):
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(buffer, format=path.suffix[1:], dpi=150, metadata=metadata)
    files.write_bytes(path, buffer.getvalue())
