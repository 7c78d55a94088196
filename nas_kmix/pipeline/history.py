"""The history of a search: `genotypes.jsonl`, one line per record, and `alphas.npz`, the tables of every record.

Where the removal of edges chooses them, the archive also holds its losses, `removal_normal` and `removal_reduce`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from darts_space import ARCHITECTURE_NAMES, Genotype, Search
from darts_space.cell import GENOTYPE_EDGES
from darts_space.derivation import EdgesBy, Removal
from nas_kmix.engine import files
from nas_kmix.engine.run import Run

FILES = ("genotypes.jsonl", "alphas.npz")
SETTLED = GENOTYPE_EDGES - 2  # edges that must then be there on average for a genotype to be called settled
LAST_RECORDS = 4  # how many records the final genotype is compared with
REMOVAL_NAMES = ("removal_normal", "removal_reduce")

Row = Mapping[str, Any]
"""A record: steps and architecture steps so far, the genotype as JSON, its diagnostics and its tables."""


def row_of(search: Search, edges_by: EdgesBy, removal: Removal | None) -> Row:
    """The record of the current state."""
    tables = {name: getattr(search.model, name).detach().cpu().clone() for name in ARCHITECTURE_NAMES}
    if removal is not None:
        tables |= dict(zip(REMOVAL_NAMES, removal, strict=True))
    return {
        "step": search.steps_done,
        "arch_step": search.steps_done - search.config.rest_steps,
        "genotype": json.dumps(search.model.genotype(edges_by, removal).to_json()),
        "diagnostics": search.model.diagnostics(edges_by, removal)._asdict(),
        "tables": tables,
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
    stacked = {name: np.stack([row["tables"][name].numpy() for row in rows]) for name in rows[0]["tables"]}
    files.write_npz(alphas, stacked)


def say_how_sure(genotype: Genotype, rows: Sequence[Row], name: str, run: Run) -> None:
    """Log how far the last records agree with the genotype, and warn of a collapse."""
    moved = [row for row in rows[:-1] if row["arch_step"] > 0]
    earlier = [genotype_of(row) for row in moved[-LAST_RECORDS:]]
    if earlier:
        mean = np.mean([genotype.shared_edges(other) for other in earlier])
        settled = "it had settled" if mean >= SETTLED else "it was still changing, so trust it little"
        which = f"the {len(earlier)} records" if len(earlier) > 1 else "the record"
        run.say(
            f"{name}: {which} before the last had {mean:.1f} of the {GENOTYPE_EDGES} edges of the "
            f"genotype on average: {settled}"
        )
    if genotype.collapsed:
        skips, pools = genotype.skip_connections()[0], genotype.pools()[0]
        run.say(
            f"warning: the search has collapsed: of the normal cell's 8 operations {skips} are skip connections and "
            f"{pools} are pools. Raise --rest-steps, which keep the architecture fixed, or lower --arch-steps."
        )


def read_history(folder: Path) -> list[tuple[int, Genotype]]:
    """(architecture step, genotype) of every record in `folder`; none if its file is gone. Raises ValueError."""
    path = folder / FILES[0]
    if not path.exists():
        return []
    with files.damage_named(path, files.REMOVE_OURS):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [(int(row["arch_step"]), Genotype.from_json(row["genotype"])) for row in rows]


def say_if_gone(genotype: Path, run: Run) -> None:
    """Warn if the history beside the file of a search's result is missing."""
    for name in FILES:
        if not genotype.with_name(name).exists():
            run.say(f"warning: {genotype.with_name(name)} is gone; remove {genotype.name} to search again and get both")
