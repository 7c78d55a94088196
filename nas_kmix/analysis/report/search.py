"""Sections `search` and `training`: how a search came to its genotype, and how the training of a network went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from darts_space.cell import EDGES, GENOTYPE_EDGES, NODES, PRIMITIVES, Edge, node_rows
from darts_space.derivation import normalised_betas
from darts_space.genotype import COLLAPSE_POOLS, COLLAPSE_SKIPS
from nas_kmix.analysis.report.charts import Series, legend, line_chart
from nas_kmix.analysis.report.drawings import drawing
from nas_kmix.analysis.report.markup import Markup, figure, join, number, plural, sentence, tag
from nas_kmix.analysis.report.parts import show
from nas_kmix.analysis.report.record import Record
from nas_kmix.analysis.table_picture import panel_figure

CELLS = (("normal", "Normal cell"), ("reduce", "Reduction cell"))
COLUMN_NAMES = {"loss": "training", "val_loss": "validation", "accuracy": "training", "val_accuracy": "validation"}
COLUMN_NAMES |= {"test_loss": "test", "test_accuracy": "test"}

UNDECIDED = math.log(len(PRIMITIVES))  # the entropy of equal weights
NODE_ROWS = tuple(node_rows(node) for node in range(NODES))


def section(record: Record) -> Markup:
    """Curves of supernet and scorer, the tables of the search, and how its genotype settled."""
    return show(
        record,
        first_appearance=_appearance,
        curves=lambda record: curves(record, "search", "Supernet"),
        curves_of_the_scorer=_scorer_curves,
        decisions=_decisions,
        beta=_betas,
        alpha=_alphas,
    )


def training(record: Record) -> Markup:
    """The curves of a training."""
    return show(record, curves=lambda record: curves(record, "train", "Network"))


def curves(record: Record, stage: str, title: str) -> list[Markup]:
    """Loss and accuracy by epoch, of a search by step."""
    if stage not in record.metrics:
        raise ValueError(f"{record.path('metrics.csv')} has no row of the stage {stage}.")
    columns = record.metrics[stage]
    unit = "step" if "step" in columns else "epoch"
    figures = []
    for what, names, share in (
        ("loss", ("loss", "val_loss", "test_loss"), False),
        ("accuracy", ("accuracy", "val_accuracy", "test_accuracy"), True),
    ):
        series = [Series(COLUMN_NAMES[name], *zip(*columns[name], strict=True)) for name in names if name in columns]
        if series:
            label = f"{what}{', share of images' if share else ', cross-entropy'}"
            last = ", ".join(f"{one.name} {number(one.y[-1])}" for one in series)
            chart = line_chart(f"{title}: {what} by {unit}; last: {last}", series, unit, label)
            keys = legend([one.name for one in series])
            figures.append(figure(f"{title}: {what}", chart, f"At the end: {last}.", keys))
    return figures


def _scorer_curves(record: Record) -> list[Markup]:
    if "scorer" not in record.metrics:
        raise ValueError("This run trained no scorer.")
    return curves(record, "scorer", "Scorer")


def _appearance(record: Record) -> Markup:
    history, unit = record.history, record.unit
    final = history[-1].genotype
    same = [row.genotype.shared_edges(final) == GENOTYPE_EDGES for row in history]  # in whatever order
    first = history[same.index(True)].at
    settled = history[len(same) - same[::-1].index(False) if False in same else 0].at
    changes = sum(a.genotype.shared_edges(b.genotype) < GENOTYPE_EDGES for a, b in pairwise(history))
    kept = " and was kept from then on" if settled == first else f", was left again and kept from {unit} {settled} on"
    return sentence(
        f"The final genotype first appeared after {unit} {first} (of {history[0].at} to {history[-1].at}){kept}. "
        f"From record to record the genotype changed {plural(changes, 'time')}."
    )


def _decisions(record: Record) -> list[Markup]:
    """How sure the tables are of their genotype, how close each record is to the last, and signs of a collapse."""
    history, unit = record.history, record.unit
    at = [row.at for row in history]

    def pair(name: str) -> list[Series]:
        return [Series(title, at, [row.diagnostics[f"{name}_{cell}"] for row in history]) for cell, title in CELLS]

    def decided(one: Series) -> Series:
        return Series(one.name, one.x, [UNDECIDED - entropy for entropy in one.y])

    keys = legend([title for _, title in CELLS])
    try:
        entropy, margin = [decided(one) for one in pair("entropy")], pair("margin")
    except KeyError as error:
        raise ValueError(f"{record.path('genotypes.jsonl')} lacks {error}.") from error
    genotypes = [row.genotype for row in history]
    shared = Series("shared edges", at, [one.shared_edges(genotypes[-1]) for one in genotypes])
    normal = [
        Series("Pools", at, [one.pools()[0] for one in genotypes]),
        Series("Skip connections", at, [one.skip_connections()[0] for one in genotypes]),
    ]
    two = " and ".join(f"{number(one.y[-1], 2)} ({one.name.lower()})" for one in entropy)
    narrow = " and ".join(f"{number(one.y[-1], 2)} ({one.name.lower()})" for one in margin)
    entropy_chart = line_chart(
        f"Mean entropy of alpha below ln 8 by {unit}", entropy, unit, "nats below ln 8", zero=True
    )
    margin_chart = line_chart(f"Smallest decision margin by {unit}", margin, unit, "probability", log=True)
    shared_chart = line_chart(
        "Edges shared with the final genotype", [shared], unit, f"of {GENOTYPE_EDGES} edges", zero=True
    )
    normal_chart = line_chart(f"Operations without weights by {unit}", normal, unit, "of 8 operations", zero=True)
    collapse = (
        f"Of the normal cell. The search has collapsed if {COLLAPSE_POOLS} or more are pools, or {COLLAPSE_SKIPS} or "
        "more skip connections."
    )
    return [
        figure(
            "Entropy of alpha",
            entropy_chart,
            f"How far it has fallen below ln 8, where nothing is decided; at the end {two} of {UNDECIDED:.3f}.",
            keys,
        ),
        figure(
            "Smallest margin", margin_chart, f"How far the nearest decision is from tipping; at the end {narrow}.", keys
        ),
        figure("Towards the final genotype", shared_chart, "Edges that a record shares with the final genotype."),
        figure("Pools and skip connections", normal_chart, collapse, legend([one.name for one in normal])),
    ]


# -- the tables --------------------------------------------------------------------------------------------------------


def _alphas(record: Record) -> Markup:
    """softmax(alpha) less 1/8 of every operation and edge over the search."""
    shares = {cell: _softmax(record.tables[f"alphas_{cell}"]) - 1 / len(PRIMITIVES) for cell, _ in CELLS}
    largest = max(float(np.abs(values).max()) for values in shares.values())
    blocks = []
    for cell, title in CELLS:
        chosen = _chosen(getattr(record.history[-1].genotype, cell))
        panels = [
            figure(
                name,
                drawing(
                    panel_figure(
                        shares[cell][:, :, column].T,
                        largest,
                        [row for row, operation in chosen if operation == name],
                    ),
                    f"{title}: softmax of alpha of {name} by edge and record",
                ),
            )
            for column, name in enumerate(PRIMITIVES)
        ]
        blocks += [tag("h4", f"Alpha, {title.lower()}"), tag("div", *panels, class_="panels")]
    how = (
        f"A row is an edge, grouped by the node 0 to 3 that it leads to, a column a record. Blue: the operation weighs "
        f"more than 1/8 on its edge, orange: less; the full colour is ±{number(largest, 2)}. Dots mark the "
        f"final genotype."
    )
    return join([*blocks, sentence(how, "note")])


def _betas(record: Record) -> list[Markup]:
    """softmax(beta) within each node, less what equal edges would have, over the search."""
    equal = np.concatenate([np.full(len(rows), 1 / len(rows)) for rows in NODE_ROWS])
    shares = {}
    for cell, _ in CELLS:
        raw = torch.from_numpy(record.tables[f"betas_{cell}"].astype(np.float64))
        shares[cell] = np.stack([normalised_betas(row).numpy() for row in raw]) - equal
    largest = max(float(np.abs(values).max()) for values in shares.values())
    how = (
        f"Rows are edges by the node they lead to. Blue: more than an equal share of its node, orange: less; the full "
        f"colour is ±{number(largest, 2)}. Dots mark the final genotype."
    )
    panels = []
    for cell, title in CELLS:
        dots = [row for row, _ in _chosen(getattr(record.history[-1].genotype, cell))]
        name = f"{title}: softmax of beta by edge and record"
        panel = panel_figure(shares[cell].T, largest, dots, width=340.0, height=170.0)
        panels.append(figure(f"Beta, {title.lower()}", drawing(panel, name), how))
    return panels


def _chosen(cell: Sequence[Edge]) -> list[tuple[int, str]]:
    """(row of the tables, operation) of a cell's edges."""
    return [(NODE_ROWS[place // 2].start + source, operation) for place, (operation, source) in enumerate(cell)]


def _softmax(tables: np.ndarray) -> np.ndarray:
    assert tables.shape[1] == EDGES
    return torch.from_numpy(tables.astype(np.float64)).softmax(-1).numpy()
