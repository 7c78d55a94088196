"""Several searches on the same proxy: side by side wherever there is room, otherwise in turn.

In:  the config and the key of each, the halves, the images. Out: the genotypes; genotype and history lie in seed-N.

If there are at least as many searches as processes, each process takes whole searches. A single process on a CPU hands
them to child processes of one thread each (`--jobs`). Each of these searches is a run of its own in its subfolder, with
ledger, log and checkpoint, which the run adopts in the end; what it finds is the same wherever it runs. Otherwise, with
fewer searches than processes or with a single GPU, all processes share one search after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from darts_space import Genotype
from nas_kmix.engine import files
from nas_kmix.engine.bad_files import BadFiles
from nas_kmix.engine.children import run_in_children
from nas_kmix.engine.compute import Compute, DeviceConfig, pick_compute
from nas_kmix.engine.data import ImageData
from nas_kmix.engine.keys import check_key
from nas_kmix.engine.run import Run, StoppedError, checkpoint_name
from nas_kmix.pipeline.halves import Halves
from nas_kmix.pipeline.history import say_if_gone
from nas_kmix.pipeline.one_search import SearchConfig, search_once
from nas_kmix.pipeline.stage import Key

STAGE = "search"  # that is billed
FILE = "genotype.json"


class _Task(NamedTuple):
    """One search: its subfolder, seed-N, its config and its key."""

    folder: Path
    config: SearchConfig
    key: Key

    @property
    def name(self) -> str:
        return f"{STAGE}/{self.folder.name}"

    @property
    def file(self) -> Path:
        return self.folder / FILE

    def load(self, run: Run) -> Genotype:
        genotype = Genotype.load(self.file)
        check_key(self.file, files.read_json(self.file).get("provenance"), self.key)
        say_if_gone(self.file, run)
        return genotype

    def search(self, halves: Halves, data: ImageData, run: Run) -> None:
        """Search in `run`, and write the genotype."""
        genotype = search_once(self.name, self.folder, self.config, halves, data, run=run, key=self.key)
        if run.world.main:
            genotype.save(self.file, provenance=self.key)
        run.remove_checkpoint(checkpoint_name(self.name))

    def search_apart(self, halves: Halves, data: ImageData, compute: Compute, *, quiet: bool) -> None:
        """Search in a run of its own."""
        with Run(self.folder, stages=(STAGE,), compute=compute, quiet=quiet) as own:
            self.search(halves, data, own)


def search_seeds(
    configs: Sequence[SearchConfig], keys: Sequence[Key], halves: Halves, data: ImageData, *, run: Run
) -> list[Genotype]:
    """Search with every config whose result is not there yet, and return all genotypes.

    Raises StageMismatchError for a result with another key, before anything is searched.
    """
    tasks = [_Task(run.path(f"seed-{i}"), *pair) for i, pair in enumerate(zip(configs, keys, strict=True))]
    open_tasks = []
    for task in tasks:
        if run.world.highest(task.file.exists())[0]:  # all agree before one of them may write it
            task.load(run)
            run.say(f"{task.name}: {task.file} is up to date, skipped")
        else:
            open_tasks.append(task)
    dealt = run.world.deals_out(len(tasks))
    if dealt or (run.world.size == 1 and run.compute.device.type == "cpu"):
        with run.stage(STAGE) as cost:
            if dealt:
                for task in open_tasks[run.world.rank :: run.world.size]:
                    task.search_apart(halves, data, run.compute, quiet=run.quiet)
                run.world.barrier()
            else:
                searcher = _Searcher.of(halves, data, run)
                try:
                    run_in_children(searcher, open_tasks, jobs=configs[0].jobs, check=run.raise_if_stopping)
                except StoppedError as stopped:  # the children save their state once a minute
                    raise StoppedError(stopped.signum, saved=False) from None
            bills = [_bill(task.folder) for task in tasks]
            cost.images_forward, cost.images_backward = (sum(bill[i] for bill in bills) for i in (0, 1))
        for task in tasks:
            run.log.adopt(task.folder)
    else:
        for task in open_tasks:
            task.search(halves, data, run)
        run.world.barrier()  # rank 0 alone writes the last genotype
    return [task.load(run) for task in tasks]


def _bill(folder: Path) -> tuple[int, int]:
    """Forward and backward passes of a search that was a run of its own."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        bill = files.read_json(folder / "cost.json")["stages"][STAGE]
        return int(bill["images_forward"]), int(bill["images_backward"])
    return 0, 0


@dataclass(frozen=True, eq=False)
class _Searcher:
    """Searches in a child process. Make it with `_Searcher.of`."""

    halves: Halves
    data: ImageData
    """The images of the halves."""
    pixels: np.ndarray | None
    """Those of a resident set, uint8 (N, 3, S, S)."""
    device: DeviceConfig
    quiet: bool

    @classmethod
    def of(cls, halves: Halves, data: ImageData, run: Run) -> _Searcher:
        needed = np.union1d(halves.weights, halves.arch)
        places = (np.searchsorted(needed, part) for part in (halves.weights, halves.arch))
        part = replace(data, source=data.source.part(needed), images=None, workers=0, bad=BadFiles())
        compute = run.compute
        device = DeviceConfig(str(compute.device), threads=1, amp=compute.amp, channels_last=compute.channels_last)
        pixels = data.images[torch.from_numpy(needed)].numpy() if data.resident else None
        return cls(Halves(*places, halves.identity), part, pixels, device, run.quiet)

    def __call__(self, task: _Task) -> None:
        data: Any = self.data
        if self.pixels is not None:
            data = replace(data, images=torch.from_numpy(self.pixels))
        task.search_apart(self.halves, data, pick_compute(self.device), quiet=self.quiet)
