"""The history of a search: `genotypes.jsonl`, one line per record, and `alphas.npz`, the tables of every record."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from darts_space import ARCHITECTURE_NAMES, Genotype, Search
from darts_space.derivation import EdgesBy
from nas_kmix.engine import files

FILES = ("genotypes.jsonl", "alphas.npz")

Row = Mapping[str, Any]
"""A record: steps and architecture steps so far, the genotype as JSON, its diagnostics and its tables."""


def row_of(search: Search, edges_by: EdgesBy) -> Row:
    """The record of the current state."""
    return {
        "step": search.steps_done,
        "arch_step": search.steps_done - search.config.rest_steps,
        "genotype": json.dumps(search.model.genotype(edges_by).to_json()),
        "diagnostics": search.model.diagnostics(edges_by)._asdict(),
        "tables": {name: getattr(search.model, name).detach().cpu().clone() for name in ARCHITECTURE_NAMES},
    }


def genotype_of(row: Row) -> Genotype:
    return Genotype.from_json(json.loads(row["genotype"]))


def write_history(rows: Sequence[Row], folder: Path) -> None:
    """Write both files; in `alphas.npz` each of the four tables is stacked over the records."""
    lines = [
        json.dumps(
            {
                "step": row["step"],
                "arch_step": row["arch_step"],
                **row["diagnostics"],
                "collapsed": genotype_of(row).collapsed,
                "genotype": json.loads(row["genotype"]),
            }
        )
        for row in rows
    ]
    genotypes, alphas = (folder / name for name in FILES)
    files.write_text(genotypes, "\n".join(lines) + "\n")
    stacked = {name: np.stack([row["tables"][name].numpy() for row in rows]) for name in ARCHITECTURE_NAMES}
    files.write_npz(alphas, stacked)


def read_history(folder: Path) -> list[tuple[int, Genotype]]:
    """(architecture step, genotype) of every record in `folder`; none if its file is gone. Raises ValueError."""
    path = folder / FILES[0]
    if not path.exists():
        return []
    with files.damage_named(path, files.REMOVE_OURS):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [(int(row["arch_step"]), Genotype.from_json(row["genotype"])) for row in rows]
