"""The page: the sections of one or several runs, under a heading with the most important results."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from importlib import resources
from typing import NamedTuple

from nas_kmix.analysis.report import cells, compare, cost, extras, finals, mixes, proxy, search
from nas_kmix.analysis.report.markup import Markup, escape, join, missing, number, percent, plural, sentence, tag
from nas_kmix.analysis.report.parts import UNREADABLE
from nas_kmix.analysis.report.record import Record
from nas_kmix.engine.progress import duration
from nas_kmix.version import __version__

SPLITS = {"test": "test", "val": "validation"}
LARGEST_PAGE = 4_800_000  # bytes, below the five million that mail programs take without asking


class Section(NamedTuple):
    """A part of the page: of every run that can have it, a block under the run's name."""

    title: str
    build: Callable[[Record], Markup]
    applies: Callable[[Record], bool]


def _is_search(record: Record) -> bool:
    return extras.is_run(record) and not record.trains


SECTIONS: dict[str, Section] = {
    "cells": Section("Cells", cells.section, cells.applies),
    "search": Section("Search", search.section, _is_search),
    "finals": Section("Finals", finals.section, _is_search),
    "training": Section("Training", search.training, lambda record: record.trains),
    "proxy": Section("Proxy dataset", proxy.section, _is_search),
    "mixes": Section("Mixed images", mixes.section, mixes.applies),
    "cost": Section("Cost", cost.section, extras.is_run),
    "landscape": Section(
        "Loss landscape", extras.landscape, lambda record: record.trains or bool(extras.landscapes(record))
    ),
    "robustness": Section("Robustness", extras.robustness, lambda record: record.trains or bool(extras.tables(record))),
}


def document(records: Sequence[Record]) -> str:
    """A whole HTML document of at most 4.8 MB: what does not fit is left out, and the page says so."""
    blocks: dict[str, list[tuple[Record, Markup]]] = {key: [] for key in SECTIONS}
    size = 0
    for record in records:
        for key, section in SECTIONS.items():
            if not section.applies(record):
                continue
            block = section.build(record)
            size += len(block.encode())
            if size > LARGEST_PAGE:
                size -= len(block.encode())
                block = missing(f"Left out, as the page would be too large to send; give {record.name} alone.")
            blocks[key].append((record, block))
    titles, body = {}, []
    runs = [record for record in records if extras.is_run(record)]
    if len(runs) > 1:  # what the reader of several came for
        titles["compare"] = "Comparison"
        body.append(_section("compare", titles["compare"], compare.section(runs)))
    for key, found in blocks.items():
        if found:
            titles[key] = SECTIONS[key].title
            body.append(_section(key, titles[key], _of_runs(found, alone=len(records) == 1)))
    names = ", ".join(record.name for record in records)
    links = [tag("a", title, href=f"#{key}") for key, title in titles.items()]
    style = resources.files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"nas_kmix: {names}"),
        tag("style", Markup(style)),
    ]
    header = tag("header", tag("p", "nas_kmix report", class_="kind"), *_heading(records), tag("nav", *links))
    footer = tag("footer", f"nas_kmix {__version__}. Colours: Okabe and Ito’s palette, blue to orange, and cividis.")
    html = tag("html", tag("head", *head), tag("body", header, tag("main", *body), footer), lang="en")
    return f"<!doctype html>\n{html}\n"


def _section(key: str, title: str, content: Markup) -> Markup:
    return tag("section", tag("h2", title), content, id=key)


def _of_runs(blocks: Sequence[tuple[Record, Markup]], *, alone: bool) -> Markup:
    """The blocks of several runs, each under the name of its run."""
    if alone:
        return blocks[0][1]
    return join(join([tag("h3", record.name), block]) for record, block in blocks)


# -- heading -----------------------------------------------------------------------------------------------------------


def _heading(records: Sequence[Record]) -> list[Markup]:
    if len(records) > 1:
        runs = tag("ul", *(tag("li", tag("code", record.name)) for record in records))
        return [tag("h1", f"{len(records)} runs compared"), runs]
    record = records[0]
    return [tag("h1", record.folder.resolve().name), _origin(record), tag("dl", *_tiles(record), class_="tiles")]


def _origin(record: Record) -> Markup:
    """The command and the machine."""
    try:
        environment = record.environment
        with record.reading("env.json"):
            packages = environment["packages"]
            start, *flags = map(str, environment["command"])
            command = tag("pre", f"{'python ' if start.endswith('.py') else ''}{start} {shlex.join(flags)}")
            place = environment["gpu"] or f"{environment['processor']} CPU, {plural(environment['threads'], 'thread')}"
            commit = environment["commit"]
            versions = f"torch {packages['torch']}, Python {environment['python']}"
    except ValueError as error:
        return missing(error)
    written_at = f", commit {str(commit)[:10]}" if commit else ""
    return join([command, sentence(f"{_when(record)}{place}; {versions}{written_at}.", "note")])


def _when(record: Record) -> str:
    """When the run began and how long its stages took; runs of earlier versions know the latter alone."""
    began = str(record.environment.get("date", ""))[:16].replace("T", " ")
    try:
        took = f"took {duration(cost.all_in_seconds(record))}; "
    except UNREADABLE:
        took = ""
    return f"Began on {began} UTC, {took}" if began else took.capitalize()


def _tiles(record: Record) -> list[Markup]:
    """The few numbers that a reader looks for first; unknown ones are left out."""
    tiles = []
    for title, read in (_TRAIN_TILES if record.trains else _SEARCH_TILES).items():
        try:
            value, about = read(record)
        except UNREADABLE:
            continue  # the section that shows it says why
        tiles.append(tag("div", tag("dt", title), tag("dd", tag("b", value), tag("span", escape(about)))))
    return tiles


def _proxy_tile(record: Record) -> tuple[str, str]:
    share = percent(len(record.proxy.indices) / record.proxy.n)
    return f"{len(record.proxy.indices):,}", f"of {record.proxy.n:,} images, {share}"


def _reliability_tile(record: Record) -> tuple[str, str]:
    found = proxy.reliability(record)
    return found.figure, f"of the ranking: {found.meaning}"


def _cost_tile(record: Record) -> tuple[str, str]:
    billed = [cost.wall_s for cost in record.costs.values() if cost.wall_s > 0]
    return duration(sum(billed)), f"{len(billed)} stage{'s' if len(billed) != 1 else ''}, all billed"


def _speed_tile(record: Record) -> tuple[str, str]:
    found = cost.speed_up(record)
    return f"{found.all_in:.2f}×", f"estimated, all in; {found.without_scorer:.2f}× without the scorer"


def _skips_tile(record: Record) -> tuple[str, str]:
    normal, reduction = record.genotype.skip_connections()
    return f"{normal} and {reduction}", "skip connections, normal and reduction cell"


def _accuracy_tile(record: Record) -> tuple[str, str]:
    with record.reading("result.json"):
        metrics = record.result["last"]
        split = "test" if "test_accuracy" in metrics else "val"
        return percent(metrics[f"{split}_accuracy"], 2), f"{SPLITS[split]} accuracy, last epoch"


def _parameters_tile(record: Record) -> tuple[str, str]:
    with record.reading("result.json"):
        return number(record.result["params_without_aux"]), f"parameters, {number(record.result['macs'])} multiply-adds"


_SEARCH_TILES = {
    "Proxy": _proxy_tile,
    "Reliability": _reliability_tile,
    "Cost": _cost_tile,
    "Speed-up": _speed_tile,
    "Skips": _skips_tile,
}
_TRAIN_TILES = {"Accuracy": _accuracy_tile, "Size": _parameters_tile, "Cost": _cost_tile}
