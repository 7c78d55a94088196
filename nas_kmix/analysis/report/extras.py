"""Sections `landscape` and `robustness`: what nas_kmix.analysis.landscape and .robustness left in a run folder."""

from __future__ import annotations

import csv
import io

import numpy as np

from nas_kmix.analysis.landscape_picture import draw_parts
from nas_kmix.analysis.report.drawings import drawing
from nas_kmix.analysis.report.markup import Markup, figure, gallery, join, number, percent, plural, table, tag
from nas_kmix.analysis.report.parts import show
from nas_kmix.analysis.report.record import Record
from nas_kmix.engine import files

ARRAYS = ("loss", "eigenvalues", "surface", "axis", "slice", "slice_axis", "noise", "sigmas")


def landscape(record: Record) -> Markup:
    """Surface, slice and noise of every network in RUN/landscape."""
    return show(record, loss_around_the_network=_landscapes)


def robustness(record: Record) -> Markup:
    """The table of RUN/robustness.csv."""
    return show(record, attacks_and_hard_images=_robustness)


def _landscapes(record: Record) -> Markup:
    paths = sorted(record.path("landscape").glob("*.npz"))
    if not paths:
        raise ValueError(
            f"There is no landscape in {record.name}; python -m nas_kmix.analysis.landscape {_network(record)} "
            f"--out {record.path('landscape')} computes it."
        )
    return join(_landscape(record, path.stem, files.read_npz(path)) for path in paths)


def _landscape(record: Record, name: str, arrays: dict[str, np.ndarray]) -> Markup:
    with record.reading(f"landscape/{name}.npz"):
        found = {key: np.asarray(arrays[key], dtype=np.float64) for key in ARRAYS}
        drawn = draw_parts(name, found)
        surface, curvature = found["surface"], " and ".join(number(value) for value in found["eigenvalues"])
        low, high = number(surface.min()), number(surface.max())
        last = found["noise"][:, -1]
        spread = f"{number(last.mean())} ± {number(last.std(ddof=1))} at σ = {number(found['sigmas'][-1])}"
    alts = {
        "surface": f"Loss of {name} over two Hessian eigenvectors, {low} to {high}",
        "slice": f"{name}: loss along a random direction",
        "noise": f"{name}: loss under Gaussian noise on the parameters, {spread}",
    }
    captions = {
        "surface": f"Loss {number(float(found['loss']))}; largest eigenvalues {curvature}.",
        "slice": "Filter by filter as long as the network's weights.",
        "noise": f"Mean and standard deviation of {plural(len(last), 'draw')}; {spread}.",
    }
    figures = [figure(part.title(), drawing(drawn[part], alts[part]), captions[part]) for part in drawn]
    return join([tag("h4", name), gallery(*figures)])


def _robustness(record: Record) -> Markup:
    path = record.path("robustness.csv")
    if not path.is_file():
        raise ValueError(
            f"There is no robustness.csv in {record.name}; python -m nas_kmix.analysis.robustness {_network(record)} "
            f"--attack fgsm pgd --out {path} measures it."
        )
    with record.reading("robustness.csv"):
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
        head = [name for name in rows[0] if any(row[name] for row in rows)]
        shown = [[_cell(name, row[name]) for name in head] for row in rows]
    return table([name.replace("_", " ") for name in head], shown, caption="Attacks and hard images")


def _network(record: Record) -> str:
    """The trained network of a run: its folder, or the scorer of a search."""
    return record.name if record.trains else str(record.path("scorer.pt"))


def _cell(column: str, value: str) -> str:
    """Accuracies in percent, everything else as it stands."""
    return percent(float(value), 2) if "accuracy" in column and value else value
