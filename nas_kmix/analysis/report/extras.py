"""Sections `landscape` and `robustness`: what the analyses of these names left, in a run's folder or in their own."""

from __future__ import annotations

import csv
import io
from contextlib import suppress
from pathlib import Path

import numpy as np

from nas_kmix.analysis.landscape_picture import draw_parts
from nas_kmix.analysis.report.drawings import drawing
from nas_kmix.analysis.report.markup import Markup, figure, gallery, join, number, percent, plural, table, tag
from nas_kmix.analysis.report.parts import show
from nas_kmix.analysis.report.record import Record
from nas_kmix.engine import files
from nas_kmix.engine.program import command

OF_RUNS = (
    "scorer.pt", "scores.npz", "proxy.json", "genotype.json", "alphas.npz", "metrics.csv", "last.pt", "result.json",
)  # fmt: skip
ARRAYS = ("loss", "eigenvalues", "surface", "axis", "slice", "slice_axis", "noise", "sigmas")


def is_run(record: Record) -> bool:
    """Whether the folder is a run's, and not one in which an analysis left its results."""
    return any(record.path(name).is_file() for name in OF_RUNS) or not (landscapes(record) or tables(record))


def landscapes(record: Record) -> list[Path]:
    """The results of nas_kmix.analysis.landscape, in RUN/landscape or in the folder itself."""
    here = [path for path in sorted(record.folder.glob("*.npz")) if path.name not in OF_RUNS]
    # A damaged archive has no names; it is shown, to say so.
    here = [path for path in here if "surface" in (files.npz_names(path) or ("surface",))]
    return [*sorted(record.path("landscape").glob("*.npz")), *here]


def tables(record: Record) -> list[Path]:
    """The tables of nas_kmix.analysis.robustness, whatever they are called."""
    return [path for path in sorted(record.folder.glob("*.csv")) if _is_of_robustness(path)]


def _is_of_robustness(path: Path) -> bool:
    """By its name or its first column: lists of images and logs are tables, too."""
    with suppress(OSError), path.open(encoding="utf-8", errors="replace") as file:
        return path.name == "robustness.csv" or file.readline().startswith("run,")
    return path.name == "robustness.csv"


def landscape(record: Record) -> Markup:
    """Surface, slice and noise of every network."""
    return show(record, loss_around_the_network=_landscapes)


def robustness(record: Record) -> Markup:
    """Every table as it stands, accuracies in per cent."""
    return show(record, attacks_and_hard_images=_robustness)


def _landscapes(record: Record) -> Markup:
    paths = landscapes(record)
    if not paths:
        raise ValueError(
            f"There is no landscape in {record.name}; "
            f"{command('landscape', _network(record), '--out', str(record.path('landscape')))} computes it."
        )
    return join(_landscape(record, path, files.read_npz(path)) for path in paths)


def _landscape(record: Record, path: Path, arrays: dict[str, np.ndarray]) -> Markup:
    name = path.stem
    with record.reading(path.relative_to(record.folder).as_posix()):
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
    paths = tables(record)
    if not paths:
        flags = (_network(record), "--attack", "fgsm", "pgd", "--out", str(record.path("robustness.csv")))
        raise ValueError(f"There is no robustness.csv in {record.name}; {command('robustness', *flags)} measures it.")
    return join(_attacks(record, path) for path in paths)


def _attacks(record: Record, path: Path) -> Markup:
    with record.reading(path.name):
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
        head = [name for name in rows[0] if any(row[name] for row in rows)]
        shown = [[_cell(name, row[name]) for name in head] for row in rows]
    return table([name.replace("_", " ") for name in head], shown, caption=f"Attacks and hard images, {path.name}")


def _network(record: Record) -> str:
    """The trained network of a run: its folder, or the scorer of a search."""
    return record.name if record.trains else str(record.path("scorer.pt"))


def _cell(column: str, value: str) -> str:
    """Accuracies in percent, everything else as it stands."""
    return percent(float(value), 2) if "accuracy" in column and value else value
