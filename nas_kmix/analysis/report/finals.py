"""Section `finals`: who competed, how they did, and whether the search was better than random architectures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from darts_space import Genotype
from nas_kmix.analysis.report.cells import cell_drawing
from nas_kmix.analysis.report.charts import Series, legend, line_chart
from nas_kmix.analysis.report.markup import Markup, figure, gallery, join, number, percent, plural, sentence, table, tag
from nas_kmix.analysis.report.parts import UNREADABLE, show
from nas_kmix.analysis.report.record import Record
from nas_kmix.engine.datasets import located
from nas_kmix.engine.progress import duration
from nas_kmix.pipeline import candidates
from nas_kmix.pipeline.finals import NAME, RESULT, TABLE
from nas_kmix.pipeline.verdict import in_words, pooled

Row = Mapping[str, Any]
"""A line of finals.jsonl."""


def section(record: Record) -> Markup:
    """Verdict, candidates, accuracies, and the winner's cells beside the best random ones."""
    return show(record, verdict=_verdict, candidates=_candidates, accuracy_by_rung=_chart, cells=_cells)


def _rows(record: Record) -> list[Row]:
    """finals.jsonl, sorted by rung and candidate."""
    path = record.path(TABLE)
    if not path.is_file():
        raise ValueError(
            f"There is no {TABLE} in {record.name}: nothing was proved. The command of the search, with --finals, "
            "compares its genotype with random ones."
        )
    with record.reading(TABLE):
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _verdict(record: Record) -> Markup:
    _rows(record)  # says what is missing
    with record.reading(RESULT):
        lines = in_words(record.result)
    cost = record.costs.get(NAME)
    spent = []
    if cost is not None and cost.wall_s > 0:
        spent = [
            f"The finals took {duration(cost.wall_s)}, with {cost.images_forward:,} images forward and "
            f"{cost.images_backward:,} backward."
        ]
    return join([tag("p", tag("b", lines[0])), *(sentence(line) for line in (*lines[1:], *spent))])


def _candidates(record: Record) -> Markup:
    rows = _rows(record)
    listed, _ = candidates.load(record.path(candidates.FILE))
    with record.reading(TABLE):
        rungs = sorted({row["rung"] for row in rows})
        epochs = {row["rung"]: row["epochs"] for row in rows}
        seen = {(row["candidate"], row["rung"]): row for row in rows}
        winner = _winner(rows)["candidate"]
        lines = []
        for i, one in enumerate(listed):
            turns = [seen.get((i, rung)) for rung in rungs]
            accuracies = ["–" if row is None else percent(row["accuracy"]) for row in turns]
            role = "winner" if i == winner else "entry" if i == 0 else ""
            lines.append((i, one.title, role, turns[0]["channels"], number(turns[0]["macs"]), *accuracies))
    heads = (f"after {plural(sum(epochs[r] for r in rungs if r <= rung), 'epoch')}" for rung in rungs)
    head = ("", "origin", "role", "channels", "multiply-adds", *heads)
    note = (
        "Accuracy on the proxy's half for the architecture. The entry was named before the finals; it and the random "
        "ones are trained to the end whatever they reach, and of the others the better half goes on after each rung."
    )
    return join([table(head, lines, caption="Candidates", text_columns=3), sentence(note, "note")])


def _winner(rows: Sequence[Row]) -> Row:
    return next(row for row in rows if row["rung"] == rows[-1]["rung"] and row["kept"])


def _best_random(rows: Sequence[Row]) -> Row:
    last = [row for row in rows if row["rung"] == rows[-1]["rung"] and row["origin"] == "random"]
    return max(last, key=lambda row: row["accuracy"])


def _chart(record: Record) -> list[Markup]:
    rows = _rows(record)
    with record.reading(TABLE):
        rungs = sorted({row["rung"] for row in rows})
        epochs = {row["rung"]: row["epochs"] for row in rows}
        at = [sum(epochs[earlier] for earlier in rungs if earlier <= rung) for rung in rungs]
        winner, best = _winner(rows)["candidate"], _best_random(rows)["candidate"]
        lines = {"winner": [winner], "entry": [0], "best random": [best]}
        lines["random, mean"] = sorted({row["candidate"] for row in rows if row["origin"] == "random"})
        if winner == 0:
            del lines["entry"]
        accuracy = {(row["candidate"], row["rung"]): 100 * row["accuracy"] for row in rows}
        series = [
            Series(name, at, [float(np.mean([accuracy[one, rung] for one in members])) for rung in rungs])
            for name, members in lines.items()
        ]
    drawn = line_chart("Accuracy by rung", series, "epochs", "accuracy, %")
    how = "Every rung has twice the epochs of the one before and begins with a warm restart."
    return [figure("Accuracy by rung", drawn, how, legend([one.name for one in series]))]


def _cells(record: Record) -> Markup:
    rows = _rows(record)
    with record.reading(TABLE):
        shown = {"Winner": _winner(rows)["genotype"], "Best random one": _best_random(rows)["genotype"]}
        genotypes = {name: Genotype.from_json(raw) for name, raw in shown.items()}
    drawn = [
        figure(f"{name}, {cell} cell", cell_drawing(edges, f"{name}, {cell} cell", reduces=cell == "reduction"))
        for name, one in genotypes.items()
        for cell, edges in (("normal", one.normal), ("reduction", one.reduce))
    ]
    return gallery(*drawn)


def verdict_table(records: Sequence[Record], short: Mapping[Path, str]) -> Markup | None:
    """The verdicts of several runs and, if all are on one data set, their pooled difference; None if no run has one."""
    lines, counted, means, errors = [], [], [], []
    for record in records:
        try:
            if record.trains:
                continue
            result = record.result
            entry, random, found = result["entry"]["accuracy"], result["random"], result["entry_minus_random"]
            mean, se, detectable = (100 * float(found[name]) for name in ("mean", "se", "detectable"))
            line = (
                short[record.folder],
                str(result["verdict"]),
                percent(entry),
                f"{percent(random['mean'])} ± {100 * random['sd']:.1f}, n = {random['n']}",
                f"{mean:+.1f} ± {se:.1f}",
                f"{detectable:.1f}",
            )
        except UNREADABLE:
            continue  # a run without finals; its own section says so
        lines.append(line)
        counted.append(record)
        means.append(mean)
        errors.append(se)
    if not lines:
        return None
    head = ("run", "verdict", "search", "random", "difference, points", "could have seen")
    verdicts = table(head, lines, caption="Verdicts", text_columns=2)
    if len(lines) == 1:
        return verdicts
    if len({located(str(record.config["input"].get("data"))) for record in counted}) > 1:
        return verdicts  # differences on other images are another quantity
    mean, se = pooled(means, errors)
    note = (
        f"Pooled over {len(lines)} runs, the search is {mean:+.2f} ± {se:.2f} points from random architectures. The "
        "runs must be independent, and of one kind, for this number to mean something."
    )
    return join([verdicts, sentence(note, "note")])
