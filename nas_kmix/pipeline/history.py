"""What a search leaves of its course: `genotypes.jsonl`, a line per epoch, and `alphas.npz`, the tables behind them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from darts_space import ARCHITECTURE_NAMES, Search
from nas_kmix.engine import files

FILES = ("genotypes.jsonl", "alphas.npz")
SKIP_COLLAPSE = 4  # skip connections among the eight operations of a normal cell that deserve a warning

Row = Mapping[str, Any]
"""An epoch: its number, the genotype after it as JSON, how sure that is, and the tables that it came from."""


def row_of(search: Search, epoch: int) -> Row:
    tables = {name: getattr(search.model, name).detach().cpu().clone() for name in ARCHITECTURE_NAMES}
    diagnostics = search.model.diagnostics()._asdict()
    genotype = json.dumps(search.model.genotype().to_json())
    return {"epoch": epoch, "genotype": genotype, "diagnostics": diagnostics, "tables": tables}


def write_history(rows: Sequence[Row], folder: Path) -> None:
    """Write both files; in `alphas.npz` each of the four tables is stacked over the epochs."""
    lines = [
        json.dumps(
            {
                "epoch": row["epoch"],
                **row["diagnostics"],
                "collapsed": row["diagnostics"]["skips_normal"] >= SKIP_COLLAPSE,
                "genotype": json.loads(row["genotype"]),
            }
        )
        for row in rows
    ]
    genotypes, alphas = (folder / name for name in FILES)
    files.write_text(genotypes, "\n".join(lines) + "\n")
    stacked = {name: np.stack([row["tables"][name].numpy() for row in rows]) for name in ARCHITECTURE_NAMES}
    files.write_npz(alphas, stacked)
