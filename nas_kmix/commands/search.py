"""The command search.py: run the stages in order, and print and write what goes with them."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor

from darts_space import Genotype
from nas_kmix.analysis.report import write_report_of_run
from nas_kmix.engine import bad_files, cli, files
from nas_kmix.engine.bad_files import BadFileList
from nas_kmix.engine.data import ImageData, load_data
from nas_kmix.engine.distributed import is_main
from nas_kmix.engine.keys import StageMismatchError
from nas_kmix.engine.progress import duration
from nas_kmix.engine.run import Run, open_run
from nas_kmix.engine.sources import located
from nas_kmix.pipeline import history, proxy, scorer, scores, search
from nas_kmix.pipeline.config import (
    ALL_IMAGES,
    PRESETS,
    Config,
    check_flags,
    check_later_stages,
    check_memory,
    without_effect,
)
from nas_kmix.pipeline.stage import obtain
from nas_kmix.proxy import ProxyManifest
from nas_kmix.scores import ScoreTable, verdict

STAGES = (scorer.NAME, scores.NAME, proxy.NAME, search.NAME)
RESULTS = (scorer.FILE, scores.FILE, proxy.FILE, search.FILE, *history.FILES, bad_files.FILE)
FILES = (*RESULTS, "report.html", *(f"seed-*/{name}" for name in RESULTS))
COMPARED_BY = ("search/val_loss", "search/entropy_normal", "search/pools_normal")  # of runs, by TensorBoard
OPENED = {"stages": STAGES, "results": FILES, "compared_by": COMPARED_BY}
PICTURES = 5  # of the architecture, shown by TensorBoard during a search


@dataclass(frozen=True)
class Result:
    """What a run produced; None for stages that it did not reach or need."""

    folder: Path
    table: ScoreTable | None = None
    proxy: ProxyManifest | None = None
    genotype: Genotype | None = None


def run(config: Config) -> Result:
    """Run the stages in the folder `config.out`, skipping those whose results are up to date.

    Raises ValueError (bad input, with the remedy), StageMismatchError, StoppedError, NonFiniteLossError, OSError.
    """
    check_flags(config)
    config = replace(config.spread(), input=replace(config.input, data=located(config.input.data)))
    with open_run(config.out, asdict(config), config.device, **OPENED) as run:
        data = load_data(config.input, device=run.compute.device, workers=config.device.workers)
        check_later_stages(config, data)
        config.scorer.mix.check_processes(run.world.size)
        check_memory(config, data, run)
        if config.fresh:
            run.clear()
        run.say(
            f"{data.source.name}: {len(data)} training images of {data.num_classes} classes, "
            f"{data.image_size} px, {'resident' if data.resident else 'streamed'} on {run.compute.device}"
        )
        if config.report:
            _show_architectures(run)
        try:
            result = _stages(config, data, run)
            run.finish()
            _list_bad_images(data, run)
            if config.report and run.world.main and (run.ledger.started or _report_is_old(run)):
                run.say(write_report_of_run(run.folder, data))
            return result
        except BaseException:
            if run.ledger.started:  # a refused command leaves the folder as it was
                _list_bad_images(data, run)
            raise


def _stages(config: Config, data: ImageData, run: Run) -> Result:
    """Scorer, scores, proxy, genotype: each is given, found or made, up to `--stop-after`."""
    result, given = Result(run.folder), config.given
    if config.uses_scores:
        trained = None
        if given.scores is None:
            trained = obtain(scorer, config.scorer, data, run=run, given=given.scorer)
        if config.stop_after == "scorer":
            return result
        table = obtain(scores, config.scoring, trained, data, run=run, given=given.scores)
        result = replace(result, table=table)
        if config.stop_after == "scores":
            return result
    if not run.go_on_alone():
        return result
    if given.proxy is not None and (flags := without_effect(config)):
        run.say(f"with --proxy {given.proxy} these flags have no effect: {', '.join(flags)}")
    if given.proxy == ALL_IMAGES:
        halves = search.Halves.of_all_images(data, config.selection.arch_share, seed=config.seed)
    else:
        chosen = obtain(proxy, config.selection, result.table, data, run=run, given=given.proxy)
        if config.export_list is not None:
            chosen.export_list(config.export_list)
        result = replace(result, proxy=chosen)
        if config.stop_after == "proxy":
            return result
        if len(chosen.arch) == 0:
            place = given.proxy or run.path(proxy.FILE)
            raise ValueError(f"{place} has no image to train the architecture; make one at a larger --ratio.")
        halves = search.Halves.of_proxy(chosen)
    return replace(result, genotype=obtain(search, config.search, halves, data, run=run))


# -- around the stages -------------------------------------------------------------------------------------------------


def _show_architectures(run: Run) -> None:
    """Show the architecture in TensorBoard after the first record, the last, and a few in between."""

    def show(name: str, step: int, tables: Sequence[Mapping[str, Tensor]], genotype: Genotype, *, records: int) -> None:
        if len(tables) == records or (len(tables) - 1) % max(1, records // PICTURES) == 0:
            from nas_kmix.analysis import live  # matplotlib takes a while to import

            for title, pixels in live.pictures(tables, genotype).items():
                run.log.add_picture(name, step, title, pixels)

    run.on_record = show


def _report_is_old(run: Run) -> bool:
    """Whether the report is missing or older than its results."""
    report = run.path("report.html")
    results = [path for path in map(run.path, RESULTS) if path.exists() and path.suffix != ".txt"]
    return not report.exists() or any(path.stat().st_mtime > report.stat().st_mtime for path in results)


def _list_bad_images(data: ImageData, run: Run) -> None:
    if run.world.main and (count := BadFileList([data]).write(run.folder)):
        path = run.path(bad_files.FILE)
        run.say(f"warning: {count} files cannot be read and are left out; {path} lists them")


def _reliability(table: ScoreTable, measure: str) -> str:
    value, draws = table.reliability(measure), table.losses.shape[1]
    if math.isnan(value):
        few = f"{draws} draws of {len(table.index)} images are too few, or all have the same {measure}"
        return f"unknown: {'no draws of mixes are behind ' + measure if measure in table.columns else few}"
    name = measure.upper() if measure == "cv" else measure
    return (
        f"{value:.2f} for the {name} ranking over {draws} draws "
        f"({verdict(value)}; at 1.00, new draws give the same ranking)"
    )


def _summary(config: Config, result: Result, argv: Sequence[str]) -> str:
    """The summary that a run ends with."""
    lines = []
    folder = result.folder
    if result.genotype is not None:
        lines += [result.genotype.to_text(), f"genotype     {folder / search.FILE}"]
    if result.proxy is not None and config.given.proxy is None:
        lines.append(f"proxy        {folder / proxy.FILE}, {len(result.proxy.indices)} of {result.proxy.n} images")
    if result.table is not None:
        lines.append(f"reliability  {_reliability(result.table, config.selection.measure)}")
    costs = files.read_json(folder / "cost.json")
    parts = [f"{name} {duration(cost['wall_s'])}" for name, cost in costs["stages"].items() if cost["wall_s"] > 0]
    lines.append(f"cost         {duration(costs['total']['wall_s'])} ({', '.join(parts)})")
    if result.genotype is not None:
        picture = ["--picture", str(folder / "cells.png")]
        next_command = ["-m", "nas_kmix.analysis.cells", str(folder / search.FILE), *picture]
    elif result.proxy is not None:
        path = folder / proxy.FILE if config.given.proxy is None else config.given.proxy
        next_command = ["search.py", *rest_of(argv), "--proxy", str(path), "--out", f"{folder}-search"]
    else:
        return "\n".join(lines)
    lines.append(f"next         python {shlex.join(next_command)}")
    return "\n".join(lines)


def rest_of(argv: Sequence[str]) -> list[str]:
    """The flags of a command that stopped at its proxy, without those that the search on this proxy replaces."""
    replaced = ("--stop-after", "--export-list", "--out", "--scorer", "--scores", "--proxy")
    rest, skip = [], False
    for argument in argv:
        flag, equals, _ = argument.partition("=")
        flag = flag.replace("_", "-")  # tyro takes both
        if skip:
            skip = False
        elif flag in replaced:
            skip = not equals  # its value follows
        elif argument != "--fresh":
            rest.append(argument)
    return rest


REUSE = {scores.NAME: ("scorer", scorer.FILE), proxy.NAME: ("scores", scores.FILE), search.NAME: ("proxy", proxy.FILE)}


def _remedy(config: Config, error: StageMismatchError) -> str:
    """How to go on if a file made with other settings is in the way, without losing the stages before it."""
    flag, name = REUSE.get(error.stage, ("", ""))
    given = getattr(config.given, flag) if flag else None
    earlier = given or config.out / name
    reuse = f" --{flag} {earlier}" if flag and earlier.exists() else ""
    return (
        f"Start over with --fresh, or keep the file and run the same command with --out {config.out}-2{reuse}"
        f"{' to reuse the stages before it' if reuse else ''}."
    )


def parse(argv: Sequence[str], description: str | None = __doc__) -> Config:
    return cli.parse(PRESETS, argv, description)


def main(argv: Sequence[str] | None = None, description: str | None = __doc__) -> int:
    """Run and turn every expected failure into one sentence. Exit codes: 0, 1, 2 (bad usage), 130 and 143 (signals)."""
    argv = sys.argv[1:] if argv is None else argv
    config = None

    def work() -> None:
        nonlocal config
        config = parse(argv, description)
        result = run(config)
        if is_main():
            print(_summary(config, result, argv))

    batch_sizes = "the batch size of the stage (--batch-size, --scorer.batch-size, --scoring.batch-size)"
    return cli.exit_code(work, lambda error: _remedy(config, error), batch_sizes=batch_sizes)
