"""Section `proxy`: which images were chosen, by what, how sure the ranking is, and what its ends look like."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from nas_kmix.analysis.report.charts import histogram, legend, stacked_bars
from nas_kmix.analysis.report.markup import (
    Markup,
    figure,
    join,
    number,
    percent,
    picture,
    sentence,
    table,
    tag,
)
from nas_kmix.analysis.report.names import spoken
from nas_kmix.analysis.report.parts import show
from nas_kmix.analysis.report.record import Record
from nas_kmix.engine.data import ImageData
from nas_kmix.proxy import SELECTION
from nas_kmix.sampling import select
from nas_kmix.scores import DETERMINED, NOT_HARDNESS, TITLES, verdict
from nas_kmix.scoring import redraw

IMAGES, MIXES = 4, 4  # of each grid, and of each image
THUMBNAIL = 96  # pixels at most


def section(record: Record) -> Markup:
    """Numbers, histogram, counts, overlaps and pictures of one run's proxy."""
    return show(record, selection=_summary, histogram=_histogram, counts=_counts, overlap=_overlap, pictures=_pictures)


@dataclass(frozen=True)
class Reliability:
    """How well a ranking would repeat itself with new draws (`ScoreTable.reliability`)."""

    value: float
    draws: int
    determined: bool
    """The measure has no draws."""

    @property
    def meaning(self) -> str:
        return "no random draws" if self.determined else verdict(self.value)

    @property
    def figure(self) -> str:
        return "–" if math.isnan(self.value) else "1" if self.determined else f"{self.value:.2f}"

    def __str__(self) -> str:
        return "unknown" if math.isnan(self.value) else f"{self.figure}, {self.meaning}"


def reliability(record: Record) -> Reliability:
    """Reliability of the ranking that the proxy was chosen by."""
    measure, scores = _measure(record), record.scores
    return Reliability(scores.reliability(measure), scores.losses.shape[1], measure in DETERMINED)


def _measure(record: Record) -> str:
    """What images were ranked by; without a proxy, what they would have been, and the CV where scores lack that."""
    try:
        measure = record.proxy.measure
    except ValueError:
        measure = record.config.get("selection", {}).get("measure", "cv")
        return measure if measure in record.scores.measures else "cv"
    if measure not in TITLES:
        raise ValueError(f"The proxy of {record.name} was ranked by {measure!r}, which this program does not know.")
    return measure


def _summary(record: Record) -> Markup:
    proxy = record.proxy
    title = TITLES.get(proxy.measure, proxy.measure)
    how = f"{proxy.method} sampling of the highest {title}"
    how = {
        "coverage": f"equally many from every range of the {title}, without the hardest {percent(proxy.drop_hardest)}",
        "histogram": f"a sample that prefers both tails of the {title}",
        "random": "a random sample",
        "bottom": how.replace("highest", "lowest"),
        "interval": f"{how}, every {proxy.interval}th in rank",
    }.get(proxy.method, how)
    return sentence(
        f"{len(proxy.indices):,} of the {proxy.n:,} training images of {proxy.data} "
        f"({percent(len(proxy.indices) / proxy.n)}): {how}{', class by class' if proxy.balanced else ''}. "
        f"{len(proxy.weights):,} of them train the weights and {len(proxy.arch):,} the architecture."
    )


def _histogram(record: Record) -> list[Markup]:
    scores, name = record.scores, _measure(record)
    values = scores.measure(name)
    try:
        marked = np.isin(scores.index, record.proxy.indices)
    except ValueError:  # scored, but not selected yet
        marked = np.zeros(len(values), dtype=bool)
    low, middle, high = np.percentile(values, [5, 50, 95])
    title = f"{TITLES[name]} of {len(values):,} images"
    about = f"5 % of the images lie below {number(low)}, half below {number(middle)}, 95 % below {number(high)}."
    if marked.any():
        about += f" The mean is {number(values.mean())}, that of the proxy {number(values[marked].mean())}."
    drawn = histogram(f"Histogram: {title}. {about}", values, marked, TITLES[name])
    keys = Markup('<ul class="legend"><li><span class="swatch rest"></span>all images</li>')
    keys += Markup('<li><span class="swatch s0"></span>selected</li></ul>')
    found = reliability(record)
    trust = (
        f"How alike two rankings by {found.draws} draws each, of other random mixes, would be: 1 is the same ranking, "
        f"0 an unrelated one. Estimated from split halves."
    )
    if name in DETERMINED:
        trust = f"The {TITLES[name]} of an image is that of the scorer: no random draws take part in it."
    return [figure(title, drawn, about, Markup(keys)), figure("Reliability", _gauge(found), trust)]


def _gauge(found: Reliability) -> Markup:
    """The value as large type: a drawing would say no more."""
    value = found.figure
    return tag("p", tag("b", value), " ", found.meaning, class_="large")


def _counts(record: Record) -> list[Markup]:
    proxy = record.proxy
    names, classes = _names(record), len(proxy.class_names)
    halves = {
        part: np.bincount(proxy.labels[np.isin(proxy.indices, half)], minlength=classes).tolist()
        for part, half in (("for the weights", proxy.weights), ("for the architecture", proxy.arch))
    }
    counts = np.bincount(proxy.labels, minlength=classes)
    least, most = counts.min(), counts.max()
    each = f"{least} images each" if least == most else f"{least} to {most} images each"
    title = f"Images per class: {classes} classes of {each}"
    drawn = stacked_bars(title, names, halves, "class")
    return [figure("Images per class", drawn, f"{classes} classes of {each}.", legend(list(halves), lines=False))]


def _names(record: Record) -> tuple[str, ...]:
    """Of the proxy's classes; the folder of the images may know them by words."""
    names = record.proxy.class_names
    try:
        return spoken(record.data) if record.data.class_names == names else names
    except ValueError:  # the images are gone
        return names


def _overlap(record: Record) -> Markup:
    """How many of the proxy's images other rules would have chosen from the same scores."""
    proxy, scores = record.proxy, record.scores
    ratio, rows = proxy.ratio, []

    def share(measure: str, method: str) -> tuple[str, str]:
        rng = np.random.default_rng([proxy.seed, SELECTION])  # as for the proxy itself
        chosen = select(
            scores.measure(measure), scores.label, ratio, method=method, interval=proxy.interval,
            drop_hardest=proxy.drop_hardest, balanced=proxy.balanced, rng=rng,
        )  # fmt: skip
        same = int(np.isin(scores.index[chosen], proxy.indices).sum())
        return f"{same:,}", percent(same / len(proxy.indices))

    for measure in scores.measures:
        name = TITLES[measure]
        for method in ("top", "interval", "bottom"):
            every = f" at interval {proxy.interval}" if method == "interval" else ""
            end = "lowest" if method == "bottom" else "highest"
            rows.append((f"{end} {name}{every}", *share(measure, method)))
    for measure in (name for name in scores.measures if name not in NOT_HARDNESS):
        rows.append((f"{TITLES[measure]}, coverage", *share(measure, "coverage")))
    rows.append(("random, one draw", *share("cv", "random")))
    chance = percent(len(proxy.indices) / len(scores.index))
    return join(
        [
            table(("rule", "shared images", "of the proxy"), rows, caption="Overlap with other rules of the same size"),
            sentence(f"Chance alone gives about {chance}.", "note"),
        ]
    )


# -- pictures ----------------------------------------------------------------------------------------------------------


def _pictures(record: Record) -> Markup:
    """Images with the highest, median and lowest values, each with four of the mixes that it was scored by."""
    scores, name = record.scores, _measure(record)
    data = record.data_with(scores.key.get("inputs", {}).get("data"))
    order = np.argsort(-scores.measure(name), kind="stable")
    middle = max(0, (len(order) - IMAGES) // 2)
    groups = {"Highest": order[:IMAGES], "Median": order[middle : middle + IMAGES], "Lowest": order[::-1][:IMAGES]}
    figures = [
        figure(f"{title} {TITLES[name]}", join(_strip(record, data, row, name) for row in rows.tolist()), class_="grid")
        for title, rows in groups.items()
    ]
    draws = scores.losses.shape[1]
    how = (
        f"Each row: an image, and {MIXES} of its {draws} mixes in scoring, from the lowest loss to the highest; "
        f"the losses stand below. "
    )
    how += (
        f"The {TITLES[name]} is that of the unmixed image."
        if name in DETERMINED
        else "An image whose loss hangs on what is pasted where has a high CV."
    )
    return join([tag("div", *figures, class_="gallery"), sentence(how, "note")])


def _strip(record: Record, data: ImageData, row: int, measure: str) -> Markup:
    scores = record.scores
    index, losses = int(scores.index[row]), scores.losses[row]
    value = f"{TITLES[measure]} {number(float(scores.measure(measure)[row]), 3)}"
    label = spoken(data)[int(scores.label[row])]
    mixes, _ = redraw(scores, data, index)
    shown = np.argsort(losses, kind="stable")[np.linspace(0, len(losses) - 1, MIXES).round().astype(int)]
    images = data.fetch(np.array([index])).images
    lines = [label, value, *(["selected"] if record.selected(index) else [])]
    cells = [_cell(images[0], f"image {index}: {', '.join(lines)}", *lines)]
    for draw in shown.tolist():
        loss = f"{losses[draw]:.2f}"
        cells.append(_cell(mixes[draw], f"mix {draw} of image {index}, {label}: loss {loss}", loss))
    return tag("div", *cells, class_="strip")


def _cell(image, alt: str, *lines: str) -> Markup:
    shown = picture(image.permute(1, 2, 0).cpu().numpy(), alt, side=THUMBNAIL, class_="pixels")
    return tag("div", shown, *(tag("span", line) for line in lines))
