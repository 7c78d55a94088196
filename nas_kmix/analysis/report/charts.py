"""Charts as SVG that follows the page: numbers in, `Markup` out. Colours are classes of the page's style sheet.

Series differ in dash and marker too, and every mark names its value in a <title>. All charts are drawn on 360 units of
width, so that their text is legible on a phone as it stands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nas_kmix.analysis.report.markup import Markup, join, number, tag

WIDTH, HEIGHT = 360.0, 220.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 22.0, 38.0
LETTER = 6.4  # units of width that a letter takes
MOST_MARKERS = 40  # of one line; more would hide it
COLOURS = 6  # classes s0 to s5
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Series:
    """One line or cloud: `x` and `y` of equal length; values that are not finite are left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]

    def points(self, log: bool = False) -> list[tuple[float, float]]:
        pairs = ((float(x), float(y)) for x, y in zip(self.x, self.y, strict=True))
        return [(x, y) for x, y in pairs if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log)]


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` on the units from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    whole: bool = False
    """Only whole numbers get a tick."""

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, most: int = 5) -> list[float]:
        """Round values within the scale, at most `most` + 1 or, on a log scale, powers of ten."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            return [10.0**power for power in range(first, last + 1, max(1, (last - first) // most))]
        rough = (self.high - self.low) / most
        rough = max(rough, 1.0) if self.whole else rough
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(i * step, 12) + 0.0 for i in range(first, last + 1)]

    def labels(self, ticks: Sequence[float]) -> list[str]:
        """What to write at the ticks: no two alike."""
        if self.log:
            return ["10" + str(round(math.log10(value))).translate(SUPERSCRIPTS) for value in ticks]
        for digits in range(4, 16):
            texts = [_short(value, digits) for value in ticks]
            if len(set(texts)) == len(texts):
                break
        return texts


def _short(value: float, digits: int) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1e6:.{digits}g}M" if abs(value) >= 1e6 else f"{value / 1e3:.{digits}g}k"
    return f"{value:.{digits}g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.0e}"


def scale_of(
    values: Sequence[float], start: float, end: float, *, log: bool = False, zero: bool = False, room: float = 0.04
) -> Scale:
    """A scale that holds all `values` (and zero) with some `room` at either end."""
    low, high = min(values), max(values)
    if log:  # whole powers of ten, at least two
        first = math.floor(math.log10(low))
        return Scale(10.0**first, 10.0 ** max(math.ceil(math.log10(high)), first + 1), start, end, log=True)
    low, high = (min(low, 0.0), max(high, 0.0)) if zero else (low, high)
    if high == low:
        low, high = low - (abs(low) or 1.0) * 0.02, high + (abs(high) or 1.0) * 0.02
    pad = (high - low) * room
    whole = all(value == round(value) for value in values)
    return Scale(low if zero and low == 0 else low - pad, high + pad, start, end, whole=whole)


def svg(title: str, *children: Markup, width: float = WIDTH, height: float = HEIGHT, class_: str = "chart") -> Markup:
    """A drawing with its description for those who do not see it."""
    box = f"0 0 {width:g} {height:g}"
    return tag("svg", tag("title", title), *children, viewBox=box, role="img", aria_label=title, class_=class_)


def line_chart(
    title: str, series: Sequence[Series], x_label: str, y_label: str, *, log: bool = False, zero: bool = False
) -> Markup:
    """Lines over one axis, e.g. of epochs. A chart without any value is a sentence."""
    found = [(i, one.name, one.points(log)) for i, one in enumerate(series)]
    points = [point for _, _, some in found for point in some]
    if not points:
        return tag("p", "There are no values to draw.", class_="missing")
    x, y = _scales(points, log, zero)
    lines = []
    for i, name, some in found:
        path = "M" + "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in some) if some else ""
        lines.append(tag("path", d=path, class_=f"line {_colour(i)}") if len(some) > 1 else "")
        if len(some) <= MOST_MARKERS:
            lines += [_marker(i, x(a), y(b), f"{name}, {x_label} {number(a)}: {number(b)}") for a, b in some]
    return svg(title, _axes(x, y, x_label, y_label), *lines)


def scatter_chart(title: str, series: Sequence[Series], x_label: str, y_label: str) -> Markup:
    """A cloud per series and, where it has several points, their mean with one standard deviation of y."""
    found = [(i, one.name, one.points()) for i, one in enumerate(series)]
    points = [point for _, _, some in found for point in some]
    if not points:
        return tag("p", "There are no values to draw.", class_="missing")
    spreads = {}
    for i, _, some in found:
        if len(some) > 1:
            (x_mean, mean), spread = np.mean(some, axis=0), np.std([b for _, b in some], ddof=1)
            spreads[i] = (x_mean, mean, spread)
            points += [(x_mean, mean - spread), (x_mean, mean + spread)]
    x, y = _scales(points, log=False, zero=False)
    marks = []
    for i, name, some in found:
        if i in spreads:
            x_mean, mean, spread = spreads[i]
            bar = f"M{x(x_mean):.1f} {y(mean - spread):.1f}V{y(mean + spread):.1f}M{x(x_mean) - 7:.1f} {y(mean):.1f}h14"
            about = tag("title", f"{name}: mean {number(mean)}, standard deviation {number(spread)}")
            marks.append(tag("path", about, d=bar, class_=f"line solid {_colour(i)}"))
        marks += [_marker(i, x(a), y(b), f"{name}: {number(a)}, {number(b)}", 4.5) for a, b in some]
    return svg(title, _axes(x, y, x_label, y_label), *marks)


def histogram(title: str, values: np.ndarray, marked: np.ndarray, x_label: str, bins: int = 48) -> Markup:
    """Counts of all `values` (N,), and of those where `marked` (N,) in front of them."""
    edges = np.histogram_bin_edges(values, bins)
    counts, front = np.histogram(values, edges)[0], np.histogram(values[marked], edges)[0]
    x, y = Scale(edges[0], edges[-1], LEFT, WIDTH - RIGHT), Scale(0, counts.max() * 1.05, HEIGHT - BOTTOM, TOP)
    bars = []
    for low, high, n, m in zip(edges[:-1], edges[1:], counts.tolist(), front.tolist(), strict=True):
        about = tag("title", f"{number(low)} to {number(high)}: {n:,} images, {m:,} selected")
        for count, class_ in ((n, "bar rest"), (m, "bar s0")):
            if count:
                box = {"x": x(low), "y": y(count), "width": x(high) - x(low) - 0.6, "height": y(0) - y(count)}
                bars.append(tag("rect", about, **box, class_=class_))
    return svg(title, _axes(x, y, x_label, "images"), *bars)


def stacked_bars(title: str, names: Sequence[str], stacks: dict[str, Sequence[float]], x_label: str) -> Markup:
    """A bar per name, upright, of one part on another."""
    totals = np.sum([list(values) for values in stacks.values()], axis=0)
    y = Scale(0, max(float(totals.max()), 1e-9) * 1.05, HEIGHT - BOTTOM, TOP)
    x = Scale(0, len(names), LEFT, WIDTH - RIGHT)
    gap = min(4.0, 0.2 * (x(1) - x(0)))
    bars, base = [], np.zeros(len(names))
    for i, (part, values) in enumerate(stacks.items()):
        for at, value in enumerate(values):
            about = tag("title", f"{names[at]}: {number(value)} {part}")
            box = {"x": x(at) + gap / 2, "width": x(at + 1) - x(at) - gap}
            top = y(base[at] + value)
            bars.append(tag("rect", about, **box, y=top, height=y(base[at]) - top, class_=f"bar {_colour(i)}"))
        base = base + np.asarray(values, dtype=float)
    labels, room = [], int((x(1) - x(0)) / LETTER)
    if room >= 3:
        shown = [name if len(name) <= room else f"{name[: room - 1]}…" for name in names]
        labels = [
            tag("text", name, x=x(at + 0.5), y=HEIGHT - BOTTOM + 14, class_="tick middle")
            for at, name in enumerate(shown)
        ]
    return svg(title, _axes(x, y, x_label, "images", ticks_of_x=False), *bars, *labels)


def share_bar(title: str, parts: dict[str, float]) -> Markup:
    """One bar across, divided among the parts."""
    total = sum(parts.values())
    boxes, left = [], 0.0
    for i, (name, value) in enumerate(parts.items()):
        wide = WIDTH * value / total
        about = tag("title", f"{name}: {number(value)} ({100 * value / total:.1f} %)")
        boxes.append(tag("rect", about, x=left, y=0.0, width=wide, height=22.0, class_=f"bar {_colour(i)}"))
        if wide > 40:
            text = f"{100 * value / total:.0f} %"
            boxes.append(tag("text", text, x=left + wide / 2, y=15.0, class_="onbar middle"))
        left += wide
    return svg(title, *boxes, height=22.0)


def legend(names: Sequence[str], *, lines: bool = True) -> Markup:
    """What the colours and dashes mean, in the order of the series."""
    items = []
    for i, name in enumerate(names):
        if lines:
            key = join([tag("path", d="M1 6h26", class_=f"line {_colour(i)}"), _marker(i, 14, 6, name)])
        else:
            key = tag("rect", x=6, y=1, width=16, height=10, class_=f"bar {_colour(i)}")
        items.append(tag("li", tag("svg", key, viewBox="0 0 28 12", class_="key", aria_hidden="true"), name))
    return tag("ul", *items, class_="legend")


def _scales(points: Sequence[tuple[float, float]], log: bool, zero: bool) -> tuple[Scale, Scale]:
    x = scale_of([a for a, _ in points], LEFT, WIDTH - RIGHT, room=0.03)
    return x, scale_of([b for _, b in points], HEIGHT - BOTTOM, TOP, log=log, zero=zero)


def _axes(x: Scale, y: Scale, x_label: str, y_label: str, *, ticks_of_x: bool = True) -> Markup:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [tag("path", d=f"M{LEFT:g} {bottom:g}H{right:g}", class_="axis")]
    for value, text in zip(y.ticks(), y.labels(y.ticks()), strict=True):
        parts.append(tag("path", d=f"M{LEFT:g} {y(value):.1f}H{right:g}", class_="grid"))
        parts.append(tag("text", text, x=LEFT - 5, y=y(value) + 3.5, class_="tick end"))
    for value, text in zip(x.ticks(), x.labels(x.ticks()), strict=True) if ticks_of_x else ():
        parts.append(tag("text", text, x=x(value), y=bottom + 14, class_="tick middle"))
    middle = (LEFT + right) / 2
    parts.append(tag("text", x_label, x=middle, y=HEIGHT - 7, class_="label middle"))
    parts.append(tag("text", y_label, x=0.0, y=9.0, class_="label"))
    return join(parts)


def _marker(i: int, x: float, y: float, about: str, size: float = 2.6) -> Markup:
    """A round, square or three-cornered mark."""
    title, class_ = tag("title", about), f"dot {_colour(i)}"
    if i % 3 == 0:
        return tag("circle", title, cx=float(x), cy=float(y), r=size, class_=class_)
    if i % 3 == 1:
        return tag(
            "path", title, d=f"M{x - size:.1f} {y - size:.1f}h{2 * size:g}v{2 * size:g}h{-2 * size:g}z", class_=class_
        )
    corner = 1.3 * size
    return tag(
        "path", title, d=f"M{x:.1f} {y - corner:.1f}l{corner:.1f} {2 * size:.1f}h{-2 * corner:.1f}z", class_=class_
    )


def _colour(i: int) -> str:
    return f"s{i % COLOURS}"
