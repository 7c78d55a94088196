"""HTML and SVG built so that nothing from a file can become markup: text is escaped unless it is `Markup` already.

The small vocabulary of the report is here too: paragraphs, tables, figures, pictures as data.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

LARGEST_PNG = 64  # pixels a side; above, photographs are stored as JPEG, a fifth of the bytes
VOID = {"br", "img", "meta"}


class Markup(str):
    """Text that is HTML already."""


def escape(value: Any) -> Markup:
    """`value` as HTML; Markup stays as it is."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))


def join(parts: Iterable[Any], separator: str = "") -> Markup:
    return Markup(separator.join(escape(part) for part in parts))


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """An element. Attributes that are None are left out; `class_` is class, and other underscores are dashes."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_short(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def _short(value: Any) -> str:
    """Coordinates with two decimals are exact enough for any screen."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def sentence(text: Any, class_: str | None = None) -> Markup:
    return tag("p", text, class_=class_)


def missing(reason: Any) -> Markup:
    """What stands where something cannot be shown."""
    return sentence(reason, "missing")


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], *, caption: str, text_columns: int = 1) -> Markup:
    """A table whose first `text_columns` columns are words and whose others are numbers."""

    def cells(kind: str, row: Sequence[Any]) -> Markup:
        return join(tag(kind, cell, class_="number" if i >= text_columns else None) for i, cell in enumerate(row))

    body = join(tag("tr", cells("td", row)) for row in rows)
    content = join([tag("caption", caption), tag("thead", tag("tr", cells("th", head))), tag("tbody", body)])
    class_ = "scroll many" if len(head) > 3 else "scroll"  # of many columns a phone shows some, and a hint
    return tag("div", tag("table", content), class_=class_, tabindex=0, role="region", aria_label=caption)


def figure(title: str, drawing: Markup, caption: Any = "", legend: Markup | None = None, class_: str = "") -> Markup:
    """A drawing between its title and a sentence on how to read it."""
    parts = [tag("h4", title), legend or "", drawing, tag("figcaption", caption) if caption else ""]
    return tag("figure", *parts, class_=class_ or None)


def gallery(*figures: Markup) -> Markup:
    """Figures side by side as far as the page is wide."""
    return tag("div", *figures, class_="gallery")


def picture(pixels: np.ndarray, alt: str, *, side: int | None = None, class_: str | None = None) -> Markup:
    """uint8 (H, W, 3) as an image inside the page, shrunk to at most `side` pixels."""
    image = Image.fromarray(pixels)
    if side is not None and max(image.size) > side:
        image.thumbnail((side, side))
    lossless = max(image.size) <= LARGEST_PNG
    buffer = io.BytesIO()
    image.save(buffer, **({"format": "PNG", "optimize": True} if lossless else {"format": "JPEG", "quality": 85}))
    address = f"data:image/{'png' if lossless else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return tag("img", src=address, alt=alt, title=alt, class_=class_)


def number(value: float | None, digits: int = 4) -> str:
    """`12,345`, `0.1234`, `1.2e-05`: `digits` significant ones; a dash for None and for what is not finite."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    rounded = float(f"{value:.{digits}g}")  # 9,999.7 is 10,000, for which the general format would write 1e+04
    return f"{rounded:,.{digits}g}" if abs(rounded) < 10**digits else f"{value:,.0f}"


def percent(share: float, digits: int = 1) -> str:
    """0.1234 as `12.3 %`."""
    return f"{100 * share:.{digits}f} %"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 'es' if noun.endswith('s') else 's'}"
