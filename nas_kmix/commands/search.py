"""Search for an architecture on a proxy dataset: images in, `genotype.json` and `result.json` out.

    nas-kmix search --out runs/digits                                # handwritten digits, a minute on two cores
    nas-kmix search --preset cpu --data cifar100 --out runs/c100     # a small scorer and supernet

search.py is the same command. Its stages run in order; run the same command again to resume.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from darts_space import Genotype, read_genotype
from nas_kmix.analysis.report import write_report_of_run
from nas_kmix.commands import dry_run
from nas_kmix.commands.summary import of_images, of_search
from nas_kmix.engine import bad_files, cli
from nas_kmix.engine.bad_files import BadFileList
from nas_kmix.engine.data import ImageData, load_data
from nas_kmix.engine.datasets import check_run_folder
from nas_kmix.engine.distributed import is_main
from nas_kmix.engine.keys import StageMismatchError
from nas_kmix.engine.log import OnLog
from nas_kmix.engine.run import Run, open_run
from nas_kmix.pipeline import finals, history, proxy, scorer, scores, search
from nas_kmix.pipeline.checks import check_flags, check_forgetting, check_later_stages, check_memory, without_effect
from nas_kmix.pipeline.config import ALL_IMAGES, PRESETS, Config
from nas_kmix.pipeline.halves import Halves
from nas_kmix.pipeline.stage import obtain
from nas_kmix.proxies import locate
from nas_kmix.proxy import ProxyManifest
from nas_kmix.scores import ScoreTable

STAGES = (scorer.NAME, scores.NAME, proxy.NAME, search.NAME, finals.NAME)
RESULTS = (scorer.FILE, scores.FILE, proxy.FILE, *history.FILES, *finals.FILES, finals.FILE, bad_files.FILE)
FILES = (*RESULTS, "report.html", *(f"seed-*/{name}" for name in RESULTS))
COMPARED_BY = ("search/val_loss", "search/entropy_normal", "search/pools_normal")  # of runs, by TensorBoard
OPENED = {"stages": STAGES, "results": FILES, "compared_by": COMPARED_BY}
PICTURES = 5  # of the architecture, shown by TensorBoard during a search


@dataclass(frozen=True)
class Result:
    """What a run produced; None for stages that it did not reach or need."""

    folder: Path
    image_size: int
    """Side of the images in pixels."""
    table: ScoreTable | None = None
    proxy: ProxyManifest | None = None
    genotype: Genotype | None = None
    finals: dict[str, Any] | None = None
    """What `result.json` says."""

    def __repr__(self) -> str:
        """Without the thousands of numbers of its tables."""
        found = {
            "genotype": self.genotype and self.genotype.to_text(),
            "verdict": self.finals and self.finals["verdict"],
            "proxy": self.proxy and f"{len(self.proxy.indices)} of {self.proxy.n} images",
            "table": self.table and f"scores of {len(self.table.index)} images",
        }
        parts = [f"folder={str(self.folder)!r}", *(f"{name}={text!r}" for name, text in found.items() if text)]
        return f"Result({', '.join(parts)})"


def run(config: Config, *, on_log: OnLog | None = None) -> Result:
    """Run the stages in the folder `config.out`, skipping those whose results are up to date.

    `on_log(stage, step, values)` hears of every row of the log.

    Raises ValueError (bad input, with the remedy), StageMismatchError, StoppedError, NonFiniteLossError, OSError.
    """
    check_flags(config)
    unused = list(without_effect(config))
    config = config.spread().located()
    watched = {"on_log": on_log, "quiet": config.quiet}
    check_run_folder(config.out, config.input.data)
    with open_run(config.out, asdict(config), config.device, **OPENED, **watched) as run:
        data = load_data(config.input, device=run.compute.device, workers=config.device.workers)
        check_later_stages(config, data)
        config.scorer.mix.check_processes(run.world.size)
        check_memory(config, data, run)
        if config.fresh:
            run.clear()
        run.say(of_images(data, len(data), config.augmentation))
        for sentence in unused:
            run.say(sentence)
        if config.report:
            _show_architectures(run)
        try:
            result = _stages(config, data, run)
            run.finish()
            _list_bad_images(BadFileList([data], run.world), run)
            if config.report and run.world.main and (run.ledger.started or _report_is_old(run)):
                run.say(write_report_of_run(run.folder, data))
            return result
        except BaseException:
            if run.ledger.started and run.world.main:  # a refused command leaves the folder as it was
                _list_bad_images(BadFileList([data]), run)
            raise


def _stages(config: Config, data: ImageData, run: Run) -> Result:
    """Scorer, scores, proxy, search, finals: each is given, found or made, up to `--stop-after`."""
    result, given = Result(run.folder, data.image_size), config.given
    if config.uses_scores:
        trained = None
        if given.scores is None:
            trained = scorer.from_elsewhere(given.scorer, config.scorer, data, run=run)
            trained = trained or obtain(scorer, config.scorer, data, run=run, given=given.scorer)
            check_forgetting(config, trained)
        if config.stop_after == "scorer":
            return result
        table = obtain(scores, config.scoring, trained, data, run=run, given=given.scores)
        result = replace(result, table=table)
        if config.stop_after == "scores":
            return result
    if given.proxy == ALL_IMAGES:
        halves = Halves.of_all_images(data, config.selection.arch_share, seed=config.seed)
    else:
        file = None if given.proxy is None else locate(given.proxy)
        chosen = obtain(proxy, config.selection, result.table, data, run=run, given=file)
        if config.export_list is not None and run.world.main:
            chosen.export_list(config.export_list)
        result = replace(result, proxy=chosen)
        if config.stop_after == "proxy":
            return result
        if len(chosen.arch) == 0:
            place = given.proxy or run.path(proxy.FILE)
            raise ValueError(f"{place} has no image to train the architecture; make one at a larger --ratio.")
        halves = Halves.of_proxy(chosen)
    if not config.with_finals:
        searched = obtain(search, config.search, halves, data, run=run)
        genotype = obtain(search.Unproved(), config.search, searched, halves, data, run=run)
        return replace(result, genotype=genotype)
    roles = finals.divide(data, halves.weights, halves.arch, config.finals)  # refuses before anything is searched
    named = {text: read_genotype(text) for text in config.candidates}
    searched = obtain(search, config.search, halves, data, run=run)
    entrants = finals.entrants(searched.candidates, searched.provenance, named, config.finals, data)
    proved = obtain(finals, config.finals, entrants, roles, data, run=run)
    return replace(result, genotype=proved.genotype, finals=proved.result)


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


def _list_bad_images(bad: BadFileList, run: Run) -> None:
    if count := bad.write(run.folder):
        path = run.path(bad_files.FILE)
        run.say(f"warning: {count} files cannot be read and are left out; {path} lists them")


REUSE = {scores.NAME: ("scorer", scorer.FILE), proxy.NAME: ("scores", scores.FILE), search.NAME: ("proxy", proxy.FILE)}


def _remedy(config: Config, error: StageMismatchError) -> str:
    """How to go on if a file made with other settings is in the way, without losing the stages before it."""
    if error.stage == finals.NAME:
        return "Remove that file to repeat the finals of the same search, use --fresh, or choose another --out."
    flag, name = REUSE.get(error.stage, ("", ""))
    given = getattr(config.given, flag) if flag else None
    earlier = given or config.out / name
    usable = flag and earlier.exists() and (flag != "scores" or config.uses_scores)
    typed = [start for start in ("scorer", "scores", "proxy") if getattr(config.given, start) and start != flag]
    instead = f" instead of --{typed[0]}" if typed else ""
    reuse = f" --{flag} {earlier}{instead}" if usable else ""
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
        if config.invocation.dry_run:
            Run(config.out, **OPENED).check_folder()
            said = "\n".join(dry_run.of_search(config))
            if is_main():
                print(said)
            return
        result = run(config)
        if is_main():
            print(of_search(config, result, argv))

    batch_sizes = (
        "the batch size of the stage (--batch-size, --scorer.batch-size, --scoring.batch-size), or in the finals "
        "--finals.batch-size and --jobs"
    )
    return cli.exit_code(work, lambda error: _remedy(config, error), batch_sizes=batch_sizes)
