"""Section `compare`: several runs side by side. Trainings that differ only in their seed form a group.

The genotype's file does not count, but what it came from: searches of several seeds are retrained once each.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from darts_space import GENOTYPES, Genotype
from darts_space.cell import GENOTYPE_EDGES
from nas_kmix.analysis.report.charts import Series, legend, scatter_chart
from nas_kmix.analysis.report.cost import all_in_seconds, speed_up
from nas_kmix.analysis.report.finals import verdict_table
from nas_kmix.analysis.report.markup import (
    Markup,
    figure,
    gallery,
    join,
    missing,
    number,
    percent,
    sentence,
    table,
    tag,
)
from nas_kmix.analysis.report.parts import UNREADABLE, reason
from nas_kmix.analysis.report.proxy import reliability
from nas_kmix.analysis.report.record import Record

T, K = TypeVar("T"), TypeVar("K")
NO_SETTINGS = ("seed", "out", "fresh", "quiet", "report", "invocation", "device", "eval_only", "export", "export_raw")


@dataclass(frozen=True)
class Searched:
    """What the comparison shows of a run of search.py."""

    record: Record
    proxy: str
    seed: int
    genotype: Genotype | None
    reliability: str
    seconds: float | None
    ratio: float | None
    """All-in speed-up over the full search."""


@dataclass(frozen=True)
class TrainedNetwork:
    """What the comparison shows of a run of train_eval.py."""

    record: Record
    origin: str
    """What its genotype came from: how a search's proxy was chosen, a name, or a backbone."""
    images: str
    """The images that the accuracy is of: data set and split."""
    input: tuple[str, int, int | None]
    """--data, --split-seed and --image-size."""
    settings: str
    """All settings that could make a difference, but for the seed and where the genotype lay."""
    seed: int
    genotype: Genotype | None
    accuracy: float | None
    """Accuracy after the last epoch on the test images, else on the validation images; in [0, 1]."""
    best: float | None
    result: dict
    search_seconds: float | None
    """Seconds of all stages of the search that found the genotype."""


def section(records: Sequence[Record]) -> Markup:
    """Tables, accuracy against cost, and shared edges of two or more runs."""
    searched, trained, unknown = [], [], []
    for record in sorted(records, key=lambda record: record.trains):  # networks look for the search they came from
        try:
            if record.trains:
                trained.append(_trained(record, searched))
            else:
                searched.append(_searched(record))
        except UNREADABLE as error:
            unknown.append(missing(f"{record.name} is not compared: {reason(record, error)}"))
    short, trained = _short_names(records), _told_apart(trained)
    verdicts = verdict_table(records, short)
    parts = [_search_table(searched, short), *([] if verdicts is None else [verdicts])]
    parts += [_network_table(trained, short), _accuracy_chart(trained)]
    parts.append(_shared(searched, trained, short))
    return join([*parts, *unknown])


def _or_none(read: Callable[[], T]) -> T | None:
    """What cannot be read is left empty here; the run's own sections say why."""
    try:
        return read()
    except UNREADABLE:
        return None


# -- reading -----------------------------------------------------------------------------------------------------------


def _searched(record: Record) -> Searched:
    ledger = _or_none(lambda: all_in_seconds(record))
    ratio = _or_none(lambda: speed_up(record))
    return Searched(
        record,
        proxy=proxy_text(record),
        seed=record.config.get("seed", 0),
        genotype=_or_none(lambda: record.genotype),
        reliability=str(_or_none(lambda: reliability(record)) or "–"),
        seconds=ledger,
        ratio=None if ratio is None else ratio.all_in,
    )


def proxy_text(record: Record) -> str:
    """How the images of a search were chosen, in a few words."""
    proxy = _or_none(lambda: record.proxy)
    if proxy is None:
        return f"{data_name(record)}: all images" if record.flag("proxy") == "none" else "–"
    by = proxy.method if proxy.method == "random" else f"{proxy.measure} {proxy.method}"
    how = {"interval": f" {proxy.interval}", "coverage": f" without the hardest {percent(proxy.drop_hardest)}"}
    return f"{proxy.data}: {by}{how.get(proxy.method, '')}, {percent(len(proxy.indices) / proxy.n)}"


def _trained(record: Record, searched: Sequence[Searched]) -> TrainedNetwork:
    network = record.config["network"]
    result = _or_none(lambda: record.result) or {}
    genotype = _or_none(lambda: record.genotype)
    search = _origin(network, genotype, searched)
    return TrainedNetwork(
        record,
        origin=_network_name(network, genotype) if search is None else search.proxy,
        images=f"{data_name(record)}, {_split(result.get('last'))}",
        input=tuple(record.config.get("input", {}).get(name) for name in ("data", "split_seed", "image_size")),
        settings=_settings(record.config),
        seed=record.config.get("seed", 0),
        genotype=genotype,
        accuracy=_accuracy(result.get("last")),
        best=_accuracy(result.get("best")),
        result=result,
        search_seconds=None if search is None else search.seconds,
    )


def _settings(config: Mapping[str, Any]) -> str:
    own = {name: value for name, value in config.items() if name not in NO_SETTINGS}
    own["network"] = {name: value for name, value in config["network"].items() if name != "genotype"}
    return json.dumps(own, sort_keys=True, default=str)


def _told_apart(trained: Sequence[TrainedNetwork]) -> list[TrainedNetwork]:
    """With the whole path, the split's seed and the size where two data sets would be called the same."""
    inputs: dict[str, set[tuple]] = defaultdict(set)
    for run in trained:
        inputs[run.images].add(run.input)

    def named(run: TrainedNetwork) -> str:
        data, split_seed, size = run.input
        return f"{run.images} of {data}, split seed {split_seed or 0}, {size or 'own'} px"

    return [replace(run, images=named(run)) if len(inputs[run.images]) > 1 else run for run in trained]


def _origin(network: dict, genotype: Genotype | None, searched: Sequence[Searched]) -> Searched | None:
    """The search that found the genotype: the one in the folder that it was read from, given here or not."""
    if genotype is None or not network.get("genotype"):
        return None
    folder = Path(str(network["genotype"])).parent
    same = [search for search in searched if search.genotype == genotype]
    for search in same:
        if search.record.folder.resolve() == folder.resolve():
            return search
    outside = Record(folder)
    known = _or_none(lambda: not outside.trains and outside.genotype == genotype)
    return _searched(outside) if known else same[0] if same else None


def _network_name(network: dict, genotype: Genotype | None) -> str:
    """The backbone's name, a published genotype's, or the file's; a genotype that was typed in is told by its hash."""
    given = str(network.get("backbone") or network.get("genotype"))
    if genotype in GENOTYPES.values():
        return next(name for name, published in GENOTYPES.items() if published == genotype)
    if genotype is not None and "(" in given:
        return f"typed in, {hashlib.sha256(given.encode()).hexdigest()[:6]}"
    return given


def data_name(record: Record) -> str:
    """`cifar100`, or the last part of a path."""
    return Path(str(record.config.get("input", {}).get("data", "?"))).name


def _split(metrics: dict | None) -> str:
    return "test" if "test_accuracy" in (metrics or {}) else "validation"


def _accuracy(metrics: dict | None) -> float | None:
    metrics = metrics or {}
    return metrics.get("test_accuracy", metrics.get("val_accuracy"))


# -- showing -----------------------------------------------------------------------------------------------------------


def _groups(runs: Sequence[T], key: Callable[[T], K]) -> list[tuple[K, list[T]]]:
    return [(name, list(members)) for name, members in itertools.groupby(sorted(runs, key=key), key=key)]


def _short_names(records: Sequence[Record]) -> dict[Path, str]:
    """The shortest ends of the paths that tell them apart."""
    folders = {record.folder: record.folder.resolve().parts for record in records}
    for depth in range(1, max(map(len, folders.values())) + 1):
        names = {folder: "/".join(parts[-depth:]) for folder, parts in folders.items()}
        if len(set(names.values())) == len(set(folders.values())):
            break
    return names


def _search_table(searched: Sequence[Searched], short: dict[Path, str]) -> Markup:
    if not searched:
        return sentence("None of these runs is a search.", "note")
    rows = []
    for proxy, members in _groups(searched, lambda run: run.proxy):
        for run in members:
            skips = "–" if run.genotype is None else " and ".join(str(n) for n in run.genotype.skip_connections())
            cost = "–" if run.seconds is None else f"{number(run.seconds)} s"
            ratio = "–" if run.ratio is None else f"{run.ratio:.2f}×"
            rows.append((short[run.record.folder], proxy, run.seed, run.reliability, skips, cost, ratio))
    head = ("run", "proxy", "seed", "reliability", "skips", "all-in cost", "all-in speed-up, estimated")
    return table(head, rows, caption="Searches", text_columns=2)


def _network_table(trained: Sequence[TrainedNetwork], short: dict[Path, str]) -> Markup:
    if not trained:
        return missing("No accuracy is compared: none of these runs is a training.")
    rows = []
    for (images, origin, _), members in _groups(trained, lambda run: (run.images, run.origin, run.settings)):
        for run in members:
            costs = [run.result.get(name) for name in ("params_without_aux", "macs", "train_s")]
            search = "–" if run.search_seconds is None else f"{number(run.search_seconds)} s"
            last, best = ("–" if a is None else percent(a, 2) for a in (run.accuracy, run.best))
            counts = (number(costs[0]), number(costs[1]), f"{number(costs[2])} s")
            rows.append((short[run.record.folder], images, origin, run.seed, last, best, *counts, search))
        known = [run.accuracy for run in members if run.accuracy is not None]
        if len(known) > 1:
            spread = f"{percent(float(np.mean(known)), 2)} ± {100 * np.std(known, ddof=1):.2f}"
            rows.append((tag("b", f"mean of {len(known)}"), images, origin, "", tag("b", spread), *[""] * 5))
    head = (
        "run",
        "accuracy on",
        "genotype from",
        "seed",
        "last epoch",
        "best epoch",
        "parameters",
        "multiply-adds",
    )
    note = "Accuracies on other images do not compare; ± is the standard deviation over seeds."
    networks = table((*head, "training", "all-in search"), rows, caption="Trained networks", text_columns=3)
    return join([networks, sentence(note, "note")])


def _accuracy_chart(trained: Sequence[TrainedNetwork]) -> Markup:
    shown = [run for run in trained if run.accuracy is not None and run.search_seconds is not None]
    if not shown:
        return missing(
            "Accuracy against cost needs trained networks whose genotype came from a search with a cost.json."
        )
    figures = []
    for images, members in _groups(shown, lambda run: run.images):  # each on axes of its own
        series = [
            Series(origin, [run.search_seconds for run in group], [100 * run.accuracy for run in group])
            for (origin, _), group in _groups(members, lambda run: (run.origin, run.settings))
        ]
        title = f"Accuracy on {images}, against the all-in cost of the search"
        drawn = scatter_chart(title, series, "all-in search, seconds", "accuracy, %")
        how = "A mark is a trained network; bars are mean and standard deviation over the seeds of a group."
        figures.append(figure(title, drawn, how, legend([one.name for one in series]), class_="wide"))
    return gallery(*figures)


def _shared(searched: Sequence[Searched], trained: Sequence[TrainedNetwork], short: dict[Path, str]) -> Markup:
    """How many of their edges the genotypes have in common."""
    names: dict[Genotype, list[str]] = {}
    for run in (*searched, *trained):
        if run.genotype is not None:
            names.setdefault(run.genotype, []).append(short[run.record.folder])
    if len(names) < 2:
        return missing("Shared edges need two different genotypes.")
    genotypes = list(names)
    rows = []
    for i, one in enumerate(genotypes):
        counts = [one.shared_edges(other) for other in genotypes]
        cells = [
            tag(
                "span",
                "–" if i == j else n,
                class_="shade",
                style=f"--share:{0 if i == j else n / GENOTYPE_EDGES:.3f}",
            )
            for j, n in enumerate(counts)
        ]
        rows.append((f"{i + 1}  {', '.join(names[one])}", *cells))
    head = ("genotype", *(str(i + 1) for i in range(len(genotypes))))
    grid = table(head, rows, caption=f"Shared edges of {GENOTYPE_EDGES}")
    note = "Entries of the same cell, node, operation and input. Two random genotypes share 1.5 on average."
    return join([grid, sentence(note, "note")])
