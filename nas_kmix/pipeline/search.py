"""Stage four: search architectures on the two halves of a proxy dataset. Images in, `candidates.json` out.

Where no finals follow, `Unproved` writes `genotype.json` besides: the last genotype of the search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from darts_space import Genotype
from darts_space.cell import GENOTYPE_EDGES
from nas_kmix.engine import files
from nas_kmix.engine.data import ImageData
from nas_kmix.engine.keys import check_key, identity, stage_key
from nas_kmix.engine.run import Run
from nas_kmix.pipeline import candidates, history
from nas_kmix.pipeline.candidates import Candidate
from nas_kmix.pipeline.halves import Halves
from nas_kmix.pipeline.one_search import SearchConfig, say_how_long, search_once
from nas_kmix.pipeline.seeds import search_seeds
from nas_kmix.pipeline.stage import Key

NAME = "search"
FILE = candidates.FILE


class Searched(NamedTuple):
    """The candidates of the search, the entry first, and what they depend on.

    The provenance of several searches also says which one was `chosen`, as it shares most edges with the others.
    """

    candidates: list[Candidate]
    provenance: dict[str, Any]


def key(config: SearchConfig, halves: Halves, data: ImageData) -> Key:
    """What a search depends on, with settings resolved: steps, for example, instead of epochs."""
    epoch_steps = halves.epoch_steps(config.batch_size)
    resolved = asdict(config.bilevel("off", epoch_steps))
    del resolved["amp"]  # a search may resume on another device
    resolved["record_every"] = config.record_every or epoch_steps
    resolved["search_size"] = config.search_size or data.image_size
    return stage_key(NAME, identity(config) | resolved, {"data": data.fingerprint, "proxy": halves.identity})


def _keys(configs: Sequence[SearchConfig], halves: Halves, data: ImageData) -> list[Key]:
    return [key(one, halves, data) for one in configs]


def load(path: Path, config: SearchConfig, halves: Halves, data: ImageData, *, run: Run, key: Key | None) -> Searched:
    """The searched ones among the candidates in `path`."""
    found, provenance = candidates.load(path)
    check_key(path, provenance, key)
    if config.seeds == 1:
        history.say_if_gone(path, run)
    return Searched([one for one in found if one.searched], provenance)


def make(path: Path, config: SearchConfig, halves: Halves, data: ImageData, *, run: Run, key: Key) -> Searched:
    """Search once, or with several seeds."""
    bilevel = config.bilevel("off", halves.epoch_steps(config.batch_size))
    say_how_long(bilevel, config, halves, data, run)
    provenance = dict(key)
    if config.seeds == 1:
        genotypes = [search_once(NAME, path.parent, config, halves, data, run=run, key=key)]
        records = [history.read_history(path.parent)]
    else:
        seeds = [replace(config, seeds=1, seed=config.seed + i) for i in range(config.seeds)]
        genotypes = search_seeds(seeds, _keys(seeds, halves, data), halves, data, run=run)
        records = [history.read_history(run.path(f"seed-{i}")) for i in range(config.seeds)]
        provenance |= _chosen(genotypes, run)
    rows = [one or [(bilevel.arch_steps, genotype)] for one, genotype in zip(records, genotypes, strict=True)]
    found = candidates.of_records(rows)
    if run.world.main:
        candidates.save(path, found, provenance)
    return Searched(found, provenance)


def _chosen(genotypes: Sequence[Genotype], run: Run) -> dict[str, Any]:
    """Which of several searches shares most edges with the others, for the provenance."""
    shared = [sum(one.shared_edges(other) for other in genotypes) - GENOTYPE_EDGES for one in genotypes]
    chosen = int(np.argmax(shared))
    mean = shared[chosen] / (len(genotypes) - 1)
    run.say(f"seeds: seed-{chosen} shares the most edges with the others, on average {mean:.1f} of {GENOTYPE_EDGES}")
    return {"chosen": f"seed-{chosen}", "shared_edges": shared}


class Unproved:
    """`genotype.json` without finals, as a stage of its own: what the search ended with.

    Of several searches it is the one that shares most edges with the others.
    """

    NAME, FILE, ALONE = NAME, "genotype.json", True

    @staticmethod
    def key(config: SearchConfig, searched: Searched, halves: Halves, data: ImageData) -> Key:
        return key(config, halves, data)

    @staticmethod
    def load(path: Path, config: SearchConfig, *inputs: Any, run: Run, key: Key | None) -> Genotype:
        genotype, provenance = Genotype.load(path), files.read_json(path).get("provenance")
        if isinstance(provenance, dict) and provenance.get("stage") == "finals":
            raise ValueError(f"{path} is the winner of finals; add --finals, or choose another --out.")
        check_key(path, provenance, key)
        return genotype

    @staticmethod
    def make(path: Path, config: SearchConfig, searched: Searched, *inputs: Any, run: Run, key: Key) -> Genotype:
        seed = int(str(searched.provenance.get("chosen", "seed-0")).removeprefix("seed-"))
        last = [one for one in searched.candidates if one.seed == seed]
        last[0].genotype.save(path, provenance=searched.provenance)
        return last[0].genotype
