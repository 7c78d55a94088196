"""Stage four: search an architecture on the two halves of a proxy dataset. Images in, `genotype.json` out."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from darts_space import Genotype
from darts_space.cell import GENOTYPE_EDGES
from nas_kmix.engine import files
from nas_kmix.engine.data import ImageData
from nas_kmix.engine.keys import check_key, identity, stage_key
from nas_kmix.engine.run import Run
from nas_kmix.pipeline import history
from nas_kmix.pipeline.halves import Halves
from nas_kmix.pipeline.one_search import SearchConfig, say_how_long, search_once
from nas_kmix.pipeline.stage import Key, obtain

NAME = "search"
FILE = "genotype.json"


def key(config: SearchConfig, halves: Halves, data: ImageData) -> Key:
    """What a search depends on, with settings resolved: steps, for example, instead of epochs."""
    epoch_steps = halves.epoch_steps(config.batch_size)
    resolved = asdict(config.bilevel("off", epoch_steps))
    del resolved["amp"]  # a search may resume on another device
    resolved["record_every"] = config.record_every or epoch_steps
    resolved["search_size"] = config.search_size or data.image_size
    return stage_key(NAME, identity(config) | resolved, {"data": data.fingerprint, "proxy": halves.identity})


def load(path: Path, config: SearchConfig, halves: Halves, data: ImageData, *, run: Run, key: Key | None) -> Genotype:
    """The genotype in `path`."""
    genotype = Genotype.load(path)
    check_key(path, files.read_json(path).get("provenance"), key)
    for name in history.FILES if config.seeds == 1 else ():
        if not path.with_name(name).exists():
            run.say(f"warning: {path.with_name(name)} is gone; remove {path.name} to search again and get both")
    return genotype


def make(path: Path, config: SearchConfig, halves: Halves, data: ImageData, *, run: Run, key: Key) -> Genotype:
    """Search once; or search with several seeds, and choose the genotype that shares most edges with the others."""
    say_how_long(config.bilevel("off", halves.epoch_steps(config.batch_size)), config, data, run)
    if config.seeds == 1:
        return search_once(NAME, path, config, halves, data, run=run, key=key)
    genotypes = []
    for i in range(config.seeds):
        one = replace(config, seeds=1, seed=config.seed + i)
        genotypes.append(obtain(OneSeed(i), one, halves, data, run=run))
    shared = [sum(one.shared_edges(other) for other in genotypes) - GENOTYPE_EDGES for one in genotypes]
    chosen = int(np.argmax(shared))
    mean = shared[chosen] / (config.seeds - 1)
    run.say(
        f"seeds: chose seed-{chosen}, which shares the most edges with the others, on average {mean:.1f} of "
        f"{GENOTYPE_EDGES}"
    )
    if run.world.main:
        genotypes[chosen].save(path, provenance={**key, "chosen": f"seed-{chosen}", "shared_edges": shared})
    return genotypes[chosen]


class OneSeed:
    """One of several searches, as a stage of its own in the subfolder seed-N."""

    key, load = staticmethod(key), staticmethod(load)

    def __init__(self, number: int):
        self.NAME, self.FILE = f"{NAME}/seed-{number}", f"seed-{number}/{FILE}"

    def make(self, path: Path, *inputs: Any, run: Run, key: Key) -> Genotype:
        return search_once(self.NAME, path, *inputs, run=run, key=key)
